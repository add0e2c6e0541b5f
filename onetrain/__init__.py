"""The trainer, one subject per folder (docs/architecture.md)."""

# first of all, so that a Ctrl-C while libraries are imported ends a command without a traceback
from onetrain import command_line  # noqa: F401

__version__ = '0.9.0'

"""The trainer, one subject per file (docs/architecture.md)."""

__version__ = '0.9.0'

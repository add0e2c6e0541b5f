"""What the processor of this machine is, what it computes in, and whether there is a compiler for
it. Needs the standard library alone.
"""

import functools
import os
import platform
import shutil

BFLOAT16 = {'avx512_bf16', 'amx_bf16', 'bf16'}  # as Linux names these instructions: x86, x86, ARM


@functools.cache
def _described():
    try:
        with open('/proc/cpuinfo') as f:
            return [(key.strip(), value.strip()) for key, _, value in (s.partition(':') for s in f)]
    except OSError:
        return []


def cpu_name() -> str:
    """Return the name of the processor."""
    return next((value for key, value in _described() if key == 'model name'), platform.machine())


def has_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16: without, torch emulates it."""
    words = next((value for key, value in _described() if key in ('flags', 'Features')), '')
    return not BFLOAT16.isdisjoint(words.split())


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return bool(shutil.which('g++') or shutil.which('clang++') or os.environ.get('CXX'))

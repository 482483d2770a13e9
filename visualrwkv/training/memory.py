"""How glibc keeps memory: a packed row is never as long as the one before, and the holes that this leaves add up."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
MOST = (1 << 31) - 1  # that mallopt takes


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc's allocator, where there is one."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), name, lambda *_: 0)(*arguments)


def share_one_heap() -> None:
    """One heap for all threads from now on: backward's threads would each keep holes of their own."""
    _glibc("mallopt", M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Keep what is freed for the next step from now on: asking the system for each large tensor anew costs a page fault for
    every 4 KB of it, some sixth of a step on a CPU where tensors have tens of megabytes.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, MOST)
    _glibc("mallopt", M_TRIM_THRESHOLD, MOST)


def trim_memory() -> None:
    """Give freed memory back to the system. Takes some 50 ms, so not every step."""
    _glibc("malloc_trim", 0)

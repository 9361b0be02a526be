"""Keeps freed memory in the process, so that large bodies do not pay for new pages each time.

glibc returns a freed block of more than 128 KiB to the kernel, and later blocks as soon as some of them are free at the end of the heap.
The next body gets new pages, and each page costs a fault and its zeroing: a copy of 1 MB takes 440 µs like that, and 14 µs in pages that
are there already. A body is copied several times on its way.
"""

from __future__ import annotations

import ctypes
import os

# of malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_SET_BY_USERS = frozenset(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"))
_KEPT_BYTES = 16 * 1024 * 1024  # at the end of the heap, where it could be returned
_OWN_MAPPING_BYTES = 4 * 1024 * 1024  # a larger block is a mapping of its own, and goes back as soon as it is freed


def keep_freed_memory() -> None:
    """Does nothing with another C library, or where the environment sets limits of its own."""
    if not _SET_BY_USERS.isdisjoint(os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)

"""Heap of the C library: batches of a backlog use the same memory again, and then it is given back to the system."""

from __future__ import annotations

import ctypes

# musl has neither: it gives memory back by itself.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that glibc takes, on 64 bits.
_MAX_FREE_BYTES = 32 << 20


def keep_free() -> None:
    """Have the heap keep freed arrays: fresh pages take a fifteenth of a batch's processor time."""
    if _mallopt is not None and _mallopt(_M_MMAP_THRESHOLD, _MAX_FREE_BYTES):
        _mallopt(_M_TRIM_THRESHOLD, _MAX_FREE_BYTES)


def release_free() -> None:
    """Give free memory back to the system, also from the middle of the heap: a few milliseconds."""
    if _malloc_trim is not None:
        _malloc_trim(0)

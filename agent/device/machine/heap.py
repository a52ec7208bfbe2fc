"""Heap of the C library: what a backlog took is given back to the system when it is worked off."""

from __future__ import annotations

import ctypes

# musl has none: it gives memory back by itself.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_free() -> None:
    """Give free memory back to the system, also from the middle of the heap: a few milliseconds."""
    if _malloc_trim is not None:
        _malloc_trim(0)

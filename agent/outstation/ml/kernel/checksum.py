"""Compiled CRC-32 of large blobs, as that of zlib."""

from __future__ import annotations

import zlib

import numpy as np

from outstation.ml.kernel import library as kernel
from outstation.ml.kernel.library import address

_BLOCK_BYTES, _LEAST_BYTES = 16, 16_384
_EMPTY_REGISTER = 0xFFFFFFFF  # zlib inverts the register before and after


def crc32(data: bytes, value: int = 0) -> int:
    """Return the CRC-32 of `data` behind bytes whose CRC-32 is `value`."""
    library, whole = kernel.kernel(), len(data) // _BLOCK_BYTES * _BLOCK_BYTES
    if library is None or whole < _LEAST_BYTES:
        return zlib.crc32(data, value)
    folded = np.empty(_BLOCK_BYTES, np.uint8)
    if library.fold_crc(whole, value ^ _EMPTY_REGISTER, data, address(folded)):
        # This processor has no instruction for it.
        return zlib.crc32(data, value)
    return zlib.crc32(data[whole:], zlib.crc32(folded, _EMPTY_REGISTER))

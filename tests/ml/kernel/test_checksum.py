"""Compiled CRC-32: the value of zlib for any data, behind any other."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.kernel import checksum
from outstation.ml.kernel.library import Library


@pytest.mark.usefixtures("compiled")
@given(seed=st.binary(min_size=1, max_size=64), size=st.integers(0, 40_000), value=st.integers(0, 2**32 - 1))
def test_any_data_have_the_crc_of_zlib(seed: bytes, size: int, value: int) -> None:
    data = (seed * (size // len(seed) + 1))[:size]
    assert checksum.crc32(data, value) == zlib.crc32(data, value)
    assert checksum.crc32(data[1:], value) == zlib.crc32(data[1:], value)


def test_a_flipped_bit_changes_the_crc(compiled: Library) -> None:
    data = bytearray(20_000)
    crc = checksum.crc32(bytes(data))
    for bit in (0, 8 * 2048 + 3, 8 * 20_000 - 1):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum.crc32(bytes(data)) != crc, compiled.variant
        data[bit // 8] ^= 1 << bit % 8


def test_without_the_instruction_zlib_computes_the_crc(compiled: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled.__dict__, "fold_crc", lambda *_: 1)
    assert checksum.crc32(bytes(20_000)) == zlib.crc32(bytes(20_000))

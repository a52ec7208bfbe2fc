"""Marker: torn and foreign bytes, and records of another boot, count for nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outstation.device.bundles.quarantine import CrashRecord
from outstation.device.machine import marker


@given(st.text(max_size=80), st.text(max_size=80), st.integers(0, 300), st.integers(1, 255))
def test_what_was_written_is_read_and_one_changed_byte_is_noticed(task: str, digest: str, at: int, flip: int) -> None:
    record = CrashRecord(task, digest, "id")
    data = bytearray(marker.encode("boot", record))
    assert marker.decode(bytes(data) + bytes(100), "boot", CrashRecord) == record
    assert marker.decode(bytes(data), "another boot", CrashRecord) is None
    data[at % len(data)] ^= flip
    assert marker.decode(bytes(data), "boot", CrashRecord) is None


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_record(data: bytes) -> None:
    assert marker.decode(data, "boot", CrashRecord) is None

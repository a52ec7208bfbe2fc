"""Sparkplug payloads: read by the library of the Eclipse Tahu project, and commands of anybody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.integrations.sparkplug.sparkplug_payload import (
    BOOLEAN,
    DOUBLE,
    INT64,
    REBIRTH,
    STRING,
    Metric,
    encode,
    wants_rebirth,
)
from outstation.workbench.testing.process import MissingProgram
from scripts.kit.npm import decode_sparkplug

METRICS = [
    Metric("bdSeq", INT64, 255, 1_764_000_000_000),
    Metric("exercise/Label", STRING, "PEN", 1_764_000_000_001),
    Metric("exercise/Score", DOUBLE, 0.25, 1_764_000_000_002, is_historical=True),
    Metric("wear/Value", DOUBLE, -1.5, 1_764_000_000_003, unit="mm/s"),
    Metric("Health/Battery", DOUBLE, None, 1_764_000_000_004),
    Metric(REBIRTH, BOOLEAN, False, 1_764_000_000_005),
]


def test_another_implementation_reads_every_metric() -> None:
    try:
        [decoded, death] = decode_sparkplug([encode(METRICS, 1_764_000_000_009, 7), encode(METRICS[:1], 5, None)], 60.0)
    except MissingProgram as missing:
        pytest.skip(str(missing))
    assert (decoded["timestamp"], decoded["seq"]) == (1_764_000_000_009, 7)
    assert death.get("seq") in (None, 0)
    read = {metric["name"]: metric for metric in decoded["metrics"]}
    assert [(name, metric["type"], metric["value"]) for name, metric in read.items()] == [
        ("bdSeq", "Int64", 255),
        ("exercise/Label", "String", "PEN"),
        ("exercise/Score", "Double", 0.25),
        ("wear/Value", "Double", -1.5),
        ("Health/Battery", "Double", None),
        (REBIRTH, "Boolean", False),
    ]
    assert [name for name, metric in read.items() if metric.get("isHistorical")] == ["exercise/Score"]
    assert read["wear/Value"]["properties"]["engUnit"]["value"] == "mm/s"
    assert [metric["timestamp"] for metric in decoded["metrics"]] == [metric.time_ms for metric in METRICS]


def test_a_host_asks_for_births() -> None:
    assert wants_rebirth(encode([Metric(REBIRTH, BOOLEAN, True, 1)], 1, 0))
    assert not wants_rebirth(encode([Metric(REBIRTH, BOOLEAN, False, 1)], 1, 0))
    assert not wants_rebirth(encode([Metric("Node Control/Reboot", BOOLEAN, True, 1)], 1, 0))


@given(st.binary(max_size=200))
def test_a_malformed_command_asks_for_nothing(payload: bytes) -> None:
    assert wants_rebirth(payload) in (True, False)


def test_the_bytes_are_those_of_the_specification() -> None:
    """Protobuf by hand: field 1 varint, field 2 message of fields 1, 3, 4, 11, field 3 varint."""
    payload = encode([Metric("bdSeq", INT64, 3, 5)], 9, 1)
    assert (
        payload == b"\x08\x09" + b"\x12\x0d" + b"\x0a\x05bdSeq" + b"\x18\x05" + b"\x20\x04" + b"\x58\x03" + b"\x18\x01"
    )

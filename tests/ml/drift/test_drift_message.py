"""Drift messages: their size, and what they must not reveal."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from outstation.ml.drift import DriftMonitor, DriftWindowResult, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.reporting.drift_message import round_effect_size, to_compact_numbers
from outstation.protocol.wire.jws import encode
from tests.kit.machine import FIELDS, LABELS, WINDOW, Readings, feed, readings, reference

LEARN = 40


def of_sixteen_fields_and_a_thousand_rows() -> dict[str, Any]:
    """The members of the first tested window."""
    fields, rows = 16, 1000
    rng, names = np.random.default_rng(0), tuple(f"f{i}" for i in range(fields))
    known = rng.normal(size=(LEARN * rows, fields)).astype(np.float32)
    at = np.arange(len(known))
    shipped = build_reference(known, at, 1, np.zeros_like(at), None, rows, fields=names)
    monitor = DriftMonitor(MonitorSettings(shipped, labels=(), window=rows, learn_windows=LEARN))
    live = rng.normal(size=((LEARN + 1) * rows, fields)).astype(np.float32)
    at = np.arange(len(live))
    _, verdicts = monitor.process_batch(
        monitor.start(), live, at, 1, np.zeros_like(at), None, rows=(1, len(live)), t=at * 1_000_000
    )
    assert verdicts[-1].members["state"] == "ok"
    return verdicts[-1].members


def test_a_message_of_sixteen_fields_takes_less_than_six_kilobytes() -> None:
    summary = of_sixteen_fields_and_a_thousand_rows()
    whole_message = encode(summary)
    counts = sum(len(encode(field["counts"])) for field in summary["features"].values())
    assert len(whole_message) < 6000
    assert counts < 2000
    assert len(zlib.compress(whole_message)) < 1800


def test_numbers_take_the_fewest_characters_and_keep_their_value() -> None:
    assert encode({"a": to_compact_numbers(np.array([0.0, 5.0, -0.5, 1e300]))}) == b'{"a":[0,5,-0.5,1e300]}'
    assert round_effect_size(np.array([0.123456, 0.00123, 1.23456, 12.3456, 1e-9])).tolist() == [
        0.123,
        0.0012,
        1.23,
        12.3,
        0,
    ]


def spoiled(r: Readings) -> Iterator[tuple[str, Readings]]:
    """Yield the readings with faults whose sentences contain values."""
    y = r.features[:, 1]
    yield "nothing", r
    yield "saturated", r.changed(1, np.minimum(y, np.quantile(y, 0.8)))
    yield "saturated low", r.changed(1, np.maximum(y, np.quantile(y, 0.2)))
    yield "unit", r.changed(1, (9.80665 * y).astype(np.float32))
    yield "out of range", r.changed(1, np.where(np.arange(len(y)) % 20 == 0, 37.125, y).astype(np.float32))
    yield "stuck", r.changed(1, np.full_like(y, 0.4375))
    yield "gain", r.changed(1, (0.5 * y).astype(np.float32))
    yield "quantized", r.changed(1, (np.round(y / 0.48731) * 0.48731).astype(np.float32))


def test_no_message_says_an_extreme_of_the_data() -> None:
    monitor = DriftMonitor(
        MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN, units=("g",) * 3)
    )
    known, _ = feed(monitor, monitor.start(), readings(3, LEARN + 1))
    assert known.site_reference is not None
    named = set()
    for name, r in spoiled(readings(31, 20)):
        _, verdicts = feed(monitor, known, r)
        named |= {alert.evidence.get("fault", alert.alert) for v in verdicts for alert in v.alerts}
        for i, verdict in enumerate(verdicts):
            rows = r.windows(i, i + 1).features
            for low, high in zip(rows.min(axis=0).tolist(), rows.max(axis=0).tolist(), strict=True):
                assert not mentions(low, verdict, alike=low == high), (name, low)
                assert not mentions(high, verdict, alike=low == high), (name, high)
    assert {"saturated", "unit", "stuck", "drift"} <= named


def mentions(value: float, verdict: DriftWindowResult, *, alike: bool) -> bool:
    """Return True if a message of the window contains this number; with `alike` rows their mean has to be there."""
    texts = [encode(alert.to_body("task")).decode() for alert in verdict.alerts]
    texts += [] if alike else [encode(verdict.members).decode()]
    return any(near(value, number) for text in texts for number in numbers(text))


def numbers(text: str) -> list[float]:
    return [float(result) for result in re.findall(r"-?\d+\.\d{3,}(?:e-?\d+)?|-?\d+\.\d+e-?\d+", text)]


def near(value: float, number: float) -> bool:
    return abs(value - number) < 5e-6 * max(abs(value), 1e-3)


def test_where_values_are_held_at_the_references_own_limit_that_is_named() -> None:
    shipped = reference()
    monitor = DriftMonitor(
        MonitorSettings(shipped, labels=LABELS, window=WINDOW, learn_windows=LEARN, units=("g",) * 3)
    )
    r = readings(31, 3)
    high = float(shipped.high[1])
    held = np.minimum(r.features[:, 1] + np.float32(high - np.quantile(r.features[:, 1], 0.8)), np.float32(high))
    _, verdicts = feed(monitor, monitor.start(), r.changed(1, held))
    [alert] = verdicts[0].alerts
    assert (alert.subject, alert.evidence["fault"]) == (FIELDS[1], "saturated")
    assert f"are held at {high:.6g}, the highest of the shipped reference:" in alert.summary

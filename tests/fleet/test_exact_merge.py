"""Exact merge: real drift messages of fifty devices merge to the result of one pass over all their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.merge import MergedField
from outstation.fleet.drift.survey import summarize_drift
from outstation.foundation import clock
from outstation.ml.drift import DriftMonitor, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.reporting import parsed_message
from outstation.workbench.testing.messages import MODEL, MessageSender, SignedMessage
from tests.fleet.test_drift import NOW_US, add, devices

FIELDS = ("pressure", "noise", "rare")
ROWS, DEVICES, WINDOWS = 50, 50, 3
Rows = NDArray[np.float32]


def rows_of(seed: int, count: int) -> Rows:
    """Return rows of air pressure in pascal (30,000 sd from zero), noise, and a field that is mostly missing."""
    rng = np.random.default_rng(seed)
    rare = np.where(rng.random(count) < 1 / ROWS, rng.normal(5, 2, count), np.nan)
    return np.stack(
        [rng.normal(101_325 + seed % DEVICES / 25, 3, count), rng.normal(0, 1, count), rare], axis=1
    ).astype(np.float32)


@pytest.fixture(scope="module")
def shipped() -> Reference:
    count = 400 * ROWS
    rows, none = rows_of(999, count), np.zeros(count, np.int64)
    return build_reference(rows, np.arange(count), 1, none, None, ROWS, fields=FIELDS)


def drift_messages(shipped: Reference, rows: Rows) -> list[dict[str, Any]]:
    """Return the members of a device's drift messages from its rows."""
    judge = DriftMonitor(MonitorSettings(shipped, labels=(), window=ROWS))
    at, none = np.arange(len(rows)), np.zeros(len(rows), np.int64)
    t = NOW_US - 10**9 + at * 1_000_000
    _, verdicts = judge.process_batch(judge.start(), rows, at, 1, none, None, rows=(1, len(rows)), t=t)
    return [
        {
            "model": MODEL,
            "reference": {"shipped": shipped.digest, "site": v.site_digest},
            "window": {
                "index": v.index, "rows": list(v.rows), "n": v.row_count,
                "from": clock.to_rfc3339(v.t[0]), "to": clock.to_rfc3339(v.t[1]),
            },
            **v.members,
        }
        for v in verdicts
    ]  # fmt: skip


@pytest.fixture(scope="module")
def of_devices() -> list[Rows]:
    return [rows_of(i, WINDOWS * ROWS) for i in range(DEVICES)]


@pytest.fixture(scope="module")
def messages(shipped: Reference, of_devices: list[Rows]) -> list[list[dict[str, Any]]]:
    return [drift_messages(shipped, rows) for rows in of_devices]


@pytest.fixture(scope="module")
def parts(messages: list[list[dict[str, Any]]]) -> list[dict[str, MergedField]]:
    """Return each window of each device as the collector reads it."""
    read = [
        parsed_message.from_message(msgspec.json.decode(msgspec.json.encode(m)), (NOW_US, NOW_US))
        for of_one in messages
        for m in of_one
    ]
    assert {window.state for window in read} == {"insufficient"}
    return [{name: MergedField.sum_of([field]) for name, field in window.fields.items()} for window in read]


def check(shipped: Reference, rows: Rows, merged: dict[str, MergedField]) -> None:
    for i, name in enumerate(FIELDS):
        values = rows[:, i][~np.isnan(rows[:, i])].astype(np.longdouble)
        places = np.searchsorted(shipped.edges[i], values, side="right") + 1
        places = np.where(values < shipped.low[i], 0, np.where(values > shipped.high[i], 33, places))
        result = merged[name]
        assert result.counts.tolist() == np.bincount(places, minlength=34).tolist()
        assert (result.missing, result.moments.n) == (len(rows) - len(values), len(values))
        mean = values.mean()
        assert result.moments.mean == pytest.approx(float(mean), rel=1e-9, abs=1e-12)
        assert result.moments.m2 == pytest.approx(float(((values - mean) ** 2).sum()), rel=1e-9)


def test_windows_with_no_value_and_with_one_are_among_them(parts: list[dict[str, MergedField]]) -> None:
    result = [part["rare"].moments.n for part in parts]
    assert {0, 1, 2} <= set(result)
    assert len(result) == DEVICES * WINDOWS


@given(st.permutations(range(DEVICES * WINDOWS)), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_any_order_and_grouping_of_windows_equals_one_pass_over_all_rows(
    shipped: Reference, of_devices: list[Rows], parts: list[dict[str, MergedField]], order: Sequence[int], rng: Any
) -> None:
    merged = {}
    for name in FIELDS:
        waiting = [parts[i][name] for i in order]
        while len(waiting) > 1:
            at = rng.randrange(len(waiting) - 1)
            waiting[at : at + 2] = [waiting[at] + waiting[at + 1]]
        merged[name] = waiting[0]
    check(shipped, np.concatenate(of_devices), merged)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_survey_of_fifty_devices_equals_one_pass_over_all_rows(
    shipped: Reference, of_devices: list[Rows], messages: list[list[dict[str, Any]]], tmp_path: Path, backwards: bool
) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    pairs: list[tuple[MessageSender, list[dict[str, Any]]]] = list(zip(devices(DEVICES), messages, strict=True))
    for sender, bodies in reversed(pairs) if backwards else pairs:
        sent: list[SignedMessage] = [sender.append("drift", task=sender.task, **body) for body in bodies]
        add(store, sender, *(reversed(sent) if backwards else sent))
    [group] = summarize_drift(store, now_us=NOW_US).groups
    store.close()
    assert (group.windows, group.faulty) == (DEVICES * WINDOWS, 0)
    check(shipped, np.concatenate(of_devices), group.merge_fields())

"""Modes from a class field: classes for a model that names none."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.device.config.streams import FieldConfig, StreamConfig, check_class_field
from outstation.foundation.errors import BadBundle, ConfigError
from outstation.ml.drift import DriftMonitor, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.modes import (
    CLASS_COUNT,
    MAX_MODES,
    OTHER_CLASS,
    Modes,
    assign_classes,
    modes_of_windows,
)
from tests.kit.machine import ROWS, WINDOW, readings, reference

TEXTS = ("", "idle", "walk", "run")


def shipped() -> Reference:
    r = readings(1, 60)
    starts = np.arange(len(r.labels)) * ROWS
    return build_reference(
        r.features, starts, ROWS, np.zeros(len(starts), np.int64), None, WINDOW, fields=("x", "y", "z")
    )


REFERENCE = shipped()


def judged(
    seed: int, *, mode: str, gain: float = 1.0, cuts: tuple[int, ...] = ()
) -> tuple[list[DriftWindowResult], bytes]:
    """Judge 40 learned windows and 20 more, in which x has a `gain`."""
    monitor = DriftMonitor(MonitorSettings(REFERENCE, labels=(), window=WINDOW, class_field=mode))
    r = readings(seed, 60)
    r.features[40 * WINDOW * ROWS :, 0] *= gain
    state, verdicts = monitor.start(), []
    t = np.arange(len(r.features), dtype=np.int64) * 10_000
    for begin, end in pairwise([0, *cuts, len(r.labels)]):
        part = slice(begin * ROWS, end * ROWS)
        state, more = monitor.process_batch(
            state, r.features[part], np.arange(end - begin) * ROWS, ROWS, np.zeros(end - begin, np.int64), None,
            rows=(begin * ROWS + 1, end * ROWS), t=t[part],
            modes=Modes(r.truth[begin:end] + 1, TEXTS) if mode else None,
        )  # fmt: skip
        verdicts += more
    return verdicts, state.to_bytes()


def first(verdicts: list[DriftWindowResult]) -> int:
    return min((v.index for v in verdicts for a in v.alerts if a.state == "raised" and v.index > 40), default=99) - 40


@given(st.lists(st.integers(0, 60), max_size=80), st.lists(st.integers(0, 80), max_size=5))
@settings(deadline=None, max_examples=60)
def test_names_have_the_same_classes_however_they_are_cut(codes: list[int], cuts: list[int]) -> None:
    texts = ["", *(f"mode {i}" for i in range(60))]
    known, whole = assign_classes((), Modes(np.array(codes, np.int64), texts))
    pieces: list[int] = []
    names: tuple[str, ...] = ()
    for begin, end in pairwise([0, *sorted(min(cut, len(codes)) for cut in cuts), len(codes)]):
        names, more = assign_classes(names, Modes(np.array(codes[begin:end], np.int64), texts))
        pieces += more.tolist()
    assert (names, pieces) == (known, whole.tolist())
    assert len(known) <= MAX_MODES
    for code, place in zip(codes, pieces, strict=True):
        assert place == OTHER_CLASS if code == 0 or texts[code] not in known else known[place] == texts[code]


def test_a_model_window_in_which_the_mode_changes_has_none() -> None:
    codes = np.array([1, 1, 1, 2, 2, 2, 2, 0, 3, 3], np.uint16)
    assert modes_of_windows(codes, np.array([0, 2, 4, 6, 8]), 2, TEXTS).codes.tolist() == [1, 0, 2, 0, 3]
    assert modes_of_windows(codes, np.arange(10), 1, TEXTS).codes.tolist() == codes.tolist()


def test_quiet_readings_raise_nothing_within_modes() -> None:
    assert sum(len(v.alerts) for seed in range(6) for v in judged(seed, mode="state")[0]) <= 1


def test_a_loss_of_gain_is_detected_sooner_within_modes() -> None:
    with_modes = [first(judged(seed, mode="state", gain=0.7)[0]) for seed in range(6)]
    without = [first(judged(seed, mode="", gain=0.7)[0]) for seed in range(6)]
    assert max(with_modes) <= 4
    assert np.mean(without) > 2 * np.mean(with_modes)


def test_any_batches_give_the_same_state_with_modes() -> None:
    assert judged(3, mode="state", gain=0.7, cuts=(7, 123, 410))[1] == judged(3, mode="state", gain=0.7)[1]


def test_modes_leave_the_shipped_reference_its_name() -> None:
    monitor = DriftMonitor(MonitorSettings(REFERENCE, labels=(), window=WINDOW, class_field="state"))
    assert monitor.shipped.digest == REFERENCE.digest
    assert monitor.shipped.class_count == CLASS_COUNT


def test_a_state_of_another_field_of_modes_begins_anew() -> None:
    monitor = DriftMonitor(MonitorSettings(REFERENCE, labels=(), window=WINDOW, class_field="state"))
    for other in ("", "shift"):
        with pytest.raises(ValueError, match="field of modes"):
            DriftMonitor(MonitorSettings(REFERENCE, labels=(), window=WINDOW, class_field=other)).restore(
                monitor.start().to_bytes()
            )


def test_a_model_that_names_classes_has_no_other_modes() -> None:
    with pytest.raises(BadBundle, match="names classes itself"):
        DriftMonitor(MonitorSettings(reference(), labels=("idle", "walk", "run"), window=WINDOW, class_field="state"))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("stat", "no field 'stat': classes need a category field; did you mean 'state'"),
        ("ax", "'ax' is a number: classes need a category field; there is state"),
    ],
)
def test_a_mode_that_is_no_category_field_is_refused_with_a_suggestion(mode: str, message: str) -> None:
    stream = StreamConfig(fields=[FieldConfig(name="ax"), FieldConfig(name="state", type="category")])
    check_class_field("outstation.toml", "tasks.t.class_field", "state", stream)
    with pytest.raises(ConfigError) as refused:
        check_class_field("outstation.toml", "tasks.t.class_field", mode, stream)
    assert message in str(refused.value)
    assert "tasks.t.class_field" in str(refused.value)

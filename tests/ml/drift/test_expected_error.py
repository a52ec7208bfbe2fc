"""Expected error of a number: it is tested by itself, where no field and no answer moves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from msgspec import UNSET
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.errors import BadBundle
from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.outputs.counts import FurtherOutput
from outstation.ml.drift.reporting import parsed_message
from outstation.ml.drift.succession import inherit, is_heir, merge_references
from outstation.workbench.authoring import error_training

Floats = NDArray[np.float64]
FIELDS, WINDOW, LEARN = ("a", "b", "c"), 100, 40


def readings(seed: int, drift_windows: int, *, together: float = 0.0) -> tuple[Floats, Floats, Floats]:
    """Return rows (n, 3), answers and errors: these are large where a and b are both far from zero.

    In a share `together` of the rows they are so at once, although neither field nor their correlation moves.
    """
    random = np.random.default_rng(seed)
    rows = random.normal(size=(drift_windows * WINDOW, len(FIELDS)))
    same = random.random(len(rows)) < together
    rows[same, 1] = np.abs(rows[same, 0]) * random.choice([-1.0, 1.0], same.sum())
    rows = rows.astype(np.float32).astype(np.float64)
    far = (np.abs(rows[:, 0]) > 1) & (np.abs(rows[:, 1]) > 1)
    return rows, rows[:, 2], random.normal(size=len(rows)) * np.where(far, 6.0, 0.5)


def shipped_reference() -> Reference:
    rows, answers, _ = readings(1, 60)
    n = len(rows)
    made = build_reference(
        rows.astype(np.float32), np.arange(n), 1, np.zeros(n, np.int64), answers[:, None].astype(np.float32), WINDOW,
        fields=FIELDS,
    )  # fmt: skip
    return replace(made, error=error_training.train(*readings(2, 60)))


def feed(
    monitor: DriftMonitor,
    state: DriftState,
    data: tuple[Floats, Floats, Floats],
    batch: int = 700,
    *,
    is_further: bool = False,
) -> tuple[DriftState, list[DriftWindowResult]]:
    """Feed rows and answers, which are those of a further output if `is_further`: the first one's are 0."""
    rows, answers, _ = data
    results: list[DriftWindowResult] = []
    first = max(0, state.last_counted_row) + 1
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch].astype(np.float32)
        span = (first + at, first + at + len(part) - 1)
        t = np.arange(span[0], span[1] + 1, dtype=np.int64) * 1_000_000
        nothing, starts = np.zeros(len(part), np.int64), np.arange(len(part))
        own = answers[at : at + batch, None].astype(np.float32)
        first_output, further = (np.zeros_like(own), own.astype(np.float64)) if is_further else (own, None)
        state, more = monitor.process_batch(
            state, part, starts, 1, nothing, first_output, rows=span, t=t, answers=further
        )
        results += more
    return state, results


def raised(results: Iterable[DriftWindowResult]) -> list[tuple[str, str]]:
    return [(a.subject, a.evidence["test"]) for r in results for a in r.alerts if a.state == "raised"]


@pytest.fixture(scope="module")
def monitor() -> DriftMonitor:
    return DriftMonitor(MonitorSettings(shipped_reference(), labels=(), window=WINDOW, learn_windows=LEARN))


@pytest.fixture(scope="module")
def learned(monitor: DriftMonitor) -> DriftState:
    state, _ = feed(monitor, monitor.start(), readings(3, LEARN + 2))
    assert state.site_reference is not None
    return state


def test_an_expected_error_that_rises_alone_is_reported(monitor: DriftMonitor, learned: DriftState) -> None:
    _, results = feed(monitor, learned, readings(4, 20, together=0.6))
    assert raised(results) == [("score", "error")]
    alert = next(a for r in results for a in r.alerts if a.state == "raised")
    assert "the error to expect rose by" in alert.summary
    assert "the model's expected error rose from" in alert.summary
    assert alert.evidence["error"]["now"] > 1.3 * alert.evidence["error"]["before"]


def test_easier_inputs_let_expect_a_smaller_error(monitor: DriftMonitor, learned: DriftState) -> None:
    rows, answers, errors = readings(5, 30)
    near = np.flatnonzero((np.abs(rows) < 1).any(1))[: 20 * WINDOW]
    _, results = feed(monitor, learned, (rows[near], answers[near], errors[near]))
    assert monitor.shipped.error is not None
    mean = np.average([r.members["estimate"]["mae"] for r in results], weights=[r.windows for r in results])
    # A third of the large errors are left out.
    assert mean < 0.9 * monitor.shipped.error.mean


def test_quiet_windows_raise_nothing(monitor: DriftMonitor, learned: DriftState) -> None:
    _, results = feed(monitor, learned, readings(6, 200))
    assert [subject for subject, _ in raised(results) if subject == "score"] == []


def test_messages_tell_about_the_error_that_labels_would(monitor: DriftMonitor, learned: DriftState) -> None:
    for together in (0.0, 0.6):
        data = readings(7, 20, together=together)
        _, results = feed(monitor, learned, data)
        n = [r.windows for r in results]
        mean = np.average([r.members["estimate"]["mae"] for r in results], weights=n)
        assert mean == pytest.approx(float(np.abs(data[2]).mean()), rel=0.12)
        expected = parsed_message.from_message({**results[0].members}, results[0].t).expected
        assert expected is not None
        assert expected.is_error


def test_batches_of_any_size_give_the_same_estimates(monitor: DriftMonitor, learned: DriftState) -> None:
    data = readings(8, 12, together=0.6)
    several, single = (feed(monitor, learned, data, batch=batch)[0] for batch in (37, 1200))
    assert (several.suite.recent_scores == single.suite.recent_scores).all()
    assert (several.open_summary.errors == single.open_summary.errors).all()


def test_a_stored_state_goes_on(monitor: DriftMonitor, learned: DriftState) -> None:
    half, _ = feed(monitor, monitor.start(), (*(part[:1530] for part in readings(3, LEARN)),))  # type: ignore[arg-type]
    restored = monitor.restore(monitor.to_bytes(half), half.learning.to_bytes())
    assert restored.learning.errors.shape == (15, 32)
    assert (restored.open_summary.errors == half.open_summary.errors).all()


def test_a_bundle_that_knows_its_error_takes_over_from_one_that_does_not(learned: DriftState) -> None:
    shipped = shipped_reference()
    former = replace(shipped, error=None)
    monitor = DriftMonitor(MonitorSettings(former, labels=(), window=WINDOW, learn_windows=LEARN))
    state, _ = feed(monitor, monitor.start(), readings(3, LEARN + 2))
    merged = merge_references(former, shipped)
    heir = monitor.rebase(merged)
    state, results = feed(heir, inherit(state, merged), readings(9, LEARN + 3))
    assert results[0].members["estimate"]["method"] == "dle"
    assert state.site_reference is not None
    assert state.site_reference.site is not None
    assert state.site_reference.site.baselines["expected_accuracy"].accuracy.shape == (32,)


def test_an_alert_compares_no_error_of_two_models_after_a_change_of_the_bundle(
    monitor: DriftMonitor, learned: DriftState
) -> None:
    rows, answers, errors = readings(2, 60)
    merged = merge_references(
        monitor.shipped, replace(monitor.shipped, error=error_training.train(rows, answers, errors * 10))
    )
    heir = monitor.rebase(merged)
    for shipped, state, compared in ((monitor, learned, True), (heir, inherit(learned, merged), False)):
        data = readings(11, 6)
        data[0][:, 1] += 1.5
        _, results = feed(shipped, state, data)
        alert = next(a for r in results for a in r.alerts if a.state == "raised" and a.subject == "b")
        assert ("the model's expected error" in alert.summary) is compared
        assert ("error" in alert.evidence) is compared


def test_a_malformed_error_in_a_reference_is_refused() -> None:
    shipped = shipped_reference()
    decoded = Reference.from_json(shipped.to_json())
    assert decoded.digest == shipped.digest
    assert shipped.error is not None
    bad = replace(shipped, error=replace(shipped.error, edges=shipped.error.edges[:3]))
    with pytest.raises(BadBundle, match="error"):
        Reference.from_json(bad.to_json())


# --- a further output ---


WEAR = FurtherOutput("wear", (), ("wear",))


def several_outputs() -> Reference:
    """Return a reference of a model whose further output is the number that errs, and the first one a constant."""
    rows, answers, _ = readings(1, 60)
    n = len(rows)
    made = build_reference(
        rows.astype(np.float32), np.arange(n), 1, np.zeros(n, np.int64), np.zeros((n, 1), np.float32), WINDOW,
        fields=FIELDS, further=[WEAR], answers=answers[:, None],
    )  # fmt: skip
    return replace(made, further=(replace(made.further[0], error=error_training.train(*readings(2, 60))),))


@pytest.fixture(scope="module")
def further() -> DriftMonitor:
    return DriftMonitor(
        MonitorSettings(several_outputs(), labels=(), window=WINDOW, learn_windows=LEARN, further=[WEAR])
    )


@pytest.fixture(scope="module")
def further_learned(further: DriftMonitor) -> DriftState:
    state, _ = feed(further, further.start(), readings(3, LEARN + 2), is_further=True)
    assert state.site_reference is not None
    return state


def test_the_error_to_expect_of_a_further_output_is_reported_and_tested(
    further: DriftMonitor, further_learned: DriftState
) -> None:
    _, quiet = feed(further, further_learned, readings(6, 60), is_further=True)
    assert [subject for subject, _ in raised(quiet) if subject == "output.wear"] == []
    _, results = feed(further, further_learned, data := readings(4, 20, together=0.6), is_further=True)
    assert raised(results) == [("output.wear", "error")]
    alert = next(a for r in results for a in r.alerts if a.state == "raised")
    assert alert.summary.startswith("output.wear: the error to expect rose by")
    estimates = [r.members["output"]["further"]["wear"]["estimate"]["mae"] for r in results]
    mean = np.average(estimates, weights=[r.windows for r in results])
    assert mean == pytest.approx(float(np.abs(data[2]).mean()), rel=0.12)
    assert all(r.members["estimate"] is None for r in results), "the first output has no held-out errors"


def test_what_is_counted_of_a_further_output_survives_storing_and_batches_of_any_size(further: DriftMonitor) -> None:
    data = readings(8, 12, together=0.6)
    several, single = (feed(further, further.start(), data, batch=batch, is_further=True)[0] for batch in (37, 1200))
    assert (several.learning.further == single.learning.further).all()
    assert several.learning.further[:, -32:].sum() == 12 * WINDOW
    restored = further.restore(further.to_bytes(several), several.learning.to_bytes())
    assert (restored.learning.further == several.learning.further).all()


def test_the_file_of_a_further_output_without_held_out_errors_is_as_before() -> None:
    made = several_outputs()
    plain = replace(made, further=(replace(made.further[0], error=UNSET),))
    assert b"error" not in plain.to_json()
    assert b"has_error" not in made.to_json()
    assert Reference.from_json(made.to_json()).digest == made.digest
    assert Reference.from_json(plain.to_json()).task.further == (WEAR,)


def test_a_bundle_with_and_one_without_held_out_errors_of_a_further_output_inherit_nothing() -> None:
    made = several_outputs()
    assert not is_heir(made, replace(made, further=(replace(made.further[0], error=UNSET),)))


def test_impossible_errors_of_a_further_output_are_refused() -> None:
    made = several_outputs()
    [wear] = made.further
    assert wear.error
    for change in (
        {"error": replace(wear.error, n=-wear.error.n)},
        {"error": replace(wear.error, edges=wear.error.edges[1:])},
        {"output": replace(WEAR, has_error=True), "error": UNSET},
    ):
        with pytest.raises(BadBundle, match="further"):
            Reference.from_json(replace(made, further=(replace(wear, **change),)).to_json())

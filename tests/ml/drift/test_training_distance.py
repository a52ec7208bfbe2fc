"""Training distance: an alert says if the model never saw such readings, which a drift alone does not tell."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary, summarize
from outstation.ml.drift.reporting.training_distance import UNLIKE_TRAINING, measure_training_distance
from scripts.benchmarks import forged_readings
from scripts.benchmarks.drift_peers import forged_sites

FIELDS = ("a", "b", "c")
CENTRES = np.array([[0.0, 5.0, -5.0], [4.0, -4.0, 0.0]])


def draw(windows: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of two classes, and the class of each window."""
    rng = np.random.default_rng(seed)
    classes = np.arange(windows) % 2
    offsets = CENTRES[classes] + rng.normal(0, 0.3, (windows, 3))
    return (offsets[:, None] + rng.normal(size=(windows, rows, 3))).reshape(-1, 3), classes


def shipped(rows: int) -> Reference:
    values, classes = draw(1200, rows, 1)
    starts = np.arange(1200) * rows
    return build_reference(
        values.astype(np.float32), starts, rows, classes, None, 20, fields=FIELDS, labels=("one", "two")
    )


def of_window(reference: Reference, values: np.ndarray, classes: np.ndarray) -> float:
    starts = np.arange(len(classes)) * reference.window_rows
    return measure_training_distance(summarize(reference, values, starts, classes, None), reference)


@pytest.mark.parametrize("rows", [1, 8])
def test_readings_like_the_training_are_about_one_away_and_others_far(rows: int) -> None:
    reference = shipped(rows)
    values, classes = draw(200, rows, 2)
    assert of_window(reference, values, classes) == pytest.approx(1.0, abs=0.15)
    assert of_window(reference, values + 8.0, classes) > 2 * UNLIKE_TRAINING
    # Another mix of known classes is no new reading, whatever class the model names.
    only = np.repeat(classes == 1, rows)
    assert of_window(reference, values[only], np.zeros(100, np.int64)) == pytest.approx(1.0, abs=0.2)


def test_few_wild_windows_among_usual_ones_show() -> None:
    reference = shipped(8)
    values, classes = draw(20, 8, 3)
    values[:8] += 6.0 * np.array([1, -1, 1])
    assert of_window(reference, values, classes) > UNLIKE_TRAINING


def test_one_field_that_hardly_moved_does_not_decide_alone() -> None:
    reference = shipped(1)
    values, classes = draw(200, 1, 4)
    values[:, 0] += 1e6
    assert of_window(reference, values, classes) < 10.0


def test_a_window_without_statistics_has_no_distance() -> None:
    reference = shipped(8)
    assert np.isnan(measure_training_distance(Summary.empty(reference), reference))


def test_forged_readings_are_noticed_and_honest_ones_are_not() -> None:
    subject = forged_sites.load_shipped("exercise")
    measured = forged_readings.measure(subject, sites=1, quiet=1)
    assert measured.honest.alerts == 0
    assert len(measured.attacks) >= 9
    assert [name for name, trials in measured.attacks.items() if not trials.always.delays] == []
    assert measured.attacks["noise 1 sd"].always.unlike > 0
    assert measured.attacks["one class replayed"].always.unlike == 0
    # The same again, bit for bit.
    assert forged_readings.table(measured) == forged_readings.table(forged_readings.measure(subject, sites=1, quiet=1))

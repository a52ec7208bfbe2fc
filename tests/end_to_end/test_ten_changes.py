"""Five sensor faults and five drifts in the shipped recordings, under the shipped model: each is told as what it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.device.config.sources import ReplayFault
from outstation.device.intake.sources import replay
from outstation.device.intake.sources.recordings import Playlist
from outstation.ml.datasets.recordings import load
from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings, Reference
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import features, runtime, scores
from outstation.protocol.alerts.alert import Alert
from outstation.workbench.simulate.scenario import SCENARIOS

LEARN, AFTER = 40, 12  # drift windows
ROWS, WINDOW = 100, 20
UNITS = ("g", "g", "g", "rad/s", "rad/s", "rad/s")


@dataclass(frozen=True)
class Watch:
    """A site that has learned its reference, and the readings that follow."""

    shipped: bundle.Bundle
    model: runtime.TfliteModel
    judge: DriftMonitor
    learned: DriftState
    rows: NDArray[np.float32]

    def step(self, state: DriftState, rows: NDArray[np.float32]) -> tuple[DriftState, list[Alert]]:
        spec, starts = self.shipped.manifest, np.arange(0, len(rows), ROWS)
        windows = features.build_windows(rows, starts, spec.input)
        predictions = scores.from_outputs(self.model.invoke(windows), spec, windows)
        assert predictions.label is not None
        assert predictions.score is not None
        first = max(0, state.last_counted_row) + 1
        t = np.arange(first, first + len(rows), dtype=np.int64) * 20_000
        state, verdicts = self.judge.process_batch(
            state, rows, starts, ROWS, predictions.label, predictions.score[:, None].astype(np.float32),
            rows=(first, first + len(rows) - 1), t=t,
        )  # fmt: skip
        return state, [alert for verdict in verdicts for alert in verdict.alerts]

    def after(self, *faults: ReplayFault) -> list[Alert]:
        """All alerts that are raised."""
        return [alert for alert in self.alerts(*faults) if alert.state == "raised"]

    def alerts(self, *faults: ReplayFault) -> list[Alert]:
        columns = {name: self.rows[:, i].astype(np.float64) for i, name in enumerate(self.judge.shipped.fields)}
        changed = replay.inject_faults(columns, faults, 1)
        return self.step(self.learned, np.stack(list(changed.values()), axis=1).astype(np.float32))[1]


@pytest.fixture(scope="module")
def watch() -> Watch:
    recordings = load(SCENARIOS["exercise"].file)
    parts, count = [], 0
    for part in Playlist(recordings, 8, 0).iter_items():
        n = part.n // ROWS * ROWS
        parts.append(recordings.rows[part.start : part.start + n])
        count += n
        if count >= (LEARN + AFTER + 1) * WINDOW * ROWS:
            break
    rows = np.concatenate(parts)
    shipped = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    judge = DriftMonitor(MonitorSettings(
        Reference.from_json(shipped.files["reference.json"]),
        labels=shipped.manifest.output.labels, window=WINDOW, learn_windows=LEARN, units=UNITS,
    ))  # fmt: skip
    begin = (LEARN + 1) * WINDOW * ROWS
    start = Watch(
        shipped,
        runtime.TfliteModel(shipped.model_bytes),
        judge,
        judge.start(),
        rows[begin : begin + AFTER * WINDOW * ROWS],
    )
    learned, _ = start.step(judge.start(), rows[:begin])
    assert learned.site_reference is not None
    return Watch(start.shipped, start.model, judge, learned, start.rows)


def sampled(rows: NDArray[np.float32], faster: float) -> NDArray[np.float32]:
    """Return whole drift windows as another sampling clock reads them: signals move `faster` times as fast per row."""
    at = np.arange(0, len(rows) - 1, faster)
    read = np.stack([np.interp(at, np.arange(len(rows)), column) for column in rows.T], axis=1)
    return read[: len(read) // (ROWS * WINDOW) * ROWS * WINDOW].astype(np.float32)


@pytest.mark.parametrize(("faster", "words"), [(1.25, "signals move faster"), (0.8, "signals move slower")])
def test_another_sampling_clock_is_detected_without_timestamps(watch: Watch, faster: float, words: str) -> None:
    alerts = watch.step(watch.learned, sampled(watch.rows, faster))[1]
    assert [(a.alert, a.subject) for a in alerts] == [("drift", "rate")]
    assert words in alerts[0].summary
    assert alerts[0].evidence["ratio"] == pytest.approx(faster, rel=0.1)
    assert alerts[0].evidence["window"] - watch.learned.index < 3


def change(kind: str, amount: float, *fields: str) -> ReplayFault:
    return ReplayFault(kind=kind, fields=list(fields), from_row=1, amount=amount)  # type: ignore[arg-type]


def test_unchanged_readings_raise_nothing(watch: Watch) -> None:
    assert watch.after() == []


@pytest.mark.parametrize(
    ("fault", "name", "summary"),
    [
        (change("spikes", 12.0, "ay"), "spikes", "lone jumps"),
        (change("saturate", 0.7, "ax"), "saturated", "are held at"),
        (change("scale", 9.80665, "az"), "unit", "reads like m/s² where g was"),
        (change("swap", 0.0, "wx", "wy"), "swapped", "reads like w"),
        (change("quantize", 0.125, "az"), "quantized", "as coarse as they were here"),
    ],
    ids=lambda value: value.kind if isinstance(value, ReplayFault) else "",
)
def test_a_fault_is_named(watch: Watch, fault: ReplayFault, name: str, summary: str) -> None:
    alerts = watch.after(fault)
    named = {(a.subject, a.evidence["fault"]) for a in alerts if a.alert == "fault"}
    assert named == {(field, name) for field in fault.fields}, [a.summary for a in alerts]
    assert all(summary in a.summary for a in alerts if a.alert == "fault")


@pytest.mark.parametrize(
    "fault", [change("scale", 9.80665, "az"), change("swap", 0.0, "wx", "wy"), change("swap", 0.0, "ax", "az")]
)
def test_where_a_field_is_read_wrongly_no_drift_stays_open(watch: Watch, fault: ReplayFault) -> None:
    is_open = {}
    for alert in watch.alerts(fault):
        is_open[alert.id] = alert.state == "raised"
    assert {name for name, still in is_open.items() if still and "/drift/" in name} == set()
    assert any(still and "/fault/" in name for name, still in is_open.items())


def test_fields_swapped_back_are_reported_as_sound(watch: Watch) -> None:
    rows = watch.rows.copy()
    rows[: 5 * WINDOW * ROWS, [3, 4]] = rows[: 5 * WINDOW * ROWS, [4, 3]]
    _, results = watch.step(watch.learned, rows)
    assert [(a.state, a.id) for a in results if a.alert == "fault"] == [
        (state, f"{name}/fault/1") for state in ("raised", "cleared") for name in ("wx", "wy")
    ]


@pytest.mark.parametrize(
    ("drift", "cause"),
    [
        (change("gain", 0.6, "ax"), "likely gain loss"),
        (change("offset", 0.4, "ay"), "likely offset or a new position"),
        (change("gain", 1.5, "wy"), "likely gain rise"),
        (change("noise", 0.3, "az"), "likely noise or more movement"),
        (change("offset", 1.0, "wz"), "likely offset or a new position"),
    ],
    ids=lambda value: f"{value.kind} {value.fields[0]}" if isinstance(value, ReplayFault) else "",
)
def test_a_drift_alert_names_its_field_and_likely_cause(watch: Watch, drift: ReplayFault, cause: str) -> None:
    alerts = watch.after(drift)
    assert [a.summary for a in alerts if a.alert == "fault"] == []
    assert alerts
    assert (alerts[0].alert, alerts[0].subject) == ("drift", drift.fields[0]), [a.summary for a in alerts]
    assert cause in alerts[0].summary

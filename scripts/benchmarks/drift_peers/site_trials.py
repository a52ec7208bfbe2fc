"""Trials of our drift monitor at sites of a population: alarms of every kind while nothing changes, and delays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.protocol.alerts.alert import Alert
from scripts.benchmarks.drift_peers.populations import WINDOWS_PER_DAY, Clock, Population, Whole
from scripts.benchmarks.drift_peers.synthetic import Floats

LEARN = 40  # drift windows, at least
SHIPPED = 60  # drift windows of the bundle's data
MOST_LEARNED = 5  # times as many windows are offered before a site counts as one that never learns
WATCHED = 20  # windows within which a change has to be detected
RAMP = 10  # windows


class Trial(msgspec.Struct, frozen=True):
    """Trial of a change at a site: first values of its fields, and by how much their correlation changes."""

    values: Floats  # (fields,)
    correlation: float


class Change(msgspec.Struct, frozen=True):
    """Change of the first `fields` fields: `transform` maps their rows (n, `fields`), in sd from the mean.

    `missing` and `rate` are a share of rows and a factor on the sampling rate. A detection must name one of the fields,
    or one of the `subjects`. `is_stated` tells by the numbers of the fields in `status`, and those of the correlation,
    whether the site says that it finds the change.
    """

    name: str
    fields: int
    transform: Callable[[Floats, int], Floats] | None = None
    is_stated: Callable[[Sequence[dict[str, Any]], Trial], bool] = lambda stated, trial: True
    missing: float = 0.0
    rate: float = 1.0
    subjects: tuple[str, ...] = ()


def _ramp(z: Floats, rows: int) -> Floats:
    return z + np.minimum(1, np.arange(len(z)) / (RAMP * rows))[:, None]


def _correlated(z: Floats, rows: int) -> Floats:
    return np.stack([z[:, 0], 0.5 * z[:, 0] + np.sqrt(0.75) * z[:, 1]], axis=1)


def _shift(sd: float) -> Callable[[Floats, int], Floats]:
    return lambda z, rows: z + sd


def _stuck(z: Floats, rows: int) -> Floats:
    return np.repeat(z[:1], len(z), axis=0)


def _finds_shift(sd: float) -> Callable[[Sequence[dict[str, Any]], Trial], bool]:
    return lambda stated, trial: any((field["shift_sd"] or np.inf) <= sd for field in stated)


def _finds_spread(stated: Sequence[dict[str, Any]], trial: Trial) -> bool:
    return bool((stated[0]["spread"] or np.inf) <= np.sqrt(1.5))


def _finds_correlation(stated: Sequence[dict[str, Any]], trial: Trial) -> bool:
    return any((field["correlation"] or np.inf) <= abs(trial.correlation) for field in stated)


def _finds_stuck(stated: Sequence[dict[str, Any]], trial: Trial) -> bool:
    return float(trial.values[0]) not in stated[0]["never_stuck_at"]


SHIFTS = (0.25, 0.5, 1.0)
RAMP_MEAN = 1 - RAMP / 2 / WATCHED  # sd, over the windows watched
CHANGES = (
    *(Change(f"+{sd:g} sd", 1, _shift(sd), _finds_shift(sd)) for sd in SHIFTS),
    *(Change(f"+{sd:g} sd, four fields", 4, _shift(sd), _finds_shift(sd)) for sd in SHIFTS),
    Change("variance × 1.5", 1, lambda z, rows: z * np.sqrt(1.5), _finds_spread),
    Change("ramp to 1 sd", 1, _ramp, _finds_shift(RAMP_MEAN)),
    Change("correlation + 0.5", 2, _correlated, _finds_correlation, subjects=("joint",)),
    Change("missing 3 %", 1, missing=0.03),
    Change("missing 10 %", 1, missing=0.1),
    Change("stuck", 1, _stuck, _finds_stuck),
    Change("rate × 1.25", 1, rate=1.25, subjects=("rate",)),
)


class QuietCount(msgspec.Struct):
    """Alarms of quiet windows, by kind and test."""

    windows: int = 0
    alarms: int = 0
    unlearned: int = 0  # sites
    kinds: Counter[str] = msgspec.field(default_factory=Counter)

    @property
    def per_1000(self) -> float:
        return 1000 * self.alarms / max(1, self.windows)


class Site(msgspec.Struct, frozen=True):
    """A site that has learned: its monitor and state, and the position of its stream."""

    monitor: DriftMonitor
    state: DriftState
    rows: Floats  # of the stream behind the learned ones, the class included
    t: Whole
    learned: Floats  # rows, the class included


def shipped_monitor(population: Population, rows: int, seed: int = 0) -> DriftMonitor:
    """Build the monitor of a bundle whose reference comes from a stream of its own."""
    windows = max(SHIPPED, int(population.days * WINDOWS_PER_DAY))
    data, classes = _split(population, _stream(population, (seed, 0), windows, rows)[0])
    model = population.model_rows
    starts = np.arange(0, len(data) - model + 1, model)
    shipped = build_reference(
        data.astype(np.float32), starts, model, _predicted(classes, starts), None, rows // model,
        fields=tuple(f"f{i}" for i in range(data.shape[1])), labels=_labels(population),
    )  # fmt: skip
    return DriftMonitor(
        MonitorSettings(
            shipped,
            labels=_labels(population),
            window=rows // model,
            learn_windows=LEARN,
            min_learn_s=population.days * 86_400,
        )
    )


def learn(monitor: DriftMonitor, population: Population, rows: int, site: int, seed: int = 0) -> Site | None:
    """Let a site learn; None if it never does."""
    learned = max(LEARN, int(population.days * WINDOWS_PER_DAY) + 1)
    windows = MOST_LEARNED * learned + population.watched
    data, t = _stream(population, (seed, 1 + site), windows, rows)
    # All that no site learns without, then window by window up to the first reference that may be enough.
    state, at, size = monitor.start(), 0, (learned - 2) * rows
    while state.site_reference is None and at < MOST_LEARNED * learned * rows:
        state, _ = feed(monitor, population, state, data[at : at + size], t[at : at + size])
        at += size
        size = rows * (1 if at <= learned * rows else LEARN // 4 - at // rows % (LEARN // 4))
    if state.site_reference is None:
        return None
    return Site(monitor, state, data[at:], t[at:], data[:at])


def watch_quiet(site: Site, population: Population, rows: int, count: QuietCount) -> None:
    end = population.watched * rows
    _, results = feed(site.monitor, population, site.state, site.rows[:end], site.t[:end])
    count.windows += sum(result.windows for result in results)
    for alert in raised_alerts(results):
        count.alarms += 1
        count.kinds[describe(alert)] += 1


def move_on(site: Site, population: Population, rows: int, windows: int) -> Site:
    """Return the site some quiet windows later, or as it is if they leave an alert open.

    Sites of a population learn until the same hour of the day, and a change by night is another one than by day.
    """
    state, _ = feed(site.monitor, population, site.state, site.rows[: windows * rows], site.t[: windows * rows])
    if state.suite.open_subjects.any() or state.faults.any_open or not windows:
        return site
    return Site(site.monitor, state, site.rows[windows * rows :], site.t[windows * rows :], site.learned)


def run_trial(site: Site, population: Population, rows: int, change: Change, seed: int) -> tuple[int | None, bool]:
    """Return the windows until an alert names the change, which begins now, None for a miss; and whether the site says
    beforehand that it finds it.
    """
    end, learned = WATCHED * rows, site.state.site_reference
    assert learned is not None
    changed = site.rows[:end].copy()
    part, mean, sd = changed[:, : change.fields], learned.mean[: change.fields], learned.sd[: change.fields]
    if change.transform is not None:
        part[:] = mean + sd * change.transform((part - mean) / sd, rows)
    if change.missing:
        part[np.random.default_rng(seed).random(end) < change.missing] = np.nan
    t = site.t[0] + np.rint((site.t[:end] - site.t[0]) / change.rate).astype(np.int64)
    subjects = {*change.subjects, *learned.fields[: change.fields]}
    numbers = learned.describe_smallest_changes()
    assert numbers is not None
    stated = [numbers["fields"][name] for name in learned.fields[: change.fields]]
    is_stated = change.is_stated(stated, Trial(part[0], _correlation(part) - _correlation(site.learned)))
    state, first = site.state, site.state.index
    for windows in (slice(0, 3), slice(3, WATCHED)):
        now = slice(windows.start * rows, windows.stop * rows)
        state, results = feed(site.monitor, population, state, changed[now], t[now])
        for result in results:
            if any(alert.subject in subjects for alert in raised_alerts([result])):
                return result.index - first + 1, is_stated
    return None, is_stated


def _correlation(rows: Floats) -> float:
    """Return that of the first two fields; 0 where there is one, or one is constant."""
    if rows.shape[1] < 2 or not rows[:, :2].std(0).all():
        return 0.0
    return float(np.corrcoef(rows[:, 0], rows[:, 1])[0, 1])


def feed(
    monitor: DriftMonitor, population: Population, state: DriftState, rows: Floats, t: Whole
) -> tuple[DriftState, list[DriftWindowResult]]:
    """Process whole drift windows of rows."""
    data, classes = _split(population, rows)
    first, model = max(0, state.last_counted_row) + 1, population.model_rows
    starts = np.arange(0, len(data) - model + 1, model)
    return monitor.process_batch(
        state, data.astype(np.float32), starts, model, _predicted(classes, starts), None,
        rows=(first, first + len(data) - 1), t=t,
    )  # fmt: skip


def raised_alerts(results: Sequence[DriftWindowResult]) -> list[Alert]:
    return [alert for result in results for alert in result.alerts if alert.state == "raised"]


def describe(alert: Alert) -> str:
    test = alert.evidence.get("test") or alert.evidence.get("fault") or alert.evidence.get("kind") or ""
    return f"{alert.alert} {test}".strip()


def _stream(population: Population, seed: tuple[int, int], windows: int, rows: int) -> tuple[Floats, Whole]:
    clock = Clock.of_windows(windows, rows)
    return population.make(np.random.default_rng((*seed, rows)), clock), clock.t


def _split(population: Population, rows: Floats) -> tuple[Floats, Whole | None]:
    return (rows[:, :-1], rows[:, -1].astype(np.int64)) if population.labels else (rows, None)


def _labels(population: Population) -> tuple[str, ...]:
    return tuple(f"class{i}" for i in range(population.labels))


def _predicted(classes: Whole | None, starts: Whole) -> Whole:
    return np.zeros(len(starts), np.int64) if classes is None else classes[starts]

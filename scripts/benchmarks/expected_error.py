"""Expected error without labels against the true one, beside NannyML's direct loss estimation; and its false alarms."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.performance.expected_error import ErrorReference
from outstation.workbench.authoring import error_training
from scripts.benchmarks import Report, Result, Section, benchmark, catalogue
from scripts.benchmarks.drift_peers import error_cases, peers, tables
from scripts.benchmarks.drift_peers.error_cases import CONCEPT_DRIFT, MADE, Answers, Case, Floats
from scripts.benchmarks.drift_peers.peers import DLE

SECTION = "Expected error without labels"
OURS, MEAN = "ours", "held-out mean"
SITES, QUIET, LEARN = 8, 250, 40  # drift windows of each site
_CHUNK = 2_000  # rows of a batch


class Deviations(msgspec.Struct):
    """Deviations of each estimator, as shares of the true error of a window."""

    true: list[float] = msgspec.field(default_factory=list)
    by_estimator: dict[str, list[float]] = msgspec.field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, expected: Sequence[float], true: Sequence[float]) -> None:
        self.by_estimator[name] += [abs(e - t) / t for e, t in zip(expected, true, strict=True)]

    def mean(self, name: str) -> float:
        return float(np.mean(self.by_estimator[name]))


@benchmark("drift-errors")
def drift_errors() -> Report:
    """Measure how far the expected error of windows is from the true one, and how often it alarms on quiet data."""
    cases = error_cases.list_cases()
    deviations: dict[tuple[str, str], Deviations] = defaultdict(Deviations)
    held: list[bool] = []
    for case in cases:
        usual = float(np.abs(case.held_out.errors).mean())
        trained = error_training.train(case.held_out.inputs, case.held_out.answers, case.held_out.errors)
        for change, true in case.true_errors().items():
            each = deviations[case.data, change]
            expected, inside = estimate(trained, case.later[change].windows(case.rows), true)
            held += inside if change == "none" else []
            each.true += true
            each.add(OURS, expected, true)
            each.add(MEAN, [usual] * len(true), true)
    if peers.installed():
        add_peer(cases, deviations)
    alarms = {data: count_alarms(data) for data in MADE}
    results = list(_results(deviations, alarms))
    coverage = f"Without a change, {np.mean(held):.0%} of the 95 % intervals hold the true error of their window."
    text = "\n\n".join((_INTRODUCTION, _render(deviations), f"{coverage} {_describe_alarms(alarms)}"))
    return Report(results, f"{text}\n\n{tables.verdicts(results)}", Section(catalogue.DRIFT, SECTION, text))


_INTRODUCTION = f"""\
`scripts/bench drift-errors`: mean absolute deviation of the expected mean absolute error from the true one, in per
cent of the true one, over windows of {error_cases.ROWS} rows ({error_cases.SEEDS} seeds of
{error_cases.WINDOWS}; weeks of `solar`). All get the same held-out labels, inputs and answers, and NannyML its
defaults. The *held-out mean* always expects the error of the held-out data. *Another truth* is concept drift: no input
shows it, and no estimate without labels finds it."""


def estimate(
    trained: ErrorReference, windows: Iterable[Answers], true: Sequence[float]
) -> tuple[list[float], list[bool]]:
    """Return our expected error of each window, and if its interval holds the true one."""
    expected: list[float] = []
    inside: list[bool] = []
    for window, error in zip(windows, true, strict=True):
        estimated = trained.estimate(trained.count(window.inputs, window.answers, 1)[0])
        assert estimated is not None
        expected.append(estimated["mae"])
        inside.append(estimated["mae_low"] <= error <= estimated["mae_high"])
    return expected, inside


def add_peer(cases: Sequence[Case], deviations: dict[tuple[str, str], Deviations]) -> None:
    """Add the deviations of NannyML's DLE over the same windows."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with peers.started(DLE, None) as peer:
                for case in cases:
                    data, later = Path(folder) / "case.npz", np.concatenate([_table(a) for a in case.later.values()])
                    np.savez(data, held_out=_table(case.held_out), later=later, rows=np.int64(case.rows))
                    expected = iter(peer.ask("errors", data)["mae"])
                    for change, true in case.true_errors().items():
                        deviations[case.data, change].add(DLE.called, [next(expected) for _ in true], true)
        except click.ClickException as problem:
            click.echo(f"skipped: {problem.message}", err=True)


def _table(answers: Answers) -> Floats:
    """Return (n, D + 2): inputs, answer, truth."""
    return np.column_stack([answers.inputs, answers.answers, answers.answers + answers.errors])


def count_alarms(data: str, sites: int = SITES, quiet: int = QUIET) -> tuple[int, int]:
    """Return alerts about the expected error, and quiet windows, of sites whose inputs do not change."""
    monitor = DriftMonitor(MonitorSettings(_reference(data), labels=(), window=error_cases.ROWS, learn_windows=LEARN))
    alarms = 0
    for site in range(sites):
        state = _feed(monitor, monitor.start(), data, 100 + site, LEARN)[0]
        alarms += _feed(monitor, state, data, 200 + site, quiet)[1]
    return alarms, sites * quiet


def _reference(data: str) -> Reference:
    rows = error_cases.make_answers(data, 1, 60 * error_cases.ROWS)
    n = len(rows.answers)
    shipped = build_reference(
        rows.inputs.astype(np.float32),
        np.arange(n),
        1,
        np.zeros(n, np.int64),
        rows.answers[:, None].astype(np.float32),
        error_cases.ROWS,
        fields=tuple(f"f{i}" for i in range(rows.inputs.shape[1])),
    )
    held_out = error_cases.make_answers(data, 2, error_cases.HELD_OUT[-1])
    return replace(shipped, error=error_training.train(held_out.inputs, held_out.answers, held_out.errors))


def _feed(monitor: DriftMonitor, state: DriftState, data: str, seed: int, windows: int) -> tuple[DriftState, int]:
    """Feed windows, and return the state with the number of alerts about the expected error."""
    made, alarms = error_cases.make_answers(data, seed, windows * error_cases.ROWS), 0
    for part in made.windows(_CHUNK):
        first, n = max(0, state.last_counted_row) + 1, len(part.answers)
        state, results = monitor.process_batch(
            state,
            part.inputs.astype(np.float32),
            np.arange(n),
            1,
            np.zeros(n, np.int64),
            part.answers[:, None].astype(np.float32),
            rows=(first, first + n - 1),
            t=np.arange(first, first + n, dtype=np.int64) * 1_000_000,
        )
        alerts = [alert for result in results for alert in result.alerts]
        alarms += sum(a.state == "raised" and a.evidence.get("test") == "error" for a in alerts)
    return state, alarms


def _results(deviations: dict[tuple[str, str], Deviations], alarms: dict[str, tuple[int, int]]) -> list[Result]:
    results = []
    for data in dict.fromkeys(data for data, _ in deviations):
        seen = [each for (name, change), each in deviations.items() if name == data and change != CONCEPT_DRIFT]
        if all(DLE.called in each.by_estimator for each in seen):
            windows = sum(len(each.true) for each in seen)
            note = f"mean deviation from the true error over {windows:,} windows; reference: {DLE.called}"
            own, other = (100 * float(np.mean([each.mean(name) for each in seen])) for name in (OURS, DLE.called))
            results.append(Result(f"drift-errors, {data}", own, other, "per cent", 1.1, note, less=True))
    for data, (raised, windows) in alarms.items():
        note = f"{raised} alerts about the expected error in {windows:,} quiet windows of {SITES} sites"
        name = f"drift-errors, {data}: false alarms"
        results.append(Result.within(name, 1000 * raised / windows, 1.0, "per 1000 windows", note))
    return results


def _describe_alarms(alarms: dict[str, tuple[int, int]]) -> str:
    counts = (f"{raised} in {windows:,} windows of {data}" for data, (raised, windows) in alarms.items())
    return f"False alarms about the expected error on quiet data: {', '.join(counts)}."


def _render(deviations: dict[tuple[str, str], Deviations]) -> str:
    names = [OURS, DLE.called, MEAN]
    lines = [
        f"| held-out labels | change | true error | {' | '.join(names)} |",
        f"|---|---|---:|{'---:|' * len(names)}",
    ]
    for (data, change), each in deviations.items():
        cells = [f"{100 * each.mean(name):.1f}" if name in each.by_estimator else "–" for name in names]
        lines.append(f"| {data} | {change} | {np.mean(each.true):.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)

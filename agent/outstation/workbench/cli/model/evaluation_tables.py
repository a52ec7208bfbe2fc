"""Evaluation as tables in the terminal."""

from __future__ import annotations

import click

from outstation.foundation.cli.output import echo, echo_styled, print_table
from outstation.foundation.text import printable
from outstation.ml.performance.metrics import display_name
from outstation.workbench.evaluation import tables
from outstation.workbench.evaluation.document import Evaluation

_MAX_CLASSES = 40
_MAX_CONFUSION_CLASSES = 12
_MAX_SUSPECTS = 5
_STATE_COLORS = {"ok": "green", "warning": "yellow", "passed": "green", "failed": "red", "undecided": "yellow"}


def print_evaluation(evaluation: Evaluation) -> None:
    """Print tables, the most important first."""
    model, data, metric = evaluation.model, evaluation.data, display_name(evaluation.metric)
    echo(f"{model.title} ({model.kind}), signature: {model.signature}")
    groups = f", {data.groups} of {data.group}" if data.group else ""
    echo(f"{data.windows:,} windows of {data.rows:,} rows{groups}")
    _print_heading("Performance", evaluation.intervals)
    print_table(["", "value", "95 %", "n"], tables.metric_rows(evaluation), "nothing to measure")
    if evaluation.classes:
        _print_heading("By class")
        print_table(["", "recall", "precision", "F1", "n"], tables.class_rows(evaluation)[:_MAX_CLASSES], "")
    if 0 < len(evaluation.confusion) <= _MAX_CONFUSION_CLASSES:
        _print_heading("Confusion matrix", "a row for each true class, a column for each predicted one")
        labels = tables.confusion_labels(evaluation)
        counts = [[label, *counts] for label, counts in zip(labels, evaluation.confusion, strict=True)]
        print_table(["", *labels], counts, "")
    if evaluation.slices:
        _print_heading("Slices")
        head = ["", display_name(evaluation.slices[0].metric), "95 %", "n", ""]
        print_table(head, tables.slice_rows(evaluation), "")
    if evaluation.field_importance:
        _print_heading("Field importance", f"how much worse {metric} is with the field of another window")
        print_table(["", "worse by", "95 %"], tables.importance_rows(evaluation), "")
    if evaluation.robustness:
        _print_heading("Faults")
        faults = [(curve.fault, tables.format_curve(curve)) for curve in evaluation.robustness]
        print_table(["", f"{metric} at each strength"], faults, "")
    _print_attacks(evaluation)
    if evaluation.float_comparison is not None:
        _print_heading("Comparison with the float model")
        print_table(["", evaluation.float_comparison.file], tables.float_comparison_rows(evaluation), "")
    _print_data_checks(evaluation)
    _print_latency(evaluation)
    if evaluation.requirements:
        _print_heading("Requirements")
    for requirement in evaluation.requirements:
        state = click.style(requirement.state.ljust(11), fg=_STATE_COLORS[requirement.state])
        echo_styled(f"{state}  {printable(requirement.requirement)}: {printable(requirement.summary)}")
    for note in evaluation.notes:
        echo(note)
    for warning in evaluation.warnings:
        echo_styled(click.style("warning  ", fg="yellow") + printable(warning))


def _print_heading(title: str, more: str = "") -> None:
    echo_styled("\n" + click.style(printable(title), bold=True) + (f"  {printable(more)}" if more else ""))


def _print_data_checks(evaluation: Evaluation) -> None:
    _print_heading("Can the metrics be trusted?")
    for check in (*evaluation.leakage, *evaluation.label_checks):
        state = click.style(check.state.ljust(11), fg=_STATE_COLORS.get(check.state))
        echo_styled(f"{state}  {check.check}: {printable(check.summary)}")
    for suspect in evaluation.suspects[:_MAX_SUSPECTS]:
        echo(f"  {suspect.file} row {suspect.row}: {suspect.label}, or {suspect.predicted} ({suspect.score:.2f})?")


def _print_attacks(evaluation: Evaluation) -> None:
    result = evaluation.adversarial
    if result is None:
        return
    counts = [point.n for attack in result.attacks for point in attack.points] or [result.windows]
    windows = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    lead = f"share of answers that flip, of {windows} windows, in {result.invocations:,} invocations"
    _print_heading("Attacks on the input", lead)
    print_table(["", "flipped"], tables.attack_rows(evaluation), "Of too few windows to show.")
    _print_heading("Smallest change that flips an answer", f"{result.criterion}; searched without gradients")
    rows = tables.smallest_change_rows(evaluation, by_class=False)[:_MAX_CLASSES]
    print_table(["", "class", "median", "smallest", "n"], rows, "Of too few windows to show.")


def _print_latency(evaluation: Evaluation) -> None:
    if evaluation.latency:
        _print_heading("Latency", f"{evaluation.model.runtime}, {evaluation.machine}")
        comparison = evaluation.float_comparison
        other = {p.batch: p.p50_ms for p in comparison.latency} if comparison else {}
        rows = [
            [p.batch, p.p50_ms, p.p95_ms, round(p.per_second), p.memory_mib, *([other[p.batch]] if other else [])]
            for p in evaluation.latency
        ]
        more = ["float, ms (p50)"] if other else []
        print_table(["batch", "ms (p50)", "ms (p95)", "per second", "MiB", *more], rows, "")
        echo("")

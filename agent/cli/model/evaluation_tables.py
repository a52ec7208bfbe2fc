"""Evaluation as tables in the terminal."""

from __future__ import annotations

import click

from agent.cli.output import print_table
from agent.evaluation.document import Evaluation
from agent.evaluation.report import float_comparison_rows, format_estimate
from agent.performance.metrics import display_name
from agent.text import format_interval, format_value

_MAX_CLASSES = 40
_MAX_CONFUSION_CLASSES = 12
_MAX_SUSPECTS = 5
_SLICE_STATES = {"worse": "worse than the rest", "small": "too small to tell"}
_STATE_COLORS = {"ok": "green", "warning": "yellow"}


def print_evaluation(evaluation: Evaluation) -> None:
    """Print tables, the most important first."""
    model, data = evaluation.model, evaluation.data
    click.echo(f"{model.name} {model.version} ({model.kind}), signature: {model.signature}")
    groups = f", {data.groups} of {data.group}" if data.group else ""
    click.echo(f"{data.windows:,} windows of {data.rows:,} rows{groups}")
    _print_heading("Performance", evaluation.intervals)
    metrics = [
        [display_name(m.metric), format_value(m.value), format_interval(m.low, m.high), m.n] for m in evaluation.metrics
    ]
    print_table(["", "value", "95 %", "n"], metrics, "nothing to measure")
    _print_classes(evaluation)
    _print_confusion(evaluation)
    _print_slices(evaluation)
    _print_importance(evaluation)
    _print_robustness(evaluation)
    if evaluation.float_comparison is not None:
        _print_heading("Comparison with the float model")
        print_table(["", evaluation.float_comparison.file], float_comparison_rows(evaluation), "")
    _print_data_checks(evaluation)
    _print_latency(evaluation)
    for note in evaluation.notes:
        click.echo(note)
    for warning in evaluation.warnings:
        click.echo(click.style("warning  ", fg="yellow") + warning)


def _print_heading(title: str, more: str = "") -> None:
    click.echo("\n" + click.style(title, bold=True) + (f"  {more}" if more else ""))


def _print_classes(evaluation: Evaluation) -> None:
    if evaluation.classes:
        _print_heading("By class")
        rows = [
            [c.label, format_estimate(c.recall), format_estimate(c.precision), format_estimate(c.f1), c.n]
            for c in evaluation.classes[:_MAX_CLASSES]
        ]
        print_table(["", "recall", "precision", "F1", "n"], rows, "")


def _print_confusion(evaluation: Evaluation) -> None:
    labels = evaluation.model.labels if evaluation.model.kind == "classify" else ["normal", "anomaly"]
    if 0 < len(evaluation.confusion) <= _MAX_CONFUSION_CLASSES:
        _print_heading("Confusion matrix", "a row for each true class, a column for each predicted one")
        rows = [[label, *counts] for label, counts in zip(labels, evaluation.confusion, strict=True)]
        print_table(["", *labels], rows, "")


def _print_slices(evaluation: Evaluation) -> None:
    if evaluation.slices:
        _print_heading("Slices")
        rows = [
            [s.slice, format_value(s.value), format_interval(s.low, s.high), s.n, _SLICE_STATES.get(s.state or "", "")]
            for s in evaluation.slices
        ]
        print_table(["", display_name(evaluation.slices[0].metric), "95 %", "n", ""], rows, "")


def _print_importance(evaluation: Evaluation) -> None:
    if evaluation.field_importance:
        name = display_name(evaluation.metric)
        _print_heading("Field importance", f"how much worse {name} is with the field of another window")
        drops = [(", ".join(d.fields), d.metric_drop) for d in evaluation.field_importance]
        rows = [[names, format_value(d.value), format_interval(d.low, d.high)] for names, d in drops]
        print_table(["", "worse by", "95 %"], rows, "")


def _print_robustness(evaluation: Evaluation) -> None:
    if evaluation.robustness:
        _print_heading("Faults")
        rows = [
            [curve.fault, "  ".join(f"{point.strength}: {format_value(point.value.value)}" for point in curve.points)]
            for curve in evaluation.robustness
        ]
        print_table(["", f"{display_name(evaluation.metric)} at each strength"], rows, "")


def _print_data_checks(evaluation: Evaluation) -> None:
    _print_heading("Can the metrics be trusted?")
    for check in (*evaluation.leakage, *evaluation.label_checks):
        state = click.style(check.state.ljust(11), fg=_STATE_COLORS.get(check.state))
        click.echo(f"{state}  {check.check}: {check.summary}")
    for suspect in evaluation.suspects[:_MAX_SUSPECTS]:
        click.echo(
            f"  {suspect.file} row {suspect.row}: {suspect.label}, or {suspect.predicted} ({suspect.score:.2f})?"
        )


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
        click.echo("")

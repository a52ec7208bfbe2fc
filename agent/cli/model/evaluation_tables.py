"""An evaluation in the terminal."""

from __future__ import annotations

import click

from agent.cli.output import print_table
from agent.evaluation.document import Evaluation, IntervalEstimate
from agent.performance.metrics import MetricEstimate
from agent.text import format_interval, format_value, metric_name

_MAX_CLASSES = 40
_MAX_CONFUSION_CLASSES = 12
_MAX_SUSPECTS = 5


def print_evaluation(evaluation: Evaluation) -> None:
    """Tables, the most important first."""
    model, data = evaluation.model, evaluation.data
    click.echo(f"{model.name} {model.version} ({model.kind}), signature: {model.signature}")
    groups = f", {data.groups} of {data.group}" if data.group else ""
    click.echo(f"{data.windows:,} windows of {data.rows:,} rows{groups}")
    _print_heading("How good", evaluation.intervals)
    print_table(["", "value", "95 %", "n"], [_metric_row(m) for m in evaluation.metrics], "nothing to measure")
    _print_classes(evaluation)
    _print_confusion(evaluation)
    _print_slices(evaluation)
    _print_ablation(evaluation)
    _print_robustness(evaluation)
    _print_float_comparison(evaluation)
    _print_leakage(evaluation)
    _print_latency(evaluation)
    for note in evaluation.notes:
        click.echo(note)
    for warning in evaluation.warnings:
        click.echo(click.style("warning  ", fg="yellow") + warning)


def _print_heading(title: str, more: str = "") -> None:
    click.echo("\n" + click.style(title, bold=True) + (f"  {more}" if more else ""))


def _metric_row(metric: MetricEstimate) -> list[object]:
    return [metric_name(metric.metric), format_value(metric.value), format_interval(metric.low, metric.high), metric.n]


def _format_span(span: IntervalEstimate) -> str:
    return f"{format_value(span.value)} {format_interval(span.low, span.high)}".strip()


def _print_classes(evaluation: Evaluation) -> None:
    if not evaluation.classes:
        return
    _print_heading("By class")
    rows = [
        [c.label, _format_span(c.recall), _format_span(c.precision), _format_span(c.f1), c.n]
        for c in evaluation.classes[:_MAX_CLASSES]
    ]
    print_table(["", "recall", "precision", "F1", "n"], rows, "")


def _print_confusion(evaluation: Evaluation) -> None:
    labels = evaluation.model.labels if evaluation.model.kind == "classify" else ["normal", "anomaly"]
    if not 0 < len(evaluation.confusion) <= _MAX_CONFUSION_CLASSES:
        return
    _print_heading("Confusion", "a row for what was true, a column for what was said")
    print_table(["", *labels], [[label, *row] for label, row in zip(labels, evaluation.confusion, strict=True)], "")


def _print_slices(evaluation: Evaluation) -> None:
    if evaluation.slices:
        _print_heading("Slices")
        rows = [
            [s.slice, format_value(s.value), format_interval(s.low, s.high), s.n, _describe_slice_state(s.state)]
            for s in evaluation.slices
        ]
        print_table(["", metric_name(evaluation.slices[0].metric), "95 %", "n", ""], rows, "")


def _describe_slice_state(state: str | None) -> str:
    return {"worse": "worse than the rest", "small": "too small to tell"}.get(state or "", "")


def _print_ablation(evaluation: Evaluation) -> None:
    if evaluation.ablation:
        _print_heading(
            "What each field is worth",
            f"how much worse {metric_name(evaluation.metric)} is where it is another window's",
        )
        rows = [
            [", ".join(d.fields), format_value(d.drop.value), format_interval(d.drop.low, d.drop.high)]
            for d in evaluation.ablation
        ]
        print_table(["", "worse by", "95 %"], rows, "")


def _print_robustness(evaluation: Evaluation) -> None:
    if evaluation.robustness:
        _print_heading("Faults")
        told = [
            "  ".join(f"{p.strength}: {format_value(p.value.value)}" for p in fault.points)
            for fault in evaluation.robustness
        ]
        rows = [[fault.fault, points] for fault, points in zip(evaluation.robustness, told, strict=True)]
        print_table(["", f"{metric_name(evaluation.metric)} at each strength"], rows, "")


def _print_float_comparison(evaluation: Evaluation) -> None:
    if (other := evaluation.against) is not None:
        _print_heading("Beside the float model")
        agreement = [["says the same", _format_span(other.agreement)]] if other.agreement else []
        name = metric_name(evaluation.metric)
        rows = [
            *agreement,
            ["outputs differ by", f"{format_value(other.mean)} on average, {format_value(other.largest)} at most"],
            [f"{name} of the float model", _format_span(other.value)],
            [f"{name} of this model less that", _format_span(other.change)],
            ["bytes", f"{evaluation.model.bytes:,} of {other.bytes:,}"],
        ]
        print_table(["", other.file], rows, "")


def _print_leakage(evaluation: Evaluation) -> None:
    _print_heading("Can the figures be believed")
    for one in (*evaluation.leakage, *evaluation.hints):
        color = {"ok": "green", "warning": "yellow"}.get(one.state)
        click.echo(f"{click.style(one.state.ljust(11), fg=color)}  {one.check}: {one.summary}")
    for suspect in evaluation.suspects[:_MAX_SUSPECTS]:
        click.echo(f"  {suspect.file} row {suspect.row}: {suspect.label}, or {suspect.said} ({suspect.score:.2f})?")


def _print_latency(evaluation: Evaluation) -> None:
    if evaluation.latency:
        _print_heading("How fast", f"{evaluation.model.runtime}, {evaluation.machine}")
        other = {p.batch: p.p50_ms for p in evaluation.against.latency} if evaluation.against else {}
        rows = [
            [p.batch, p.p50_ms, p.p95_ms, round(p.per_second), p.memory_mib, *([other[p.batch]] if other else [])]
            for p in evaluation.latency
        ]
        more = ["float, ms (p50)"] if other else []
        print_table(["batch", "ms (p50)", "ms (p95)", "a second", "MiB", *more], rows, "")
        click.echo("")

"""An evaluation in the terminal."""

from __future__ import annotations

import click

from agent.cli.output import table
from agent.evaluation.document import Evaluation, Span
from agent.performance.metrics import Metric
from agent.text import figure, interval, metric_name

_MOST_CLASSES = 40
_WIDEST_CONFUSION = 12
_SUSPECTS = 5


def show(found: Evaluation) -> None:
    """Tables, the most important first."""
    model, data = found.model, found.data
    click.echo(f"{model.name} {model.version} ({model.kind}), signature: {model.signature}")
    groups = f", {data.groups} of {data.group}" if data.group else ""
    click.echo(f"{data.windows:,} windows of {data.rows:,} rows{groups}")
    _head("How good", found.intervals)
    table(["", "value", "95 %", "n"], [_metric(m) for m in found.metrics], "nothing to measure")
    _classes(found)
    _confusion(found)
    _slices(found)
    _ablation(found)
    _robustness(found)
    _against(found)
    _leakage(found)
    _latency(found)
    for note in found.notes:
        click.echo(note)
    for warning in found.warnings:
        click.echo(click.style("warning  ", fg="yellow") + warning)


def _head(title: str, more: str = "") -> None:
    click.echo("\n" + click.style(title, bold=True) + (f"  {more}" if more else ""))


def _metric(one: Metric) -> list[object]:
    return [metric_name(one.metric), figure(one.value), interval(one.low, one.high), one.n]


def _span(one: Span) -> str:
    return f"{figure(one.value)} {interval(one.low, one.high)}".strip()


def _classes(found: Evaluation) -> None:
    if not found.classes:
        return
    _head("By class")
    rows = [[c.label, _span(c.recall), _span(c.precision), _span(c.f1), c.n] for c in found.classes[:_MOST_CLASSES]]
    table(["", "recall", "precision", "F1", "n"], rows, "")


def _confusion(found: Evaluation) -> None:
    labels = found.model.labels if found.model.kind == "classify" else ["normal", "anomaly"]
    if not 0 < len(found.confusion) <= _WIDEST_CONFUSION:
        return
    _head("Confusion", "a row for what was true, a column for what was said")
    table(["", *labels], [[label, *row] for label, row in zip(labels, found.confusion, strict=True)], "")


def _slices(found: Evaluation) -> None:
    if found.slices:
        _head("Slices")
        rows = [[s.slice, figure(s.value), interval(s.low, s.high), s.n, _state(s.state)] for s in found.slices]
        table(["", metric_name(found.slices[0].metric), "95 %", "n", ""], rows, "")


def _state(state: str | None) -> str:
    return {"worse": "worse than the rest", "small": "too small to tell"}.get(state or "", "")


def _ablation(found: Evaluation) -> None:
    if found.ablation:
        _head("What each field is worth", f"how much worse {metric_name(found.metric)} is where it is another window's")
        rows = [[", ".join(d.fields), figure(d.drop.value), interval(d.drop.low, d.drop.high)] for d in found.ablation]
        table(["", "worse by", "95 %"], rows, "")


def _robustness(found: Evaluation) -> None:
    if found.robustness:
        _head("Faults")
        told = ["  ".join(f"{p.strength}: {figure(p.value.value)}" for p in fault.points) for fault in found.robustness]
        rows = [[fault.fault, points] for fault, points in zip(found.robustness, told, strict=True)]
        table(["", f"{metric_name(found.metric)} at each strength"], rows, "")


def _against(found: Evaluation) -> None:
    if (other := found.against) is not None:
        _head("Beside the float model")
        agreement = [["says the same", _span(other.agreement)]] if other.agreement else []
        name = metric_name(found.metric)
        rows = [
            *agreement,
            ["outputs differ by", f"{figure(other.mean)} on average, {figure(other.largest)} at most"],
            [f"{name} of the float model", _span(other.value)],
            [f"{name} of this model less that", _span(other.change)],
            ["bytes", f"{found.model.bytes:,} of {other.bytes:,}"],
        ]
        table(["", other.file], rows, "")


def _leakage(found: Evaluation) -> None:
    _head("Can the figures be believed")
    for one in (*found.leakage, *found.hints):
        color = {"ok": "green", "warning": "yellow"}.get(one.state)
        click.echo(f"{click.style(one.state.ljust(11), fg=color)}  {one.check}: {one.summary}")
    for suspect in found.suspects[:_SUSPECTS]:
        click.echo(f"  {suspect.file} row {suspect.row}: {suspect.label}, or {suspect.said} ({suspect.score:.2f})?")


def _latency(found: Evaluation) -> None:
    if found.latency:
        _head("How fast", f"{found.model.runtime}, {found.machine}")
        other = {p.batch: p.p50_ms for p in found.against.latency} if found.against else {}
        rows = [
            [p.batch, p.p50_ms, p.p95_ms, round(p.per_second), p.memory_mib, *([other[p.batch]] if other else [])]
            for p in found.latency
        ]
        more = ["float, ms (p50)"] if other else []
        table(["batch", "ms (p50)", "ms (p95)", "a second", "MiB", *more], rows, "")
        click.echo("")

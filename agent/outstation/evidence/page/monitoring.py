"""Views of monitoring: notes on the drift of a task, and accuracy by task with its labels."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from outstation.evidence.format.contents import AccuracyEntry
from outstation.evidence.gather.accuracy import select_headline
from outstation.evidence.gather.gather import EvidenceFacts
from outstation.evidence.page.charts import draw_accuracy_forest
from outstation.evidence.page.formats import format_count, format_duration
from outstation.foundation.text import list_names
from outstation.ml.performance.metrics import display_name

_MAX_CHARTED = 20
_SOURCE_NAMES = {
    "human": "people",
    "system": "other systems",
    "model": "the model itself (not counted)",
    "verdict": "verdicts of people who saw the answer (not counted)",
}


def list_drift_notes(task: dict[str, Any]) -> list[str]:
    drifting = task["devices_in_drift"]
    notes = [
        f"{format_count(task['windows'], 'summary', 'summaries')} of {format_count(task['devices'], 'device')}; "
        f"{task['sensor_fault_windows']:,} with a sensor fault.",
        f"In drift by the latest summary: {list_names(drifting)}." if drifting else "No device is in drift now.",
    ]
    for name, known in {"": task, **task.get("expected_outputs", {})}.items():
        subject = f" of output {name}" if name else ""
        if known["expected_accuracy"] is not None:
            notes.append(f"Expected accuracy{subject} without labels: {known['expected_accuracy']:.3f}.")
        if known.get("expected_error") is not None:
            notes.append(f"Expected mean absolute error{subject} without labels: {known['expected_error']:.4g}.")
    if omitted := task.get("outputs_omitted"):
        notes.append(f"{format_count(omitted, 'report')} of more outputs than a model may have, only counted.")
    return notes + [change["summary"] for change in task["fleet_wide"][:3]]


def group_accuracy(facts: EvidenceFacts) -> list[dict[str, Any]]:
    """Return the entries of each task and output, with a chart of the headline metric."""
    groups: dict[str, list[AccuracyEntry]] = {}
    for entry in facts.accuracy:
        name = f"{entry.task}, output {entry.output}" if entry.output else entry.task
        groups.setdefault(name, []).append(entry)
    rows = []
    for task, entries in groups.items():
        measured = [(entry, metric) for entry in entries if (metric := select_headline(entry)) is not None]
        name = display_name(measured[0][1].metric) if measured else "no metric yet"
        chart = draw_accuracy_forest(measured[:_MAX_CHARTED], f"{task}: {name} by device") if measured else ""
        devices = len({entry.device for entry in entries})
        row = {"task": task, "entries": entries, "measured": measured, "metric": name, "devices": devices}
        rows.append(row | {"chart": Markup(chart)})
    return rows


def format_label_sources(entry: AccuracyEntry) -> str:
    return ", ".join(f"{n:,} by {_SOURCE_NAMES.get(source, source)}" for source, n in entry.labels.items()) or "unknown"


def format_coverage(entry: AccuracyEntry) -> str:
    """Return the share of results with a label, the labels' delay, and the labels that do not count."""
    counts, parts = entry.label_coverage, []
    if isinstance(coverage := counts.get("coverage"), int | float):
        parts.append(f"{coverage:.0%} of results")
    delay = counts.get("delay_s")
    if isinstance(delay, dict) and isinstance(median := delay.get("median"), int | float):
        parts.append(f"median delay {format_duration(median)}")
    for name in ("replaced", "late", "unmatched"):
        if isinstance(n := counts.get(name), int) and n:
            parts.append(f"{n:,} {name}")
    return ", ".join(parts)

"""The page's chapters on how it went: incidents, drift, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from agent.fleet.evidence.contents import Incident
from agent.fleet.evidence.gather.accuracy import headline
from agent.fleet.evidence.gather.gather import Facts
from agent.fleet.evidence.page import pictures
from agent.fleet.evidence.page.elements import badge, chapter, details, link, more, nowrap, stacked
from agent.fleet.evidence.page.words import count, epoch, few, moment, span
from agent.render import html
from agent.render.html import Content, Markup, element, table
from agent.text import figure, interval, metric_name

_ROWS = 25
_STATES = {"open": ("goes on", "bad"), "over": ("over", "ok"), "unknown": ("end unknown", "none")}


def incidents(facts: Facts) -> Markup:
    counts = facts.incident_counts
    total, open_now = sum(counts.values()), sum(n for (_, state), n in counts.items() if state == "open")
    lead = "Alerts, from the moment a device raised one to the moment it cleared it. Times are the device's own, UTC."
    if not total:
        text = "No alert was raised in the time that is told of."
        said = text if facts.messages else "Nothing was collected, so it is not known whether there were any."
        return chapter("incidents", "Incidents", lead, element("p", said))
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in facts.incident_kinds.most_common())
    said = f"{count(total, 'incident')} in all ({kinds}); {open_now:,} {'goes' if open_now == 1 else 'go'} on."
    rows: list[Sequence[Content]] = [_incident(one) for one in facts.incidents[:_ROWS]]
    head = ["", "Began", "Lasted", "Where", "What"]
    picture = pictures.lanes(facts.incidents, epoch(facts.span.first) or 0, epoch(facts.at) or 1)
    key = "red: critical; orange: warning; grey: information. A bar to the right edge goes on."
    shown = [element("div", Markup(picture), element("p", key, kind="muted"), kind="card chart")] if picture else []
    rest = more(len(facts.incidents) - _ROWS, "incidents.json")
    if total > len(facts.incidents):
        counted = f"{total - len(facts.incidents):,} others, none of them worse than these, are counted only."
        rest.append(element("p", counted, kind="muted"))
    unsure = sum(one.clock == "unsynced" for one in facts.incidents)
    notes = []
    if unsure:
        text = f"{count(unsure, 'incident')} began or ended while the device's clock was not set: how long is unsure."
        notes = [element("p", text, kind="muted")]
    for_sheets = element("p", "For a spreadsheet: ", link("incidents.csv"), ".", kind="muted")
    parts = [*shown, stacked(table(head, rows), "incidents"), *rest, *notes, for_sheets]
    return chapter("incidents", "Incidents", lead, element("p", said), *parts)


def _incident(one: Incident) -> list[Content]:
    word, kind = _STATES[one.state]
    kind = "warning" if kind == "bad" and one.severity != "critical" else kind
    where = f"{one.device or 'the fleet'}" + (f", {one.task}" if one.task else "")
    lasted = span(one.seconds) + (" so far" if one.state == "open" else "")
    tail = "" if one.source == "device" else " (noticed by the collector; not signed)"
    what = Markup(f"<b>{escape(one.severity)}, {escape(one.alert)}.</b> {escape(one.summary + tail)}")
    return [
        badge(word, kind),
        nowrap(moment(one.began)),
        nowrap(lasted if one.seconds is not None else "–"),
        where,
        what,
    ]


def drift(facts: Facts) -> Markup:
    lead = (
        "Whether sites still look like what the models know. Counted by the collector from the drift summaries that "
        "devices signed; the summaries stay in its database, the alerts that came of them are here."
    )
    tasks = facts.drift["tasks"]
    if not tasks:
        return chapter("drift", "Drift", lead, element("p", "No drift summary was collected: drift was not watched."))
    cards = [_drift_card(one) for one in tasks[:_ROWS]]
    unread = facts.drift["windows_unreadable"]
    notes = [element("p", f"{unread:,} summaries could not be read and are left out.", kind="notice")] if unread else []
    return chapter("drift", "Drift", lead, element("div", *cards, kind="grid"), *notes)


def _drift_card(one: dict[str, Any]) -> Markup:
    apart = " (devices with another reference than most)" if one["apart"] else ""
    now, moved = one["devices_in_drift"], one["moved"]
    lines = [
        f"{count(one['windows'], 'summary', 'summaries')} of {count(one['devices'], 'device')}; "
        f"{one['windows_with_a_sensor_fault']:,} with a sensor fault.",
        f"In drift by the last summary: {few(now)}." if now else "No device is in drift by its last summary.",
    ]
    if one["expected_accuracy"] is not None:
        lines.append(f"Accuracy that the models' own scores lead one to expect: {one['expected_accuracy']:.3f}.")
    lines += [wide["summary"] for wide in one["wide"][:3]]
    rows: list[Sequence[Content]] = [
        [e["device"], e["field"], moment(e["alarmed"]), moment(e["ended"]) if e["ended"] else "goes on"]
        for e in moved[:8]
    ]
    listed = [table(["Device", "Field", "Noticed", "Until"], rows)] if rows else []
    rest = more(len(moved) + one["moved_left_out"] - 8, "drift.json")
    picture = pictures.strip(one["history"], one["devices"])
    key = element("p", "orange: devices in drift; red: with a sensor fault", kind="muted")
    return html.card(one["task"] + apart, "", picture, key, html.bullets(lines, "notes"), *listed, *rest)


def accuracy(facts: Facts) -> Markup:
    lead = (
        "What labels from the sites say of the models' answers, with 95 % intervals. Without labels nothing is known."
    )
    if not facts.measured:
        text = (
            "No labels came: how often the models were right in operation was not measured. Evaluations before use are "
            "with the models above."
        )
        return chapter("accuracy", "Accuracy and labels", lead, element("p", text, kind="notice"))
    by_task: dict[str, list[Any]] = {}
    for one in facts.measured:
        by_task.setdefault(one.task, []).append((one, headline(one)))
    cards = []
    for task, those in by_task.items():
        told = [(one, metric) for one, metric in those if metric is not None and metric.value is not None]
        name = metric_name(told[0][1].metric) if told else "no metric yet"
        picture = pictures.accuracies(told[:20], f"{task}: {name} by device") if told else ""
        cards.append(html.card(f"{task}: {name}", _worst(told, those), picture))
    rows: list[Sequence[Content]] = [
        [
            one.device,
            one.task,
            "–" if metric is None else f"{metric_name(metric.metric)} {figure(metric.value)}",
            "" if metric is None else interval(metric.low, metric.high),
            _labels(one.labels),
            _labelling(one.labelling),
            moment(one.time) if one.time else "–",
        ]
        for those in by_task.values()
        for one, metric in those[:_ROWS]
    ]
    head = ["Device", "Task", "Figure", "95 % interval", "Labels", "How they came", "As of"]
    listed = details("Labels and figures by device", stacked(table(head, rows), "labelled"))
    return chapter("accuracy", "Accuracy and labels", lead, element("div", *cards, kind="grid"), listed)


def _worst(told: Sequence[Any], those: Sequence[Any]) -> str:
    devices = count(len({one.device for one, _ in those}), "device")
    return f"{devices} with labels" + (", the worst first" if len(told) > 1 else "")


def _labels(labels: dict[str, int]) -> str:
    names = {"human": "people", "system": "other systems", "model": "the model itself (not counted)"}
    return ", ".join(f"{n:,} by {names.get(source, source)}" for source, n in labels.items()) or "not told"


def _labelling(told: dict[str, Any]) -> str:
    parts = []
    if isinstance(coverage := told.get("coverage"), int | float):
        parts.append(f"for {coverage:.0%} of results")
    delay = told.get("delay_s")
    if isinstance(delay, dict) and isinstance(median := delay.get("median"), int | float):
        parts.append(f"after {span(median)} in the middle")
    for name in ("replaced", "late", "unmatched"):
        if isinstance(n := told.get(name), int) and n:
            parts.append(f"{n:,} {name}")
    return ", ".join(parts)

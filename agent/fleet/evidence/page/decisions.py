"""Chapters on decisions: each roll-out as a timeline with its comparisons, and all decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.fleet.evidence.format.contents import BundleComparison, DecisionRecord
from agent.fleet.evidence.gather.gather import EvidenceFacts
from agent.fleet.evidence.page.elements import (
    badge,
    chapter,
    details,
    format_count,
    format_time,
    nowrap,
    overflow_link,
    stacked_table,
    timeline,
)
from agent.render.html import Content, Markup, element, table
from agent.render.svg import html_text

_MAX_ROWS = 25
# Per roll-out: operators' decisions, and departures of devices from the plan.
_MAX_STEPS, _MAX_DEPARTURES = 40, 30
_STATE_BADGES = {"finished": "ok", "aborted": "bad", "running": "warning", "paused": "warning"}
_PHASE_TEXTS = {
    "not_selected": "not selected",
    "downloading": "downloading it",
    "rejected": "rejected it",
    "shadow": "evaluating it in shadow",
    "canary": "running it as a canary",
    "active": "run it",
    "rolled_back": "rolled it back",
    "cancelled": "cancelled it",
}
_DEPARTURE_PHASES = frozenset({"rejected", "rolled_back"})


def render_rollouts(facts: EvidenceFacts) -> Markup:
    lead = "How new models reached devices, step by step, with the numbers behind each decision."
    records: dict[str, list[DecisionRecord]] = {}
    for decision in facts.decisions:
        if decision.rollout:
            records.setdefault(decision.rollout, []).append(decision)
    rows = {row["rollout"]: row for row in facts.rollouts}
    started = {name: decisions[0].time for name, decisions in records.items()}
    started |= {name: str(row["started"]) for name, row in rows.items()}
    newest_first = sorted(started, key=lambda name: started[name], reverse=True)
    if not newest_first:
        text = "No model was rolled out."
        text += " Each device runs the models in its configuration." if facts.running_tasks else ""
        return chapter("rollouts", "Roll-outs", lead, element("p", text))
    cards = [_rollout_card(name, rows.get(name), records.get(name, []), facts) for name in newest_first[:_MAX_ROWS]]
    rest = overflow_link(len(newest_first) - _MAX_ROWS, "decisions.jsonl", "more roll-outs")
    return chapter("rollouts", "Roll-outs", lead, *cards, *rest)


def _rollout_card(name: str, row: dict[str, Any] | None, records: list[DecisionRecord], facts: EvidenceFacts) -> Markup:
    state = str(row["state"]) if row else "reported by devices only"
    title = Markup(f"<h3>{html_text(name)} {badge(state, _STATE_BADGES.get(state, 'none')).html}</h3>")
    lead = []
    if row:
        text = f"{row['bundle']} {row['version']} for task {row['task']}, started {format_time(row['started'])}."
        lead.append(element("p", text, css_class="muted"))
    phases = [count for count in facts.phase_counts if count["rollout"] == name]
    phases = sorted(phases, key=lambda count: -count["devices"])[:_MAX_DEPARTURES]
    if phases:
        texts = [
            f"{format_count(count['devices'], 'device')} {_PHASE_TEXTS.get(count['phase'], count['phase'])}"
            + (f" ({count['reason']})" if count["reason"] else "")
            for count in phases
        ]
        lead.append(element("p", f"Latest reports: {'; '.join(texts)}."))
    steps = [record for record in records if record.payload is not None][-_MAX_STEPS:]
    # Of the devices' own actions, only departures from the plan are listed.
    steps += [record for record in records if record.phase in _DEPARTURE_PHASES][:_MAX_DEPARTURES]
    steps = sorted(steps or records[:_MAX_DEPARTURES], key=lambda record: record.time)
    entries, shown = timeline(steps, _MAX_STEPS + _MAX_DEPARTURES)
    comparisons = _comparison_table([pair for pair in facts.comparisons if pair.rollout == name])
    rest = overflow_link(len(records) - shown, "decisions.jsonl")
    return element("div", title, *lead, entries, *comparisons, *rest, css_class="card")


def _comparison_table(comparisons: list[BundleComparison]) -> list[Markup]:
    if not comparisons:
        return []
    names = ("agreement", "latency_ratio", "accuracy_gain", "estimated_accuracy_gain")
    rows: list[Sequence[Content]] = [
        [
            pair.device,
            "in shadow" if pair.new_is_shadow else "active",
            f"{pair.windows:,}",
            *(_metric_cell(pair, name) for name in names),
        ]
        for pair in comparisons[:_MAX_ROWS]
    ]
    head = ["Device", "New model", "Windows", "Agreement", "Latency ratio", "Accuracy gain", "Expected gain"]
    lead = (
        "Computed from signed messages in this folder, with 95 % intervals; “–” means too few messages. Agreement is "
        "the share of windows with the same answer. Latency ratio is the new model's time per window divided by the "
        "old one's. Accuracy gain compares both with labels; expected gain uses the models' own scores."
    )
    shown = stacked_table(table(head, rows, (2,)), "compared")
    rest = overflow_link(len(comparisons) - _MAX_ROWS, "comparisons.json")
    title = f"New model against the old one ({format_count(len(comparisons), 'device')})"
    return [details(title, element("p", lead, css_class="muted"), shown, *rest)]


def _metric_cell(comparison: BundleComparison, name: str) -> Content:
    metric = next((metric for metric in comparison.metrics if metric.name == name), None)
    if metric is None or metric.value is None or metric.low is None or metric.high is None:
        return "–"
    if name == "latency_ratio":
        return nowrap(f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]")
    value, low, high = (100 * number for number in (metric.value, metric.low, metric.high))
    sign = "" if name == "agreement" else "+"
    return nowrap(f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]")


def render_decisions(facts: EvidenceFacts) -> Markup:
    lead = "All changes and who made them, newest first. The device or an operator signed each one."
    if not facts.decisions:
        return chapter("decisions", "Decisions", lead, element("p", "Nothing was changed in this period."))
    # The roll-out chapter covers what devices did as planned.
    listed = [record for record in facts.decisions if not record.phase or record.phase in _DEPARTURE_PHASES]
    entries, shown = timeline(list(reversed(listed)), _MAX_ROWS)
    kinds = ", ".join(f"{n:,} {event}" for event, n in facts.event_counts.most_common(8))
    operational = ", ".join(f"{n:,} × {event}" for event, n in sorted(facts.operational_events.items()))
    notes = [element("p", f"Devices also recorded: {operational}.", css_class="muted")] if operational else []
    rest = overflow_link(len(facts.decisions) - shown, "decisions.jsonl")
    return chapter("decisions", "Decisions", lead, element("p", f"By kind: {kinds}."), entries, *rest, *notes)

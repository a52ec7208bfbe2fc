"""The page's chapters on who decided what: roll-outs as timelines, and all decisions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
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

_MAX_ROWS = 25
# Of one roll-out: what operators decided, and what devices did otherwise than planned.
_MAX_STEPS, _MAX_DEPARTURES = 40, 30
_STATE_BADGES = {"finished": "ok", "aborted": "bad", "running": "warning", "paused": "warning"}
_PHASE_TEXTS = {
    "not chosen": "not chosen for it",
    "fetching": "fetching it",
    "refused": "refused it",
    "shadow": "trying it beside the old model",
    "probation": "running it on probation",
    "settled": "run it for good",
    "rolled back": "took it back",
    "withdrawn": "left it, as told",
}
_DEPARTURE_PHASES = frozenset({"refused", "rolled back"})


def render_rollouts(facts: EvidenceFacts) -> Markup:
    lead = "How new models came to devices: step by step, each with the numbers it was decided on."
    named: dict[str, list[DecisionRecord]] = {}
    for one in facts.decisions:
        if one.rollout:
            named.setdefault(one.rollout, []).append(one)
    known = {row["rollout"]: row for row in facts.rollouts}
    # The newest first.
    order = sorted({*named, *known}, key=lambda name: _start_time(name, known, named), reverse=True)
    if not order:
        text = "No model was rolled out."
        text += " What runs was put there by each device's configuration." if facts.running_tasks else ""
        return chapter("rollouts", "Roll-outs", lead, element("p", text))
    cards = [_rollout_card(name, known.get(name), named.get(name, []), facts) for name in order[:_MAX_ROWS]]
    return chapter(
        "rollouts",
        "Roll-outs",
        lead,
        *cards,
        *overflow_link(len(order) - _MAX_ROWS, "decisions.jsonl", "roll-outs more"),
    )


def _start_time(
    name: str, rows_by_name: dict[str, dict[str, Any]], decisions_by_name: dict[str, list[DecisionRecord]]
) -> str:
    return str(rows_by_name[name]["started"]) if name in rows_by_name else decisions_by_name[name][0].time


def _rollout_card(name: str, row: dict[str, Any] | None, records: list[DecisionRecord], facts: EvidenceFacts) -> Markup:
    state = str(row["state"]) if row else "told by devices only"
    what = (
        f"{row['bundle']} {row['version']} for task {row['task']}, started {format_time(row['started'])}."
        if row
        else ""
    )
    title = Markup(f"<h3>{escape(name)} {badge(state, _STATE_BADGES.get(state, 'none')).html}</h3>")
    phases = [one for one in facts.phase_counts if one["rollout"] == name]
    phases = sorted(phases, key=lambda one: -one["devices"])[:_MAX_DEPARTURES]
    ended = "; ".join(
        f"{format_count(p['devices'], 'device')} {_PHASE_TEXTS.get(p['phase'], p['phase'])}"
        + (f" ({p['reason']})" if p["reason"] else "")
        for p in phases
    )
    now = [element("p", f"By their last word: {ended}.")] if ended else []
    steps = [one for one in records if one.payload is not None][-_MAX_STEPS:]
    # Of what devices did by themselves, what departs from the plan is worth a line.
    steps += [one for one in records if one.phase in _DEPARTURE_PHASES][:_MAX_DEPARTURES]
    steps = sorted(steps or records[:_MAX_DEPARTURES], key=lambda one: one.time)
    lead = [element("p", what, css_class="muted")] if what else []
    shown, entered = timeline(steps, _MAX_STEPS + _MAX_DEPARTURES)
    compared = _comparison_table([one for one in facts.comparisons if one.rollout == name])
    return element(
        "div",
        title,
        *lead,
        *now,
        shown,
        *compared,
        *overflow_link(len(records) - entered, "decisions.jsonl"),
        css_class="card",
    )


def _comparison_table(comparisons: list[BundleComparison]) -> list[Markup]:
    """What devices measured of the new model against the old one, as they signed it."""
    if not comparisons:
        return []
    rows: list[Sequence[Content]] = [
        [
            one.device,
            "tried beside" if one.new_is_beside else "in charge",
            f"{one.windows:,}",
            *(_metric_cell(one, name) for name in ("agreement", "time", "accuracy by labels", "expected accuracy")),
        ]
        for one in comparisons[:_MAX_ROWS]
    ]
    head = ["Device", "New one", "Windows", "Alike", "Time", "By labels", "Expected"]
    lead = (
        "Counted from messages in this folder that each device signed, with 95 % intervals; “–”: too few to tell. "
        "Alike: windows that both answered alike. Time: of the new one, as a multiple of the old one's. By labels and "
        "expected: accuracy of the new one, less the old one's."
    )
    shown = stacked_table(table(head, rows, (2,)), "compared")
    rest = overflow_link(len(comparisons) - _MAX_ROWS, "comparisons.json")
    return [
        details(
            f"Old and new compared, device by device ({len(comparisons):,})",
            element("p", lead, css_class="muted"),
            shown,
            *rest,
        )
    ]


def _metric_cell(comparison: BundleComparison, name: str) -> Content:
    found = next((figure for figure in comparison.figures if figure.name == name), None)
    if found is None or found.value is None or found.low is None or found.high is None:
        return "–"
    if name == "time":
        return nowrap(f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]")
    value, low, high = (100 * one for one in (found.value, found.low, found.high))
    sign = "" if name == "agreement" else "+"
    return nowrap(f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]")


def render_decisions(facts: EvidenceFacts) -> Markup:
    lead = "What was changed, by whom, newest first. Each is signed: by the device it happened on, or by an operator."
    if not facts.decisions:
        return chapter("decisions", "Decisions", lead, element("p", "Nothing was changed in the time that is told of."))
    # What devices did in a roll-out as it was planned stands there.
    listed = [one for one in facts.decisions if not one.phase or one.phase in _DEPARTURE_PHASES]
    shown, entered = timeline(list(reversed(listed)), _MAX_ROWS)
    kinds = ", ".join(f"{n:,} {event}" for event, n in facts.event_counts.most_common(8))
    happened = ", ".join(f"{n:,} × {event}" for event, n in sorted(facts.operational_events.items()))
    also = [element("p", f"Besides, devices recorded: {happened}.", css_class="muted")] if happened else []
    rest = overflow_link(len(facts.decisions) - entered, "decisions.jsonl")
    return chapter("decisions", "Decisions", lead, element("p", f"In all: {kinds}."), shown, *rest, *also)

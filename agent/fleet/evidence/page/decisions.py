"""The page's chapters on who decided what: roll-outs as timelines, and all decisions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from agent.fleet.evidence.contents import Compared, Decision
from agent.fleet.evidence.gather.gather import Facts
from agent.fleet.evidence.page.elements import badge, chapter, details, more, nowrap, stacked, timeline
from agent.fleet.evidence.page.words import count, moment
from agent.render.html import Content, Markup, element, table

_ROWS = 25
# Of one roll-out: what operators decided, and what devices did otherwise than planned.
_STEPS, _DEPARTURES = 40, 30
_STATES = {"finished": "ok", "aborted": "bad", "running": "warning", "paused": "warning"}
_PHASES = {
    "not chosen": "not chosen for it",
    "fetching": "fetching it",
    "refused": "refused it",
    "shadow": "trying it beside the old model",
    "probation": "running it on probation",
    "settled": "run it for good",
    "rolled back": "took it back",
    "withdrawn": "left it, as told",
}
_DEPARTS = frozenset({"refused", "rolled back"})


def rollouts(facts: Facts) -> Markup:
    lead = "How new models came to devices: step by step, each with the numbers it was decided on."
    named: dict[str, list[Decision]] = {}
    for one in facts.decisions:
        if one.rollout:
            named.setdefault(one.rollout, []).append(one)
    known = {row["rollout"]: row for row in facts.rollouts}
    # The newest first.
    order = sorted({*named, *known}, key=lambda name: _began(name, known, named), reverse=True)
    if not order:
        text = "No model was rolled out."
        text += " What runs was put there by each device's configuration." if facts.running else ""
        return chapter("rollouts", "Roll-outs", lead, element("p", text))
    cards = [_rollout(name, known.get(name), named.get(name, []), facts) for name in order[:_ROWS]]
    return chapter(
        "rollouts", "Roll-outs", lead, *cards, *more(len(order) - _ROWS, "decisions.jsonl", "roll-outs more")
    )


def _began(name: str, known: dict[str, dict[str, Any]], named: dict[str, list[Decision]]) -> str:
    return str(known[name]["started"]) if name in known else named[name][0].time


def _rollout(name: str, row: dict[str, Any] | None, told: list[Decision], facts: Facts) -> Markup:
    state = str(row["state"]) if row else "told by devices only"
    what = f"{row['bundle']} {row['version']} for task {row['task']}, started {moment(row['started'])}." if row else ""
    title = Markup(f"<h3>{escape(name)} {badge(state, _STATES.get(state, 'none')).html}</h3>")
    phases = [one for one in facts.phases if one["rollout"] == name]
    phases = sorted(phases, key=lambda one: -one["devices"])[:_DEPARTURES]
    ended = "; ".join(
        f"{count(p['devices'], 'device')} {_PHASES.get(p['phase'], p['phase'])}"
        + (f" ({p['reason']})" if p["reason"] else "")
        for p in phases
    )
    now = [element("p", f"By their last word: {ended}.")] if ended else []
    steps = [one for one in told if one.payload is not None][-_STEPS:]
    # Of what devices did by themselves, what departs from the plan is worth a line.
    steps += [one for one in told if one.phase in _DEPARTS][:_DEPARTURES]
    steps = sorted(steps or told[:_DEPARTURES], key=lambda one: one.time)
    lead = [element("p", what, kind="muted")] if what else []
    shown, entered = timeline(steps, _STEPS + _DEPARTURES)
    compared = _compared([one for one in facts.compared if one.rollout == name])
    return element(
        "div", title, *lead, *now, shown, *compared, *more(len(told) - entered, "decisions.jsonl"), kind="card"
    )


def _compared(told: list[Compared]) -> list[Markup]:
    """What devices measured of the new model against the old one, as they signed it."""
    if not told:
        return []
    rows: list[Sequence[Content]] = [
        [
            one.device,
            "tried beside" if one.new_is_beside else "in charge",
            f"{one.windows:,}",
            *(_figure(one, name) for name in ("agreement", "time", "accuracy by labels", "expected accuracy")),
        ]
        for one in told[:_ROWS]
    ]
    head = ["Device", "New one", "Windows", "Alike", "Time", "By labels", "Expected"]
    lead = (
        "Counted from messages in this folder that each device signed, with 95 % intervals; “–”: too few to tell. "
        "Alike: windows that both answered alike. Time: of the new one, as a multiple of the old one's. By labels and "
        "expected: accuracy of the new one, less the old one's."
    )
    shown = stacked(table(head, rows, (2,)), "compared")
    rest = more(len(told) - _ROWS, "comparisons.json")
    return [
        details(
            f"Old and new compared, device by device ({len(told):,})", element("p", lead, kind="muted"), shown, *rest
        )
    ]


def _figure(one: Compared, name: str) -> Content:
    found = next((figure for figure in one.figures if figure.name == name), None)
    if found is None or found.value is None or found.low is None or found.high is None:
        return "–"
    if name == "time":
        return nowrap(f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]")
    value, low, high = (100 * one for one in (found.value, found.low, found.high))
    sign = "" if name == "agreement" else "+"
    return nowrap(f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]")


def decisions(facts: Facts) -> Markup:
    lead = "What was changed, by whom, newest first. Each is signed: by the device it happened on, or by an operator."
    if not facts.decisions:
        return chapter("decisions", "Decisions", lead, element("p", "Nothing was changed in the time that is told of."))
    # What devices did in a roll-out as it was planned stands there.
    listed = [one for one in facts.decisions if not one.phase or one.phase in _DEPARTS]
    shown, entered = timeline(list(reversed(listed)), _ROWS)
    kinds = ", ".join(f"{n:,} {event}" for event, n in facts.events.most_common(8))
    happened = ", ".join(f"{n:,} × {event}" for event, n in sorted(facts.happened.items()))
    also = [element("p", f"Besides, devices recorded: {happened}.", kind="muted")] if happened else []
    rest = more(len(facts.decisions) - entered, "decisions.jsonl")
    return chapter("decisions", "Decisions", lead, element("p", f"In all: {kinds}."), shown, *rest, *also)

"""Views of deployments: the running models by task, the notes on a bundle, and each roll-out with its timeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from outstation.evidence.format.contents import BundleCard, BundleComparison, DecisionRecord, RunningTask
from outstation.evidence.gather.gather import EvidenceFacts
from outstation.evidence.page.formats import format_count, format_time_range
from outstation.foundation.text import format_interval, format_value
from outstation.ml.performance.metrics import display_name

# Per roll-out: operators' decisions, and departures of devices from the plan.
_MAX_STEPS, _MAX_DEPARTURES = 40, 30
DEPARTURE_PHASES = frozenset({"rejected", "rolled_back"})
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
_KIND_DESCRIPTIONS = {
    "classify": "Predicts one class",
    "several": "Predicts any number of classes",
    "regress": "Predicts a number",
    "anomaly": "Detects anomalies",
}


def group_running_tasks(running_tasks: Sequence[RunningTask]) -> list[dict[str, Any]]:
    """Return a row for each pair of task and model, with the devices that run it."""
    groups: dict[tuple[str, str], list[RunningTask]] = {}
    for task in running_tasks:
        groups.setdefault((task.task, str(task.model) if task.model else ""), []).append(task)
    rows = []
    for (name, model), tasks in sorted(groups.items()):
        starts = [task.since for task in tasks if task.since]
        since = format_time_range(min(starts), max(starts)) if starts else "unknown"
        ranked = Counter(task.decided_by for task in tasks).most_common()
        actors = [f"{actor} ({n:,})" if n < len(tasks) else actor for actor, n in ranked]
        rows.append({"task": name, "model": model, "devices": len(tasks), "since": since, "actors": actors})
    return rows


def list_card_notes(card: BundleCard) -> list[str]:
    usage = f"runs in {format_count(card.running_tasks, 'task')} of devices" if card.running_tasks else "not running"
    inputs = f"{_KIND_DESCRIPTIONS.get(card.kind, card.kind)} from {format_count(len(card.fields), 'input')}"
    signature = "Not signed."
    if card.signature_verified:
        signature = f"Signed by a listed publisher ({card.signer[:10]}…)."
    elif card.signer:
        signature = f"Signature not verified: the publisher's key ({card.signer[:10]}…) was not given."
    evaluation = "No evaluation was given."
    if metrics := [metric for metric in card.metrics if not metric.slice and metric.value is not None][:3]:
        values = ", ".join(
            f"{display_name(m.metric)} {format_value(m.value)} {format_interval(m.low, m.high)}".strip()
            for m in metrics
        )
        evaluation = f"Evaluated {card.evaluated_at[:10]}: {values} (95 % intervals)."
    return [f"{inputs}; created {card.created[:10]}; {usage}.", signature, evaluation, *card.warnings[:3]]


def describe_rollouts(facts: EvidenceFacts) -> list[dict[str, Any]]:
    """Return each roll-out, newest first: state, latest reports, timeline and comparisons."""
    records: dict[str, list[DecisionRecord]] = {}
    for decision in facts.decisions:
        if decision.rollout:
            records.setdefault(decision.rollout, []).append(decision)
    rows = {row["rollout"]: row for row in facts.rollouts}
    started = {name: decisions[0].time for name, decisions in records.items()}
    started |= {name: str(row["started"]) for name, row in rows.items()}
    newest_first = sorted(started, key=lambda name: started[name], reverse=True)
    return [_describe_rollout(name, rows.get(name), records.get(name, []), facts) for name in newest_first]


def _describe_rollout(
    name: str, row: dict[str, Any] | None, records: list[DecisionRecord], facts: EvidenceFacts
) -> dict[str, Any]:
    phases = [count for count in facts.phase_counts if count["rollout"] == name]
    phases = sorted(phases, key=lambda count: -count["devices"])[:_MAX_DEPARTURES]
    texts = [
        f"{format_count(count['devices'], 'device')} {_PHASE_TEXTS.get(count['phase'], count['phase'])}"
        + (f" ({count['reason']})" if count["reason"] else "")
        for count in phases
    ]
    steps = [record for record in records if record.payload is not None][-_MAX_STEPS:]
    # Only departures from the plan are listed of the devices' own actions.
    steps += [record for record in records if record.phase in DEPARTURE_PHASES][:_MAX_DEPARTURES]
    steps = sorted(steps or records[:_MAX_DEPARTURES], key=lambda record: record.time)
    entries, shown = build_timeline(steps, _MAX_STEPS + _MAX_DEPARTURES)
    state = str(row["state"]) if row else "reported by devices only"
    return {
        "name": name,
        "state": state,
        "badge": _STATE_BADGES.get(state, "none"),
        "row": row,
        "phases": "; ".join(texts),
        "entries": entries,
        "not_shown": len(records) - shown,
        "comparisons": [pair for pair in facts.comparisons if pair.rollout == name],
    }


def build_timeline(decisions: Sequence[DecisionRecord], limit: int) -> tuple[list[dict[str, Any]], int]:
    """Return at most `limit` entries, and the number of decisions in them. Equal decisions in a row share an entry."""
    by_decision = groupby(decisions, key=lambda record: (record.event, record.decided_by, record.summary))
    groups = [(decision, list(group)) for decision, group in by_decision][:limit]
    entries = []
    for (event, decided_by, summary), group in groups:
        times = [record.time for record in group]
        devices = list(dict.fromkeys(record.device for record in group if record.device))
        when = format_time_range(min(times), max(times))
        entry = {"event": event, "decided_by": decided_by, "summary": summary, "when": when, "devices": devices}
        entries.append(entry)
    return entries, sum(len(group) for _, group in groups)


def format_comparison(comparison: BundleComparison, name: str) -> str:
    """Return a statistic of two bundles with its interval, "" if there are too few messages."""
    metric = next((metric for metric in comparison.metrics if metric.name == name), None)
    if metric is None or metric.value is None or metric.low is None or metric.high is None:
        return ""
    if name == "latency_ratio":
        return f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"
    value, low, high = (100 * number for number in (metric.value, metric.low, metric.high))
    sign = "" if name == "agreement" else "+"
    return f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]"

"""Alert rules of a batch: which results count for each rule, and the alerts that they raise and clear.

Nothing is read or written here: the batch commits the states and alerts together with its results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.device.batch_parts.batch_part import ResultAlert
from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.rules import evaluation, sentences
from outstation.device.rules.batch_results import BatchResults, PendingResults, concatenate
from outstation.device.rules.compiler import CompiledRule, fingerprint
from outstation.device.rules.evaluation import Observations, RuleState, Transition
from outstation.device.rules.sentences import ResultTexts
from outstation.foundation import clock
from outstation.foundation.arrays import Bools, Ints
from outstation.ml.drift.detectors.registry import GATES
from outstation.ml.drift.state import DriftState, DriftWindowResult
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import RESULT

# States of rules that were removed keep their numbers, so that an id is never used again.
_MAX_STATES = 256


class TaskRuleStates(msgspec.Struct, frozen=True):
    """States of a task's rules by name, and the results that wait until their drift window closes."""

    rules: dict[str, RuleState] = {}
    pending: PendingResults = PendingResults()


class RuleContext(msgspec.Struct, frozen=True, eq=False):
    """Batch of a task: the bundle's digest, the drift state before it, and the drift windows that closed in it."""

    device: str
    task: str
    bundle: str
    drift: DriftState | None
    windows: Sequence[DriftWindowResult]


def evaluate(
    rules: Sequence[CompiledRule], before: TaskRuleStates, context: RuleContext, results: BatchResults
) -> tuple[TaskRuleStates, list[ResultAlert]]:
    """Return the states after the batch, and its alerts in order of their results.

    Results count at once for most rules, and for those about healthy results once their drift window is judged. A state
    of another text than the rule's is that of another rule: its open alert clears.
    """
    states, alerts = retire({rule.name: rule.config for rule in rules}, before.rules, context.task)
    changes = [ResultAlert(-1, alert) for alert in alerts]
    waits = any(rule.config.only_healthy for rule in rules)
    judged, pending, offset = _judge(before, context, results) if waits else (results, PendingResults(), 0)
    for rule in rules:
        state = states.get(rule.name, RuleState(rule.fingerprint))
        counted, first = (judged, -offset) if rule.config.only_healthy else (results, 0)
        states[rule.name], transitions, places = _advance(rule, state, counted)
        for change in transitions:
            index = int(places[change.index])
            changes.append(ResultAlert(first + index, _build_alert(rule, context, counted, index, change)))
    changes.sort(key=lambda change: change.index)
    return TaskRuleStates(states, pending), changes


def _judge(
    before: TaskRuleStates, context: RuleContext, results: BatchResults
) -> tuple[BatchResults, PendingResults, int]:
    """Return the results that are judged now, those that wait, and how many of both come from earlier batches."""
    earlier = before.pending.unpack(context.bundle, results.scores.outputs)
    offset = 0 if earlier is None else len(earlier)
    together = concatenate(earlier, results)
    faulty, judged = judge(context.drift, context.windows, offset, len(results))
    together = replace(together, is_healthy=together.is_healthy & ~faulty)
    return together.slice(0, judged), PendingResults.pack(together.slice(judged, len(together)), context.bundle), offset


def retire(
    rules: Mapping[str, AlertRuleConfig], states: Mapping[str, RuleState], task: str
) -> tuple[dict[str, RuleState], list[Alert]]:
    """Return the states for the task's `rules`, and the ends of alerts of rules that were removed or changed.

    A changed rule starts anew, except for the number of its alerts.
    """
    current: dict[str, RuleState] = {}
    alerts = []
    for name, state in states.items():
        text = fingerprint(rules[name]) if name in rules else ""
        if state.is_raised and state.fingerprint != text:
            reason = "was changed" if text else "was removed"
            summary = f"{task}: {name} is over: its rule {reason} in the config."
            alerts.append(RESULT.cleared(summary, {"reason": f"rule {reason}"}, rule=name, count=state.number))
        current[name] = state if state.fingerprint == text else RuleState(text, state.number)
    forgotten = [name for name in current if name not in rules][: max(0, len(current) - _MAX_STATES)]
    return {name: state for name, state in current.items() if name not in forgotten}, alerts


def end_lost(
    states: Mapping[str, RuleState], open_alerts: Sequence[Mapping[str, Any]], task: str
) -> tuple[dict[str, RuleState], list[Alert]]:
    """Return the states with the numbers of open alerts that no state knows, and the ends of those alerts."""
    known, ends = dict(states), []
    for alert in open_alerts:
        name, _, number = str(alert["id"]).removeprefix(f"{task}/").partition("/result/")
        if alert["alert"] != RESULT.alert or not number.isdecimal():
            continue
        state = known.get(name, RuleState())
        # One that was retired has its end already.
        if int(number) > state.number:
            summary = f"{task}: {name} is over: its state was lost with a damaged store, and the rule starts anew."
            ends.append(RESULT.cleared(summary, {"reason": "state lost"}, rule=name, count=int(number)))
            known[name] = RuleState(state.fingerprint, int(number))
    return known, ends


def _advance(rule: CompiledRule, state: RuleState, results: BatchResults) -> tuple[RuleState, list[Transition], Ints]:
    """Return state and transitions, and the index (n,) in the batch of each result that counts for the rule."""
    counts = rule.find_answered(results.scores)
    if rule.config.only_healthy:
        counts &= results.is_healthy
    places = np.flatnonzero(counts)
    if not len(places):
        return state, [], places
    if rule.config.unchanged is None:
        hit, calm = (flags[places] for flags in rule.observe(results.scores))
    else:
        answers = rule.answers(results.scores)[places]
        hit = evaluation.mark_repetitions(answers, state.answer)
        calm, state = ~hit, replace(state, answer=float(answers[-1]))
    state, transitions = evaluation.advance(rule.trigger, state, Observations(hit, calm, results.t[places]))
    return state, transitions, places


def _build_alert(
    rule: CompiledRule, context: RuleContext, results: BatchResults, index: int, change: Transition
) -> Alert:
    texts = _describe_result(rule, context, results, index)
    evidence: dict[str, Any] = {"rule": rule.name, "row": int(results.rows[index]), "time": texts.time}
    evidence |= {name: value for name in ("label", "score", "value") if (value := getattr(texts, name)) is not None}
    evidence |= {} if rule.further is None else {"output": rule.further[0]}
    if not change.is_raised:
        summary = sentences.cleared_summary(rule.config, context.task)
        return RESULT.cleared(summary, evidence, rule=rule.name, count=change.number)
    if rule.trigger.window_count > 1:
        evidence |= {"hits": change.hits, "of": rule.trigger.window_count}
    summary = sentences.raised_summary(rule.config, texts)
    alert = RESULT.raised(summary, evidence, rule=rule.name, count=change.number)
    return replace(alert, severity=rule.config.severity)


def _describe_result(rule: CompiledRule, context: RuleContext, results: BatchResults, index: int) -> ResultTexts:
    compared, answers = rule.compared_number(results.scores, index), rule.select(results.scores)
    numbers = []
    for column, is_compared in (
        (answers.score, rule.config.score is not None),
        (answers.value, rule.config.value is not None),
    ):
        number = compared if is_compared else None if column is None else float(column[index])
        numbers.append(None if number is None or not np.isfinite(number) else float(f"{number:.6g}"))
    label = rule.label(results, index)
    time = clock.to_rfc3339(int(results.t[index]))
    return ResultTexts(context.device, context.task, label, numbers[0], numbers[1], time)


# Results that wait for their drift window, at most. Earlier results of a longer one are judged by open alerts alone.
MAX_PENDING = 512


def judge(
    drift: DriftState | None, windows: Sequence[DriftWindowResult], pending: int, count: int
) -> tuple[Bools, int]:
    """Return which of the pending and new results are faulty (pending + count,), and how many of them are judged.

    `drift` is the state before `count` new results, `windows` are the drift windows that closed with them. A result is
    faulty if its drift window shows a sensor fault, or if the alert of one was open before that. Without a drift
    reference every result is judged, and none is faulty.
    """
    total = pending + count
    faulty = np.zeros(total, np.bool_)
    if drift is None:
        return faulty, total
    open_faults = int(np.count_nonzero(drift.faults.number)) + sum(
        kind.alert == "fault" for gate in GATES for kind, _ in gate.list_open(drift.gates[gate.name])
    )
    begin, end = 0, pending + drift.window - drift.open_summary.model_windows
    judged = 0
    for window in windows:
        # A run of quiet drift windows shows no fault.
        judged = end + (window.windows - 1) * drift.window
        faulty[begin:judged] |= open_faults > 0
        faulty[max(begin, end - MAX_PENDING) : end] |= _shows_fault(window)
        for alert in window.alerts:
            if alert.alert == "fault" and alert.revision == 1:
                open_faults += 1 if alert.state == "raised" else -1
        begin, end = judged, judged + drift.window
    overdue = total - MAX_PENDING
    if overdue > judged:
        faulty[judged:overdue] |= open_faults > 0
        judged = overdue
    return faulty, judged


def _shows_fault(window: DriftWindowResult) -> bool:
    fields = window.members["features"].values()
    return any(numbers["fault"] for numbers in (*fields, *(window.members[gate.member] for gate in GATES)))

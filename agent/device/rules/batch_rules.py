"""Alert rules of a batch: which results count for each rule, and the alerts that they raise and clear.

Nothing is read or written here: the batch commits the states and alerts together with its results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent import clock
from agent.alerts import RESULT, Alert
from agent.arrays import Bools, Ints
from agent.config.alert_rules import AlertRuleConfig
from agent.device.rules import evaluation, sentences
from agent.device.rules.compiler import CompiledRule, fingerprint
from agent.device.rules.evaluation import Observations, RuleState, Transition
from agent.device.rules.sentences import ResultTexts
from agent.drift.detectors.registry import GATES
from agent.drift.state import DriftState, DriftWindowResult
from agent.model.inference.scores import Scores

# States of rules that were removed keep their numbers, so that an id is never used again.
_MAX_STATES = 256


class TaskRuleStates(msgspec.Struct, frozen=True):
    """States of a task's rules by name. `shows_fault`: the newest drift window showed a sensor fault."""

    rules: dict[str, RuleState] = {}
    shows_fault: bool = False


class BatchResults(msgspec.Struct, frozen=True, eq=False):
    """Results of w windows as rules see them: stream `rows` (w,), times `t` (w,) epoch µs, `is_healthy` (w,)."""

    device: str
    task: str
    scores: Scores
    labels: Sequence[str] | None
    rows: Ints
    t: Ints
    is_healthy: Bools


class ResultAlert(msgspec.Struct, frozen=True):
    """Alert that the result at `index` of the batch raised or cleared."""

    index: int
    alert: Alert


def evaluate(
    rules: Sequence[CompiledRule], before: TaskRuleStates, results: BatchResults, *, shows_fault: bool
) -> tuple[TaskRuleStates, list[ResultAlert]]:
    """Return the states after the batch, and its alerts in order of their results.

    A state of another text than the rule's is that of another rule: its open alert clears.
    """
    states, alerts = retire({rule.name: rule.config for rule in rules}, before.rules, results.task)
    changes = [ResultAlert(0, alert) for alert in alerts]
    for rule in rules:
        state = states.get(rule.name, RuleState(rule.fingerprint))
        states[rule.name], transitions, places = _advance(rule, state, results)
        changes += [_build_alert(rule, results, change, places) for change in transitions]
    changes.sort(key=lambda change: change.index)
    return TaskRuleStates(states, shows_fault), changes


def retire(
    rules: Mapping[str, AlertRuleConfig], states: Mapping[str, RuleState], task: str
) -> tuple[dict[str, RuleState], list[Alert]]:
    """Return the states for the task's `rules`, and the ends of alerts of rules that were removed or changed.

    A changed rule starts anew. The number of its alerts goes on.
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


def find_healthy(
    before: TaskRuleStates,
    drift: DriftState | None,
    windows: Sequence[DriftWindowResult],
    is_complete: Bools,
) -> tuple[Bools, bool]:
    """Return which results (w,) count as healthy, and whether the newest drift window shows a sensor fault.

    `drift` is the state before the batch, `windows` the drift windows that closed in it, `is_complete` (w,) says which
    results miss no more input than the bundle allows. A fault is known from the end of the drift window that shows it
    until its alert clears, and a drift window closes at the same result however the rows are split into batches.
    """
    healthy, shows_fault = is_complete.copy(), before.shows_fault
    if drift is None:
        return healthy, False
    open_faults = int(np.count_nonzero(drift.faults.number)) + sum(
        kind.alert == "fault" for gate in GATES for kind, _ in gate.list_open(drift.gates[gate.name])
    )
    begin, end = 0, drift.window - drift.open_summary.model_windows
    for window in windows:
        if open_faults or shows_fault:
            healthy[begin:end] = False
        begin, end = end, end + (window.windows - 1) * drift.window
        # The others of a run of quiet drift windows.
        if open_faults:
            healthy[begin:end] = False
        begin, end = end, end + drift.window
        for alert in window.alerts:
            if alert.alert == "fault" and alert.revision == 1:
                open_faults += 1 if alert.state == "raised" else -1
        shows_fault = _shows_fault(window)
    if open_faults or shows_fault:
        healthy[begin:] = False
    return healthy, shows_fault


def _shows_fault(window: DriftWindowResult) -> bool:
    fields = window.members["features"].values()
    return any(numbers["fault"] for numbers in (*fields, *(window.members[gate.member] for gate in GATES)))


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


def _build_alert(rule: CompiledRule, results: BatchResults, change: Transition, places: Ints) -> ResultAlert:
    index = int(places[change.index])
    texts = _describe_result(rule, results, index)
    evidence: dict[str, Any] = {"rule": rule.name, "row": int(results.rows[index]), "time": texts.time}
    evidence |= {name: value for name in ("label", "score", "value") if (value := getattr(texts, name)) is not None}
    if not change.is_raised:
        summary = sentences.cleared_summary(rule.config, results.task)
        return ResultAlert(index, RESULT.cleared(summary, evidence, rule=rule.name, count=change.number))
    if rule.trigger.window_count > 1:
        evidence |= {"hits": change.hits, "of": rule.trigger.window_count}
    summary = sentences.raised_summary(rule.config, texts)
    alert = RESULT.raised(summary, evidence, rule=rule.name, count=change.number)
    return ResultAlert(index, replace(alert, severity=rule.config.severity))


def _describe_result(rule: CompiledRule, results: BatchResults, index: int) -> ResultTexts:
    compared = rule.compared_number(results.scores, index)
    numbers = []
    for column, is_compared in (
        (results.scores.score, rule.config.score is not None),
        (results.scores.value, rule.config.value is not None),
    ):
        number = compared if is_compared else None if column is None else float(column[index])
        numbers.append(None if number is None or not np.isfinite(number) else float(f"{number:.6g}"))
    label = None if results.labels is None else results.labels[index]
    time = clock.to_rfc3339(int(results.t[index]))
    return ResultTexts(results.device, results.task, label, numbers[0], numbers[1], time)

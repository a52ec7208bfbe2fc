"""Sentences about alert rules: what a rule does, and the summaries of its alerts."""

from __future__ import annotations

import msgspec

from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.foundation.text import format_duration

_MAX_SUMMARY_CHARS = 2000
_ABSENT = "–"


class ResultTexts(msgspec.Struct, frozen=True):
    """One result as the placeholders of a summary show it: `score` and `value` as the rule compares them."""

    device: str
    task: str
    label: str | None
    score: float | None
    value: float | None
    time: str

    def to_dict(self) -> dict[str, str]:
        numbers = {name: getattr(self, name) for name in ("score", "value")}
        shown = {name: _ABSENT if number is None else f"{number:.4g}" for name, number in numbers.items()}
        return {"device": self.device, "task": self.task, "label": self.label or _ABSENT, "time": self.time, **shown}


def explain(rule: AlertRuleConfig) -> str:
    """Return what the rule does: severity, when its alert is raised and cleared, and which results count."""
    raised, cleared = _describe_raise(rule), _describe_clear(rule)
    hold = f", at least {_span(float(rule.hold))} after it was raised" if rule.hold else ""
    text = f"{rule.severity} when {raised}; clears when {cleared}{hold}"
    if rule.only_healthy:
        text += "; a result counts when its drift window closes, never with a sensor fault or too much missing input"
    return text


def raised_summary(rule: AlertRuleConfig, result: ResultTexts) -> str:
    """Return the user's own sentence about the result that raised the alert, or one that names the condition."""
    if rule.summary is not None:
        text = rule.summary.format_map(result.to_dict())
    else:
        texts = result.to_dict()
        answer = ", ".join(f"{name} {texts[name]}" for name in ("label", "score", "value") if texts[name] != _ABSENT)
        text = f"{result.task}: {rule.name}: {_describe_raise(rule)} ({answer})."
    return text if len(text) <= _MAX_SUMMARY_CHARS else text[: _MAX_SUMMARY_CHARS - 1] + "…"


def cleared_summary(rule: AlertRuleConfig, task: str) -> str:
    return f"{task}: {rule.name} is over: {_describe_clear(rule)}."


def _describe_raise(rule: AlertRuleConfig) -> str:
    if rule.unchanged is not None:
        return f"the answer has not changed for {rule.unchanged.strip()}"
    confirmation, condition = rule.confirmation, _describe_condition(rule)
    if confirmation.duration_s:
        return f"results have {condition} for {_span(confirmation.duration_s)}"
    if confirmation.window_count == 1:
        return f"a result has {condition}"
    return f"{confirmation.needed} of the last {confirmation.window_count} results have {condition}"


def _describe_clear(rule: AlertRuleConfig) -> str:
    if rule.unchanged is not None:
        return "the answer has changed"
    confirmation, condition = rule.confirmation, _describe_condition(rule)
    if rule.clear is None:
        verb, calm = "has no", condition
    else:
        compared = "score" if rule.score is not None else _value_name(rule)
        other = f"no {_describe_classes(rule)}, or " if rule.class_names else ""
        verb, calm = "has", f"{other}{compared} {rule.clear.strip()}"
    many = verb.replace("has", "have")
    if confirmation.duration_s:
        return f"results {many} {calm} for {_span(confirmation.duration_s)}"
    if confirmation.window_count == 1:
        return f"a result {verb} {calm}"
    return f"{confirmation.window_count} results in a row {many} {calm}"


def _describe_condition(rule: AlertRuleConfig) -> str:
    """Return the condition as words that follow "have" or "have no"."""
    if rule.anomaly:
        return "label 'anomaly'"
    if rule.value is not None:
        return f"{_value_name(rule)} {rule.value.strip()}"
    if rule.score is None:
        return _describe_classes(rule)
    score = f"score {rule.score.strip()}"
    condition = f"{_describe_classes(rule)} with {score}" if rule.class_names else score
    return condition if rule.class_names or rule.output is None else f"{rule.output} {condition}"


def _describe_classes(rule: AlertRuleConfig) -> str:
    output = "" if rule.output is None else f"{rule.output} "
    return f"{output}label {' or '.join(map(repr, rule.class_names))}"


def _value_name(rule: AlertRuleConfig) -> str:
    return f"value {rule.output}" if rule.output is not None else "value"


def _span(seconds: float) -> str:
    return format_duration(seconds * 1e6)

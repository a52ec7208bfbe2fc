"""Compiled alert rules: a rule of the config, bound to the output of the task's bundle.

Compiling refuses a rule that the bundle's output can never satisfy, and one that would never clear. It evaluates
nothing.
"""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config import alert_rules
from outstation.device.config.alert_rules import AlertRuleConfig, Comparison
from outstation.device.rules.batch_results import BatchResults
from outstation.device.rules.evaluation import Trigger
from outstation.foundation.arrays import Bools, Ints
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import RunnableModel
from outstation.ml.model.inference.scores import ANOMALY, NORMAL, Scores
from outstation.ml.performance.labels import MAX_MULTILABEL_CLASSES

_COMPARE = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}


class CompiledRule(msgspec.Struct, frozen=True, eq=False):
    """Rule of a task for one bundle.

    - `fingerprint` of the rule's text: a rule with another one is another rule
    - `classes`: indices of the classes it is about; empty if it is about numbers of any class
    - `columns`: further columns of the results that hold the compared numbers; empty for `score` or `value` itself
    - `comparison` of a score or value, and the one that must hold to `clear` the alert
    - `further`: name and manifest of the further output that it is about; None for the main one
    """

    config: AlertRuleConfig
    fingerprint: str
    trigger: Trigger
    classes: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    comparison: Comparison | None = None
    clear: Comparison | None = None
    further: tuple[str, Manifest] | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def alerts_per_window(self) -> float:
        """Return how many alerts a window causes at most, on average over windows that go to and fro."""
        windows = self.trigger.needed + self.trigger.calm_windows
        return 0.0 if self.trigger.hold_us or self.trigger.duration_us else 2.0 / windows

    def select(self, results: Scores) -> Scores:
        """Return the results of the output that the rule is about."""
        return results if self.further is None else results.outputs[self.further[0]]

    def label(self, results: BatchResults, index: int) -> str | None:
        """Return the label that the output has given at one window; None for an output without labels."""
        if self.further is None:
            return None if results.labels is None else results.labels[index]
        texts = scores.to_texts(self.select(results.scores).slice(slice(index, index + 1)), self.further[1])
        return None if texts is None else texts[0]

    def find_answered(self, results: Scores) -> Bools:
        """Return which results (w,) hold a number that the rule can compare: the others say nothing."""
        results = self.select(results)
        if self.config.unchanged is not None:
            return np.isfinite(self._answers(results))
        numbers = self._numbers(results)
        return np.ones(len(results), np.bool_) if numbers is None else np.asarray(np.isfinite(numbers).all(axis=1))

    def answers(self, results: Scores) -> NDArray[np.float64]:
        """Return what the model answered (w,), as numbers that are equal if the answers are: its classes or value."""
        return self._answers(self.select(results))

    def _answers(self, results: Scores) -> NDArray[np.float64]:
        if results.value is not None:
            return results.value
        return self._codes(results).astype(np.float64)

    def observe(self, results: Scores) -> tuple[Bools, Bools]:
        """Return which results (w,) meet the condition, and which are calm. For rules with a condition only."""
        results = self.select(results)
        numbers, named = self._numbers(results), self._named(results)
        if self.comparison is None or numbers is None:
            hit = np.asarray(named.any(axis=1))
            return hit, ~hit
        hit = np.asarray((named & self._compare(self.comparison, numbers)).any(axis=1))
        if self.clear is None:
            return hit, ~hit
        return hit, np.asarray((~named | self._compare(self.clear, numbers)).all(axis=1))

    def compared_number(self, results: Scores, index: int) -> float | None:
        """Return the number that the rule compared at one window, the largest of several; None if it compares none."""
        numbers = self._numbers(self.select(results))
        return None if numbers is None else float(numbers[index].max())

    @staticmethod
    def _codes(results: Scores) -> Ints:
        codes = scores.to_codes(results)
        assert codes is not None
        return codes

    def _compare(self, comparison: Comparison, numbers: NDArray[np.float64]) -> Bools:
        return np.asarray(_COMPARE[comparison.sign](numbers, comparison.limit))

    def _numbers(self, results: Scores) -> NDArray[np.float64] | None:
        """Return the compared numbers (w, 1), of several labels (w, C); None if the rule compares none."""
        if self.columns:
            return np.stack([results.extra_columns[name] for name in self.columns], axis=1)
        if self.comparison is None:
            return None
        column = results.score if self.config.score is not None else results.value
        assert column is not None
        return column[:, None]

    def _named(self, results: Scores) -> Bools:
        """Return for which results (w, 1), or for which of their labels (w, C), the rule's condition is about."""
        if not self.classes or self.columns:
            return np.ones((len(results), max(1, len(self.columns))), np.bool_)
        if results.predicted is not None:
            return results.predicted[:, self.classes]
        return np.isin(self._codes(results), self.classes)[:, None]


def compile_rules(
    file: str, task: str, rules: Sequence[AlertRuleConfig], manifest: Manifest, model: RunnableModel | None = None
) -> tuple[CompiledRule, ...]:
    """Bind the rules of a task to its bundle. Raises ConfigError, BadBundle."""
    return tuple(compile_rule(file, task, index, rule, manifest, model) for index, rule in enumerate(rules))


def compile_rule(
    file: str, task: str, index: int, rule: AlertRuleConfig, manifest: Manifest, model: RunnableModel | None = None
) -> CompiledRule:
    """Bind one rule. Raises ConfigError, also for one that can never fire or never clear, and BadBundle.

    The loaded `model` tells the range of its values; without it, none is out of range.
    """
    try:
        return _bind(rule, manifest, model)
    except _Unusable as problem:
        raise ConfigError(file, f"tasks.{task}.alerts[{index}].{problem.member}", problem.text) from None


def fingerprint(rule: AlertRuleConfig) -> str:
    """Return a digest of the rule's text."""
    data = msgspec.json.encode(msgspec.to_builtins(rule, enc_hook=float, order="deterministic"))
    return hashlib.sha256(data).hexdigest()[:16]


class _Unusable(Exception):
    def __init__(self, member: str, text: str) -> None:
        super().__init__(text)
        self.member, self.text = member, text


def _bind(rule: AlertRuleConfig, manifest: Manifest, model: RunnableModel | None) -> CompiledRule:
    further = _find_further_output(rule, manifest)
    if further is None:
        return _bind_to_output(rule, manifest, model)
    name, value = further
    view = scores.further_manifest(manifest, name)
    # The range that is known is that of the main output.
    bound = _bind_to_output(msgspec.structs.replace(rule, output=value), view, None)
    return msgspec.structs.replace(bound, config=rule, fingerprint=fingerprint(rule), further=(name, view))


def _find_further_output(rule: AlertRuleConfig, manifest: Manifest) -> tuple[str, str | None] | None:
    """Return the further output that `output` names, and its value: "NAME", or "NAME.VALUE" of several."""
    if rule.output is None or rule.output in manifest.output.names:
        return None
    values: dict[str, tuple[str, str | None]] = {name: (name, None) for name in manifest.further}
    values |= {f"{name}.{value}": (name, value) for name, spec in manifest.further.items() for value in spec.names}
    if rule.output not in values and rule.value is None:
        hint = did_you_mean(rule.output, values, "it has one output")
        raise _Unusable("output", f"bundle {manifest.name} has no further output {rule.output!r}{hint}")
    return values.get(rule.output)


def _bind_to_output(rule: AlertRuleConfig, manifest: Manifest, model: RunnableModel | None) -> CompiledRule:
    if manifest.kind == "embedding":
        member = next(m for m in ("label", "labels", "score", "value", "anomaly", "unchanged") if getattr(rule, m))
        raise _Unusable(
            member,
            f"bundle {manifest.name} makes embeddings, which name nothing that a rule could be about; its drift alerts "
            "tell when they change",
        )
    if rule.output is not None and rule.value is None:
        raise _Unusable("output", "names the value that `value` compares; this rule compares none, so remove it")
    _check_placeholders(rule, manifest)
    classes = _find_classes(rule, manifest)
    columns: tuple[str, ...] = ()
    comparison = None
    if rule.score is not None:
        comparison = alert_rules.parse_comparison(rule.score)
        columns = tuple(f"score_{manifest.output.labels[i]}" for i in classes) if manifest.output.multi_label else ()
        _check_range(rule, "score", comparison, _score_range(rule, classes, manifest), has_classes=bool(classes))
    elif rule.value is not None:
        comparison, columns = alert_rules.parse_comparison(rule.value), _find_value_column(rule, manifest)
        limits = (-math.inf, math.inf) if model is None else _value_range(manifest, model)
        _check_range(rule, "value", comparison, limits, has_classes=False)
    elif rule.unchanged is not None and not _can_compare_answers(manifest):
        raise _Unusable("unchanged", f"answers of more than {MAX_MULTILABEL_CLASSES} labels are not compared")
    clear = None if rule.clear is None else alert_rules.parse_comparison(rule.clear)
    return CompiledRule(rule, fingerprint(rule), _make_trigger(rule), classes, columns, comparison, clear)


def _can_compare_answers(manifest: Manifest) -> bool:
    return not manifest.output.multi_label or len(manifest.output.labels) <= MAX_MULTILABEL_CLASSES


def _make_trigger(rule: AlertRuleConfig) -> Trigger:
    confirmation = rule.confirmation
    duration_us, is_repetition = round(confirmation.duration_s * 1e6), rule.unchanged is not None
    return Trigger(
        confirmation.needed,
        confirmation.window_count,
        duration_us,
        # An answer that changes once is not unchanged any more.
        1 if is_repetition else confirmation.window_count,
        0 if is_repetition else duration_us,
        round(float(rule.hold) * 1e6),
        is_repetition,
    )


def _find_classes(rule: AlertRuleConfig, manifest: Manifest) -> tuple[int, ...]:
    """Return the indices of the rule's classes in `Scores`."""
    member = "label" if rule.label is not None else "labels" if rule.labels is not None else "anomaly"
    names = [ANOMALY] if rule.anomaly else rule.class_names
    if not names:
        return ()
    known: Sequence[str] = manifest.output.labels
    if manifest.kind == "regress":
        raise _Unusable(member, f"bundle {manifest.name} predicts a value and names no class; use `value`")
    if manifest.kind == "anomaly":
        if manifest.output.threshold is None:
            problem = f"bundle {manifest.name} has no output.threshold, so it calls nothing an anomaly; use `value`"
            raise _Unusable(member, problem)
        known = (NORMAL, ANOMALY)
    elif rule.anomaly:
        raise _Unusable(member, f"bundle {manifest.name} is a classifier and finds no anomalies; use `label`")
    for name in names:
        if name not in known:
            raise _Unusable(member, f"bundle {manifest.name} has no class {name!r}{did_you_mean(name, known)}")
    indices = tuple(known.index(name) for name in names)
    if not manifest.output.multi_label and rule.score is None and len(indices) == len(known):
        raise _Unusable(member, "lists every class of the bundle, so the alert would never clear; leave some out")
    for index in indices:
        _check_threshold(member, known[index], index, manifest)
    return indices


def _check_threshold(member: str, name: str, index: int, manifest: Manifest) -> None:
    """Check that the bundle's threshold lets it name the class."""
    output = manifest.output
    if output.multi_label:
        threshold = output.thresholds[index] if output.thresholds else output.threshold
    else:
        threshold = output.threshold if manifest.kind == "classify" and index == 1 and len(output.labels) == 2 else None
    if threshold is not None and threshold >= 1:
        raise _Unusable(
            member, f"bundle {manifest.name} names {name!r} above a score of {threshold:g} only, so this can never fire"
        )


def _find_value_column(rule: AlertRuleConfig, manifest: Manifest) -> tuple[str, ...]:
    names = [*manifest.output.names, *manifest.further]
    if manifest.kind == "classify":
        raise _Unusable("value", f"bundle {manifest.name} is a classifier and predicts no value; use `score`")
    if rule.output is None:
        return ()
    if rule.output not in names:
        raise _Unusable(
            "output", f"bundle {manifest.name} has no value {rule.output!r}{did_you_mean(rule.output, names)}"
        )
    return () if names.index(rule.output) == 0 else (f"value_{rule.output}",)


def _score_range(rule: AlertRuleConfig, classes: tuple[int, ...], manifest: Manifest) -> tuple[float, float]:
    """Return the smallest and the largest score that the bundle can give to the rule's classes."""
    output = manifest.output
    if manifest.kind != "classify":
        raise _Unusable("score", f"bundle {manifest.name} is of kind {manifest.kind} and gives no score; use `value`")
    if output.isotonic is not None:
        return min(output.isotonic.accuracy), max(output.isotonic.accuracy)
    if output.multi_label or (output.activation == "sigmoid" and len(output.labels) > 2):
        return 0.0, 1.0
    if len(output.labels) == 2 and output.threshold is not None:
        ends = [(1 - output.threshold, output.threshold)[index] for index in classes or (0, 1)]
        return max(0.0, min(ends)), 1.0
    # The most probable of K classes has at least 1/K.
    return (0.0 if output.activation == "sigmoid" else 1.0 / len(output.labels)), 1.0


def _check_range(
    rule: AlertRuleConfig, member: str, comparison: Comparison, limits: tuple[float, float], *, has_classes: bool
) -> None:
    """Check that some numbers satisfy the condition, and that some let it clear."""
    low, high = limits
    span = f"every {member} of this bundle is from {low:.3g} to {high:.3g}"
    if high == math.inf:
        span = f"every {member} of this bundle is {low:g} or more"
    if comparison.never_holds(low, high):
        raise _Unusable(member, f'"{comparison}" can never fire: {span}')
    if not has_classes and comparison.always_holds(low, high):
        raise _Unusable(member, f'"{comparison}" always holds, so the alert would never clear: {span}')
    if rule.clear is None or has_classes:
        return
    clear = alert_rules.parse_comparison(rule.clear)
    if clear.never_holds(low, high):
        raise _Unusable("clear", f'"{clear}" never holds, so the alert would never clear: {span}')


def _value_range(manifest: Manifest, model: RunnableModel) -> tuple[float, float]:
    """Return the smallest and the largest value that the model can give. Raises BadBundle."""
    if manifest.kind == "anomaly" and model.outputs == manifest.input.rows * len(manifest.input.columns):
        # A squared error.
        return 0.0, math.inf
    return model.output_range


def _check_placeholders(rule: AlertRuleConfig, manifest: Manifest) -> None:
    """Check that the bundle's results have what the summary names."""
    used = {name for _, name, _, _ in string.Formatter().parse(rule.summary or "") if name}
    has_label = manifest.kind == "classify" or (manifest.kind == "anomaly" and manifest.output.threshold is not None)
    available = {"label": has_label, "score": manifest.kind == "classify", "value": manifest.kind != "classify"}
    for name in sorted(used):
        if not available.get(name, True):
            raise _Unusable("summary", f"bundle {manifest.name} is of kind {manifest.kind} and gives no {{{name}}}")

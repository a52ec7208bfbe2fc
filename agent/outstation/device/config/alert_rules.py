"""Alert rules on results: `[[tasks.NAME.alerts]]`, with everything that can be checked without the model.

`outstation.device.rules.compiler` checks the rest against the bundle's output; `outstation.device.rules.evaluation`
evaluates.
"""

import math
import re
import string
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, Self

import msgspec

from outstation.foundation.config.quantities import Duration, parse_duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.foundation.names import is_name
from outstation.protocol.alerts.alert import Severity

MAX_RULES = 32
# Longest span of `for`, `hold` and `unchanged`, and most results that one decision looks at.
MAX_DURATION_S = 366 * 86_400.0
MAX_WINDOWS = 1000
PLACEHOLDERS = ("device", "task", "label", "score", "value", "time")
_CONDITIONS = ("label", "labels", "score", "value", "anomaly", "unchanged")
_COMPARISON = r"\s*(>=|<=|>|<)\s*([+-]?\d{1,15}(?:\.\d{1,15})?(?:[eE][+-]?\d{1,2})?)\s*"
_SHARE = r"\s*(\d{1,6})\s+of\s+(\d{1,6})\s*"
_WINDOWS = r"\s*(\d{1,6})\s+windows\s*"


class Comparison(msgspec.Struct, frozen=True):
    """Comparison of a number with a limit; `sign` is >, >=, < or <=."""

    sign: str
    limit: float

    @property
    def is_upward(self) -> bool:
        """Return True if large numbers satisfy it."""
        return self.sign.startswith(">")

    def never_holds(self, low: float, high: float) -> bool:
        """Return True if no number from `low` to `high` satisfies it."""
        return self.inverted().always_holds(low, high)

    def always_holds(self, low: float, high: float) -> bool:
        """Return True if every number from `low` to `high` satisfies it."""
        return {
            ">": low > self.limit,
            ">=": low >= self.limit,
            "<": high < self.limit,
            "<=": high <= self.limit,
        }[self.sign]

    def inverted(self) -> Self:
        """Return the comparison that holds exactly where this one does not."""
        return type(self)({">": "<=", ">=": "<", "<": ">=", "<=": ">"}[self.sign], self.limit)

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


class Confirmation(msgspec.Struct, frozen=True):
    """Confirmation of a condition: it holds in `needed` of the newest `window_count` results, or for `duration_s`."""

    needed: int = 1
    window_count: int = 1
    duration_s: float = 0.0


class AlertRuleConfig(Section, frozen=True, rename={"for_": "for"}):
    """Alert rule of a task: one condition, how often it must hold, and the alert's severity and sentence.

    ```toml
    [[tasks.exercise.alerts]]
    name = "fall"
    label = "falling"
    score = ">= 0.9"
    for = "3 of 5"
    hold = "10 min"
    severity = "critical"
    summary = "{device}: the wearer may have fallen at {time} ({score} sure)."
    only_healthy = true
    ```

    A rule raises an alert of kind `result` and clears it again, in the commit of the results that it is about. Each
    alert is raised once and cleared once, also if the device is switched off in between. `outstation check` explains
    each rule in a sentence. A rule that can never fire, or never clear, is an error.

    A rule has one condition; only `score` goes with a class. `for` counts in both directions. With `"3 of 5"` the alert
    clears after 5 results in a row that do not meet the condition, and with `"10 min"` once results have not met it for
    10 minutes. Times are those of the results. A gap between two results that is longer than `for` counts as half of
    it.

    With `only_healthy` a result counts once its drift window has closed, so such an alert comes up to a drift window
    later. A result does not count if its drift window shows a sensor fault, or if the alert of one was open before it.
    At most 512 results wait: of a longer drift window the earlier ones are judged by open alerts alone. A bundle
    without a drift reference tells of no faults. Leave `only_healthy` out where an alert must not wait.

    A rule follows the task, not the bundle: a roll-out of a bundle for which a rule can never fire is rejected on the
    device. A rule whose text changed starts anew. A rule that was changed or removed clears its open alert at the next
    start.
    """

    name: str
    """Name of the rule in the task, characters as of `id`; it is the alert's subject."""
    label: str | None = None
    """Condition: the model names this class."""
    labels: Annotated[list[str], msgspec.Meta(min_length=1, max_length=256)] | None = None
    """Condition: the model names one of these classes."""
    score: str | None = None
    """Condition: the score, alone or of `label` or `labels`: `">= 0.9"`; signs are `>`, `>=`, `<`, `<=`."""
    value: str | None = None
    """Condition: the value of a regression, or the distance of an anomaly model: `"> 80"`."""
    output: str | None = None
    """Further output of the bundle that the rule is about, `"NAME"`, or one of its values, `"NAME.VALUE"`; with `value`
    also the name of a value of the main output. Else the main output, and its first value."""
    anomaly: bool = False
    """Condition: the value is above the threshold of the bundle."""
    unchanged: str | None = None
    """Condition: the class, or the value, has been the same for `"2 h"` or `"100 windows"`."""
    clear: str | None = None
    """With `score` or `value`: the alert clears only with results beyond this limit: `"< 75"`."""
    for_: str | None = None
    """`"3 of 5"`: in 3 of the newest 5 results; or a duration, such as `"10 min"`; else one result suffices."""
    hold: Duration = Duration(0.0)
    """The alert stays raised at least this long, and is so not raised again within it."""
    severity: Severity = "warning"
    """Severity of the alert."""
    summary: Annotated[str, msgspec.Meta(min_length=1, max_length=500)] | None = None
    """Your own sentence, in place of one that names the condition; `{device}`, `{task}`, `{label}`, `{score}`,
    `{value}` and `{time}` are those of the result that raised the alert."""
    only_healthy: bool = False
    """Results with a sensor fault, or with more missing input than the bundle allows, do not count."""

    @property
    def class_names(self) -> list[str]:
        """Return the classes of the condition; empty for a condition about numbers."""
        return [self.label] if self.label is not None else self.labels or []

    @property
    def confirmation(self) -> Confirmation:
        """Return the parsed `for` or `unchanged`. Raises ValueError."""
        if self.unchanged is not None:
            return parse_unchanged(self.unchanged)
        return Confirmation() if self.for_ is None else parse_for(self.for_)


def parse_comparison(text: str) -> Comparison:
    """Parse `">= 0.9"`. Raises ValueError."""
    match = re.fullmatch(_COMPARISON, text)
    if match is None:
        raise ValueError(f'{text!r} is no comparison; write one of >, >=, < and <= and a number, such as ">= 0.9"')
    return Comparison(match[1], float(match[2]))


def parse_for(text: str) -> Confirmation:
    """Parse `"3 of 5"` or a duration. Raises ValueError."""
    if match := re.fullmatch(_SHARE, text):
        needed, window_count = int(match[1]), int(match[2])
        if not 1 <= window_count <= MAX_WINDOWS:
            raise ValueError(f"{text!r}: the second number must be from 1 to {MAX_WINDOWS}")
        if needed > window_count:
            raise ValueError(f"{text!r} can never be reached: {needed} is more than {window_count}")
        if needed < 1:
            raise ValueError(f"{text!r} would always hold; the first number must be at least 1")
        return Confirmation(needed, window_count)
    return Confirmation(duration_s=_parse_span(text, '"3 of 5" or a duration such as "10 min"'))


def parse_unchanged(text: str) -> Confirmation:
    """Parse `"2 h"` or `"100 windows"`: N equal results are N − 1 repetitions. Raises ValueError."""
    if match := re.fullmatch(_WINDOWS, text):
        if not 2 <= int(match[1]) <= MAX_WINDOWS:
            raise ValueError(f"{text!r} must be from 2 to {MAX_WINDOWS} windows")
        return Confirmation(int(match[1]) - 1, int(match[1]) - 1)
    return Confirmation(duration_s=_parse_span(text, 'a duration such as "2 h", or a number such as "100 windows"'))


def check(file: str, task: str, rules: Sequence[AlertRuleConfig]) -> None:
    """Check the rules of a task as far as no model is needed. Raises ConfigError."""
    key = f"tasks.{task}.alerts"
    if len(rules) > MAX_RULES:
        raise ConfigError(file, key, f"{len(rules)} rules, the limit is {MAX_RULES}; remove some")
    names: set[str] = set()
    for index, rule in enumerate(rules):
        _RuleChecker(file, f"{key}[{index}]", rule).check()
        if rule.name in names:
            raise ConfigError(file, f"{key}[{index}].name", f"duplicate rule {rule.name!r}; give each its own name")
        names.add(rule.name)


class _RuleChecker:
    def __init__(self, file: str, key: str, rule: AlertRuleConfig) -> None:
        self._file, self._key, self._rule = file, key, rule

    def check(self) -> None:
        rule = self._rule
        if not is_name(rule.name):
            self._fail("name", f"{rule.name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
        self._check_one_condition()
        self._check_comparisons()
        if rule.unchanged is not None and rule.for_ is not None:
            self._fail("for", "`unchanged` says how long by itself; remove `for`")
        confirming = "for" if rule.unchanged is None else "unchanged"
        confirmation = self._parse(confirming, lambda _: rule.confirmation)
        for member, seconds in ((confirming, confirmation.duration_s), ("hold", float(rule.hold))):
            if seconds > MAX_DURATION_S:
                self._fail(member, "must be at most 366 d")
        self._check_summary()

    def _check_one_condition(self) -> None:
        rule = self._rule
        given = [name for name in _CONDITIONS if getattr(rule, name) not in (None, False)]
        # The score of a class is one condition of two keys.
        if not given:
            self._fail("", f"has no condition, so it can never fire; give one of {', '.join(_CONDITIONS)}")
        if len(given) > 1 and given not in (["label", "score"], ["labels", "score"]):
            self._fail(given[1], f"a rule has one condition, this one has {' and '.join(given)}; make two rules of it")
        if duplicates := {name for name in rule.class_names if rule.class_names.count(name) > 1}:
            self._fail("labels", f"{min(duplicates)!r} is listed twice; remove one")

    def _check_comparisons(self) -> None:
        rule = self._rule
        compared = next((name for name in ("score", "value") if getattr(rule, name) is not None), None)
        if compared is None:
            if rule.clear is not None:
                self._fail("clear", "is for rules with `score` or `value`; a class is there or not, so remove it")
            return
        condition = self._parse(compared, parse_comparison)
        if rule.clear is None:
            return
        clear = self._parse("clear", parse_comparison)
        if clear.is_upward == condition.is_upward:
            sign = "<" if condition.is_upward else ">"
            self._fail("clear", f'must point the other way than {compared} = "{condition}": begin it with {sign}')
        lower, upper = (clear, condition) if condition.is_upward else (condition, clear)
        both_equal = "=" in lower.sign and "=" in upper.sign
        if lower.limit > upper.limit or (lower.limit == upper.limit and both_equal):
            self._fail(
                "clear",
                f'numbers can satisfy both {compared} = "{condition}" and clear = "{clear}", so the alert would be '
                f"raised and cleared at once; move the limit to the other side of {condition.limit:g}",
            )

    def _check_summary(self) -> None:
        summary = self._rule.summary
        if summary is None:
            return
        try:
            fields = [field for _, *field in string.Formatter().parse(summary) if field[0] is not None]
        except ValueError as problem:
            self._fail("summary", f"{problem}; write {{{{ and }}}} for braces of the text")
        for name, format_spec, conversion in fields:
            if name not in PLACEHOLDERS:
                self._fail("summary", f"unknown placeholder {{{name}}}{did_you_mean(str(name), PLACEHOLDERS)}")
            if format_spec or conversion:
                self._fail("summary", f"a placeholder takes no format; write {{{name}}} alone")

    def _parse(self, member: str, parse: Any) -> Any:
        try:
            return parse(getattr(self._rule, "for_" if member == "for" else member))
        except ValueError as problem:
            self._fail(member, str(problem))

    def _fail(self, member: str, problem: str) -> NoReturn:
        raise ConfigError(self._file, f"{self._key}.{member}" if member else self._key, problem)


def _parse_span(text: str, wanted: str) -> float:
    try:
        seconds = float(parse_duration(text))
    except ValueError:
        raise ValueError(f"{text!r} must be {wanted}") from None
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} must be positive")
    return seconds

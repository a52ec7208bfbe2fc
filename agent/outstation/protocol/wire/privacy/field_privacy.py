"""Field privacy: the owner's rules for what leaves the device about a field, applied to every outgoing message.

No number of a private field leaves; a rounded field gives multiples of its step, a hashed category keyed hashes. Texts
about such a field are replaced, as sentences hold numbers. A field that a bundle computes is private if any field of
the stream is protected. `docs/concepts/privacy.md` lists the rules.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from outstation.protocol.alerts.alert import OUTPUT_PREFIX
from outstation.protocol.wire.privacy.least_count import WITHHELD

Body = Mapping[str, Any]
HASH_PREFIX = "h:"
_HASH_DIGITS = 12
# Kinds about a task that the owner may keep on the device; of `results` the predictions stay.
OPTIONAL_KINDS = frozenset({"drift", "quality", "shadow", "alerts", "samples"})
# Subjects of drift alerts beside the fields. `joint` and `reference` are about all fields.
_MODEL_SUBJECTS, _JOINT_SUBJECTS = frozenset({"output", "score", "rate"}), frozenset({"joint", "reference"})
_FIELD_ALERTS = frozenset({"drift", "fault", "model", "quality"})
# Members of evidence that hold no number of a field.
_PLACES = ("seq", "window", "rows", "site")
# Members that have an entry for each field, and those of an entry that are in the field's unit.
_BY_FIELD = frozenset({"fields", "features", "before", "now", "means"})
_IN_UNIT = frozenset({"mean", "sd", "shift"})
# Names, and ids that consist of them, may hold the name of a field: no sentence looks like this.
_NAME = re.compile(r"[\w./-]+")
_EFFECTS = ("mean", "m2", "psi", "js", "ks", "w1")


def is_model_subject(subject: str) -> bool:
    """Return True for the model's answers and speed, a further output included, and no field."""
    return subject in _MODEL_SUBJECTS or subject.startswith(OUTPUT_PREFIX)


class FieldPrivacy(msgspec.Struct, frozen=True, dict=True):
    """Rules of one stream, or of all streams for messages about the device.

    `fields` are all of the stream, `steps` those that are rounded. `kinds`: the kinds of messages that may leave; None
    for all. `key` is secret and hashes texts; another key is derived from it for each field and period.
    """

    fields: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()
    steps: Mapping[str, float] = {}
    hashed: frozenset[str] = frozenset()
    kinds: frozenset[str] | None = None
    min_count: int = 1
    min_results: int = 1
    key: bytes = b""
    period_s: float = 30 * 86_400.0

    @property
    def lists_results(self) -> bool:
        """True if messages may list predictions."""
        return self.kinds is None or "results" in self.kinds

    @property
    def is_open(self) -> bool:
        """True if no field is protected."""
        return not (self.private or self.steps or self.hashed)

    def keeps(self, kind: str) -> bool:
        """Return True if messages of this kind stay on the device. Results leave: an audit counts their rows."""
        return self.kinds is not None and kind in OPTIONAL_KINDS and kind not in self.kinds

    def hides_numbers(self, name: str) -> bool:
        """Return True if no number about `name` may leave: it is private, or computed and any field is protected."""
        return name in self.private or (name not in self.fields and not self.is_open)

    def is_protected(self, name: str) -> bool:
        """Return True if a sentence about the field may hold what must not leave."""
        return self.hides_numbers(name) or name in self.steps or name in self.hashed

    def round_number(self, name: str, value: float) -> float:
        step = self.steps.get(name)
        # Rounded again: a multiple of 0.1 is none in binary.
        return value if step is None else float(f"{round(value / step) * step:.12g}")

    def hash_text(self, name: str, text: str, now_us: int) -> str:
        """Return the keyed hash of a category in this period: 48 bits, so that two texts hardly share one."""
        period = int(now_us // (self.period_s * 1e6))
        key = hmac.digest(self.key, f"{name}\n{period}".encode(), "sha256")
        return HASH_PREFIX + hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:_HASH_DIGITS]

    def protect_column(self, name: str, values: Sequence[Any], now_us: int) -> list[Any] | None:
        """Return readings as they may leave; None of a private field."""
        if self.hides_numbers(name):
            return None
        if name in self.hashed:
            return [None if text is None else self.hash_text(name, str(text), now_us) for text in values]
        if name in self.steps:
            return [None if value is None else self.round_number(name, value) for value in values]
        return list(values)

    def apply(self, kind: str, body: Body, now_us: int) -> Body:
        """Return the members of a message of this kind that may leave."""
        if self.is_open and self.min_results <= 1:
            return body
        if kind == "drift":
            return self._limit_drift(body)
        if kind == "quality":
            return self._limit_quality(body, now_us)
        if kind == "alerts":
            return self._limit_alert(body, now_us)
        if kind in ("audit", "reply"):
            return self._limit_report(body)
        return body

    def mentions(self, text: str) -> bool:
        """Return True if a text names a protected field."""
        return self._names is not None and self._names.search(text) is not None

    @cached_property
    def _protected(self) -> list[str]:
        return sorted({*self.private, *self.steps, *self.hashed}, key=len, reverse=True)

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        protected = self._protected
        if not protected:
            return None
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, protected))})(?!\w)")

    def _limit_drift(self, body: Body) -> Body:
        if self.is_open:
            return body
        rows = body["window"]["n"]
        features = {name: self._limit_feature(name, field, rows) for name, field in body["features"].items()}
        limited = {**body, "features": features}
        if any(map(self.hides_numbers, features)):
            limited["joint"] = {**body["joint"], "cusum": None} if body.get("joint") else body.get("joint")
        return limited

    def _limit_feature(self, name: str, field: Body, rows: int) -> Body:
        if not self.hides_numbers(name):
            mean = field["mean"]
            return field if mean is None else {**field, "mean": self.round_number(name, mean)}
        empty = {"counts": [0] * len(field["counts"]), "below": 0, "above": 0, "missing": 0, WITHHELD: rows}
        states = {"cusum": {"limit": None}, "state": "insufficient", "fault": None}
        return {**field, **empty, **dict.fromkeys(_EFFECTS), **states}

    def _limit_quality(self, body: Body, now_us: int) -> Body:
        metrics, withheld = [], body.get(WITHHELD, 0)
        for metric in body["metrics"]:
            field, is_slice, value = metric.get("slice", "").partition("=")
            if not is_slice or field not in self.fields:
                metrics.append(metric)
            elif field in self.private:
                withheld += 1
            elif field in self.hashed:
                metrics.append({**metric, "slice": f"{field}={self.hash_text(field, value, now_us)}"})
            else:
                metrics.append(metric)
        return {**body, "metrics": metrics, WITHHELD: withheld}

    def _limit_alert(self, body: Body, now_us: int) -> Body:
        subject, alert = body["subject"], body["alert"]
        if alert == "result":
            return body if self.min_results <= 1 else self._withhold_alert(body, "single results are not named")
        if alert not in _FIELD_ALERTS or self.is_open:
            return body
        # A field may have the name of one of the model's subjects.
        is_field = subject in self.fields or not is_model_subject(subject)
        about_field = alert in ("drift", "fault") and is_field
        is_protected = about_field and (subject in _JOINT_SUBJECTS or self.is_protected(subject))
        if is_protected or self._names_protected_field(body):
            return self._withhold_alert(body, "a field that its owner protects takes part")
        return body

    def _names_protected_field(self, body: Body) -> bool:
        return self.mentions(body["summary"]) or any(map(self.mentions, _texts(body["evidence"])))

    def _withhold_alert(self, body: Body, reason: str) -> Body:
        evidence = {name: value for name, value in body["evidence"].items() if name in _PLACES}
        summary = f"{body['subject']}: {body['alert']} {body['state']}; {reason}, so its numbers are withheld."
        return {**body, "summary": summary, "evidence": evidence}

    def _limit_report(self, body: Body) -> Body:
        """Limit what an event, or an answer to a command, reveals about fields."""
        if self.is_open:
            return body
        limited = {name: self._limit_value(value, name) for name, value in body.items()}
        return {name: value for name, value in limited.items() if value is not None or body[name] is None}

    def _limit_value(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            is_name = value in self._protected or _NAME.fullmatch(value)
            return "withheld: it names a protected field" if not is_name and self.mentions(value) else value
        if isinstance(value, Mapping):
            if isinstance(field := value.get("field"), str) and self.is_protected(field):
                return self._limit_entry(field, value)
            # Of a hashed field, too: keys of hashes belong to one stream.
            sliced = str(value.get("slice", "")).partition("=")[0]
            if sliced in self.private or sliced in self.hashed:
                return {WITHHELD: 1}
            if name in _BY_FIELD:
                return {key: self._limit_entry(key, entry) for key, entry in value.items()}
            return {key: self._limit_value(member, key) for key, member in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self._limit_value(member, name) for member in value]
        return value

    def _limit_entry(self, field: str, entry: Any) -> Any:
        if self.hides_numbers(field) or field in self.hashed:
            return {"field": field, WITHHELD: 1} if isinstance(entry, Mapping) and "field" in entry else {WITHHELD: 1}
        if isinstance(entry, Mapping):
            return {
                key: self.round_number(field, value) if key in _IN_UNIT and isinstance(value, int | float) else value
                for key, value in entry.items()
            }
        return self.round_number(field, entry) if isinstance(entry, int | float) else entry


OPEN = FieldPrivacy()


def combine(rules: Iterable[FieldPrivacy]) -> FieldPrivacy:
    """Return the rules for messages about the whole device: a field is protected if it is so in any stream."""
    every = list(rules)
    steps: dict[str, float] = {}
    for rule in every:
        for name, step in rule.steps.items():
            steps[name] = max(step, steps.get(name, 0.0))
    return FieldPrivacy(
        fields=frozenset().union(*(rule.fields for rule in every)),
        private=frozenset().union(*(rule.private for rule in every)),
        steps=steps,
        hashed=frozenset().union(*(rule.hashed for rule in every)),
        min_count=max((rule.min_count for rule in every), default=1),
        min_results=max((rule.min_results for rule in every), default=1),
    )


def merge_strictest(own: FieldPrivacy, joined: Sequence[FieldPrivacy]) -> FieldPrivacy:
    """Return the rules for messages about a task whose results rest on joined streams, too: the strictest of all."""
    if not joined:
        return own
    every = [own, *joined]
    kinds = [rule.kinds for rule in every if rule.kinds is not None]
    return msgspec.structs.replace(
        combine(every),
        kinds=frozenset.intersection(*kinds) if kinds else None,
        key=own.key,
        period_s=min(rule.period_s for rule in every),
    )


def _texts(value: Any) -> Iterable[str]:
    """Yield the texts in a value, names of members included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield str(name)
            yield from _texts(member)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for member in value:
            yield from _texts(member)

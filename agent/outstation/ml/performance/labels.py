"""Labels: the truth of a result, its source, and the labels that a task accepts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from outstation.foundation import clock
from outstation.foundation.names import is_name
from outstation.foundation.text import printable

# A verdict is of a person who saw the prediction first.
HUMAN, MODEL, SYSTEM, VERDICT = SOURCES = ("human", "model", "system", "verdict")
# Labels of these are no ground truth.
NO_TRUTH = (MODEL, VERDICT)
MAX_LABEL = 256
# Separator of the labels of a multi-label result, the text for no label, and the most labels a model may have.
SEPARATOR, NO_LABEL, MAX_MULTILABEL_CLASSES = "|", "-", 16
_ANOMALY_TEXTS = {"1": 1.0, "true": 1.0, "yes": 1.0, "anomaly": 1.0, "0": 0.0, "false": 0.0, "no": 0.0, "normal": 0.0}
# Its square, and the sum of many squares, must be finite.
_MAX_NUMBER = 1e100
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
ANOMALY = ("normal", "anomaly")


class Label(msgspec.Struct, frozen=True):
    """Label of the result at `row`, or of the one nearest to `t` (epoch µs); one of the two is None.

    `by`: who gave it, if that is authenticated. `output`: the further output that it is about, "" for the first one.
    """

    row: int | None
    t: int | None
    text: str
    source: str = HUMAN
    by: str = ""
    output: str = ""


def parse_decimal(text: str) -> float | None:
    """Return a finite number in ASCII digits, such as -1.5e3; None for any other text that `float` takes, too."""
    text = text.strip()
    value = float(text) if _DECIMAL.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


class LabelSchema(msgspec.Struct, frozen=True, dict=True):
    """Labels that a task accepts; `kind` is classify, several (multi-label), regress or anomaly."""

    kind: str
    labels: tuple[str, ...] = ()

    def parse(self, text: str) -> float:
        """Return class index, number, 1 for an anomaly, or the sum of 2^index of several. Raises ValueError."""
        if self.kind == "several":
            return self._parse_multilabel(text)
        if self.kind == "classify":
            if (index := self._find_class(text)) is None:
                known = ", ".join(self.labels[:12]) + (", …" if len(self.labels) > 12 else "")
                raise ValueError(f"this is no label of this model; it knows {known}")
            return float(index)
        if self.kind == "anomaly":
            if len(self.labels) == 2 and (index := self._find_class(text)) is not None:
                return float(index)
            is_anomaly = parse_anomaly(text)
            if is_anomaly is None:
                raise ValueError("a label of this model must be anomaly or normal, 1 or 0")
            return is_anomaly
        if (value := parse_decimal(text)) is None:
            raise ValueError("the label is no finite number")
        if abs(value) > _MAX_NUMBER:
            raise ValueError(f"the label cannot be meant: numbers go to {_MAX_NUMBER:g} on either side of 0")
        return value

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that `parse` numbers; none for a model that predicts numbers."""
        if self.kind == "anomaly" and len(self.labels) != 2:
            return ANOMALY
        return () if self.kind == "regress" else self.labels

    def true_names(self, text: str) -> tuple[str, ...]:
        """Return the class names that this label makes true. Raises ValueError."""
        code = int(self.parse(text))
        if self.kind == "several":
            return tuple(name for i, name in enumerate(self.labels) if code >> i & 1)
        return (self.class_names[code],)

    def format_class(self, code: int) -> str:
        """Return the text of a class that `parse` gives the number `code`."""
        if self.kind == "several":
            return SEPARATOR.join(name for i, name in enumerate(self.labels) if code >> i & 1) or NO_LABEL
        return self.class_names[code]

    def _parse_multilabel(self, text: str) -> float:
        if len(self.labels) > MAX_MULTILABEL_CLASSES:
            raise ValueError(f"labels of a model that knows more than {MAX_MULTILABEL_CLASSES} at once are not taken")
        if text.count(SEPARATOR) >= MAX_MULTILABEL_CLASSES:
            raise ValueError(f"this names more than the {MAX_MULTILABEL_CLASSES} labels that a model may have")
        names = {name.strip() for name in text.split(SEPARATOR)} if text != NO_LABEL else set()
        indices = {self._find_class(name) for name in names}
        if None in indices:
            known = SEPARATOR.join(self.labels)
            raise ValueError(f"this is no label of this model; it knows any of {known}")
        return float(sum(1 << index for index in indices if index is not None))

    def _find_class(self, text: str) -> int | None:
        """Return the index of the label that `text` is, or that a CSV table shows quoted for spreadsheets."""
        return self._indices.get(text, self._indices.get(text.removeprefix("'")))

    @cached_property
    def _indices(self) -> dict[str, int]:
        """Index of each label by its text and by its printable form; the first of equal ones counts."""
        by_text = [(label, i) for i, label in enumerate(self.labels)][::-1]
        return dict([(printable(label), i) for label, i in by_text] + by_text)


class LabelTarget(msgspec.Struct, frozen=True):
    """A task whose results may be labelled: its stream, and what the labels of each output may be.

    The first output has the name "".
    """

    stream: str
    schemas: Mapping[str, LabelSchema]


def parse_anomaly(text: str) -> float | None:
    """Return 1 if the text means an anomaly, 0 if it means none, None for another text."""
    return _ANOMALY_TEXTS.get(text.lower())


def parse_label(row: Any, t: Any, text: Any, source: Any = None, output: Any = None) -> Label:
    """Return the label from unchecked values; `t` is epoch seconds. Raises ValueError."""
    output = "" if output is None else output
    if not isinstance(output, str) or (output and not is_name(output)):
        raise ValueError(f"output {str(output)[:40]!r} is no name of an output")
    if (row is None) == (t is None):
        raise ValueError("give one of row and t")
    if row is not None and (isinstance(row, bool) or not isinstance(row, int) or not 1 <= row < 2**53):
        raise ValueError(f"row {str(row)[:40]!r} is no row number; they count from 1")
    if t is not None and (isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= clock.MAX_TIME_S):
        raise ValueError(f"t = {str(t)[:40]!r} must be seconds since 1970")
    source = HUMAN if source in (None, "") else source
    if source not in SOURCES:
        raise ValueError(f"source {str(source)[:40]!r} must be one of {', '.join(SOURCES)}")
    return Label(row, None if t is None else round(t * 1e6), _label_text(text), source, output=output)


def _label_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_LABEL or not value.isprintable():
        raise ValueError(f"a label must be a number or text of 1-{MAX_LABEL} characters")
    return value


def count_sources(sources: Sequence[str]) -> dict[str, int]:
    return {source: n for source in SOURCES if (n := sum(known == source for known in sources))}

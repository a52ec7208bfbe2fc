"""Label of a sampled result: what labels and verdicts agree on, and why there is none where they do not.

Labels that a model gave never count: a model that learns from them learns its own errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from outstation.fleet.database.datasets.retraining import Claim
from outstation.ml.performance.labels import MODEL, parse_decimal
from outstation.ml.poisoning.labelled_windows import MAX_CLASSES

DISAGREE, ONLY_MODEL = "sources disagree", "only a model labelled it"


def parse_numbers(texts: Iterable[str]) -> list[float] | None:
    """Return labels as numbers if they are no classes: more distinct ones than classes may be, all finite numbers."""
    distinct = [*texts]
    if len(distinct) <= MAX_CLASSES:
        return None
    values = [value for text in distinct if (value := parse_decimal(text)) is not None]
    return values if len(values) == len(distinct) else None


class RowLabel(msgspec.Struct, frozen=True):
    """Label of the result at `row`; None where `problem` says why. `sources` and `by`: who gave it, sorted."""

    row: int
    label: str | None
    problem: str
    sources: tuple[str, ...]
    by: tuple[str, ...]
    claims: int

    @property
    def is_repeated(self) -> bool:
        """True if several say the same."""
        return self.label is not None and self.claims > 1


def decide(claims: Sequence[Claim]) -> list[RowLabel]:
    """Return the label of each row with claims, in order of rows."""
    by_row: dict[int, list[Claim]] = {}
    for claim in claims:
        by_row.setdefault(claim.row, []).append(claim)
    return [_decide_row(row, by_row[row]) for row in sorted(by_row)]


def _decide_row(row: int, claims: Iterable[Claim]) -> RowLabel:
    counted = [claim for claim in claims if claim.source != MODEL]
    texts = {claim.text.strip() for claim in counted}
    problem = ONLY_MODEL if not counted else DISAGREE if len(texts) > 1 else ""
    sources, people = ({getattr(claim, name) for claim in counted} for name in ("source", "by"))
    label = None if problem else texts.pop()
    return RowLabel(row, label, problem, tuple(sorted(sources)), tuple(sorted(people)), len(counted))

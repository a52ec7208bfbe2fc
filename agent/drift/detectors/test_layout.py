"""Where each test stands among the T of a site: mean of F fields, spread of F, P pairs, certainty, C answers."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from agent.drift.detectors import correlation


class ScoreLayout(msgspec.Struct, frozen=True):
    """Of so many fields and answers; `tests` in all."""

    fields: int
    tested_classes: int

    @property
    def means(self) -> slice:
        return slice(0, self.fields)

    @property
    def spreads(self) -> slice:
        return slice(self.fields, 2 * self.fields)

    @property
    def pairs(self) -> slice:
        return slice(2 * self.fields, self.certainty)

    @property
    def certainty(self) -> int:
        return 2 * self.fields + len(correlation.field_pairs(self.fields))

    @property
    def class_shares(self) -> slice:
        return slice(self.certainty + 1, self.test_count)

    @property
    def test_count(self) -> int:
        return self.certainty + 1 + self.tested_classes


@lru_cache(maxsize=16)
def get_layout(fields: int, classes: int) -> ScoreLayout:
    """With a test of each answer's share, where there is more than one of `labels`."""
    return ScoreLayout(fields, classes if classes > 1 else 0)

"""Where each test stands among the T of a site: mean of F fields, spread of F, P pairs, certainty, C answers."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from agent.drift.detectors import correlation


class Places(msgspec.Struct, frozen=True):
    """Of so many fields and answers; `tests` in all."""

    fields: int
    answers_told: int

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
        return 2 * self.fields + len(correlation.pairs(self.fields))

    @property
    def answers(self) -> slice:
        return slice(self.certainty + 1, self.tests)

    @property
    def tests(self) -> int:
        return self.certainty + 1 + self.answers_told


@lru_cache(maxsize=16)
def places(fields: int, labels: int) -> Places:
    """With a test of each answer's share, where there is more than one of `labels`."""
    return Places(fields, labels if labels > 1 else 0)

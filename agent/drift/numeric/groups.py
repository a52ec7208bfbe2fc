"""Which of m things that come one after another belong together, in so many groups."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from agent.arrays import Ints


class Groups(msgspec.Struct, frozen=True, eq=False):
    of: Ints  # (m,) the group of each
    order: Ints  # (m,) places by group, in each of them as they came
    n: Ints  # (count,) how many are in each

    @classmethod
    def made(cls, of: Ints, count: int) -> Groups:
        """Of the group of each, one of `count`."""
        # Few groups are few bits, which are sorted many times faster.
        order = np.argsort(of.astype(np.min_scalar_type(count)), kind="stable")
        return cls(of, order, np.bincount(of, minlength=count))

    def parts(self) -> Iterator[tuple[int, Ints]]:
        """Each group in which there is something, and the places of what is."""
        begin = 0
        for group, n in enumerate(self.n.tolist()):
            if n:
                yield group, self.order[begin : begin + n]
            begin += n

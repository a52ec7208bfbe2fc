"""Which of m things that come one after another belong together, in so many groups."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from agent.arrays import Ints


class Groups(msgspec.Struct, frozen=True, eq=False):
    group_ids: Ints  # (m,) the group of each
    order: Ints  # (m,) places by group, in each of them as they came
    n: Ints  # (count,) how many are in each

    @classmethod
    def from_ids(cls, group_ids: Ints, count: int) -> Groups:
        """Of the group of each, one of `count`."""
        # Few groups are few bits, which are sorted many times faster.
        order = np.argsort(group_ids.astype(np.min_scalar_type(count)), kind="stable")
        return cls(group_ids, order, np.bincount(group_ids, minlength=count))

    def iter_groups(self) -> Iterator[tuple[int, Ints]]:
        """Each group in which there is something, and the places of what is."""
        begin = 0
        for group, n in enumerate(self.n.tolist()):
            if n:
                yield group, self.order[begin : begin + n]
            begin += n

"""Rows of further inputs in a retraining set: those that the sampled windows were joined with, by input.

Samples of one log share the rows of a stream. A row that came too late for the result of a sample is not joined with
it, so it may stand in no recording together with that sample: a join over the recording would take it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.protocol.transport.sample_content import SampleContent


class JoinedRows(msgspec.Struct, frozen=True, eq=False):
    """Rows of `stream` by ascending number: `numbers` and `t` (m,), `values` (m, F), NaN missing.

    `seen` (s, 2): of each sample the time of its result, and the newest row up to then; 0 for none.
    """

    stream: str
    numbers: Ints
    t: Ints
    values: Float64s
    seen: Ints

    @classmethod
    def from_content(cls, stream: str, content: SampleContent, fields: Sequence[str], result_us: int) -> JoinedRows:
        """Return the rows of a sample with the columns `fields`; the device may keep some of them."""
        assert content.numbers is not None
        sent, unknown = dict(zip(content.fields, content.columns, strict=True)), np.full(len(content.t), np.nan)
        values = np.stack([sent.get(name, unknown) for name in fields], axis=1)
        before = content.numbers[content.t <= result_us]
        seen = np.array([[result_us, before[-1] if len(before) else 0]], np.int64)
        return cls(stream, content.numbers, content.t, values, seen)

    def contradicts(self, other: JoinedRows) -> bool:
        """Return True if rows of the same number differ, or one came too late for a result of the other."""
        if self.stream != other.stream:
            return True
        # Most samples hold only the newest of all rows so far.
        begin = np.searchsorted(self.numbers, other.numbers[0])
        _, own, others = np.intersect1d(self.numbers[begin:], other.numbers, assume_unique=True, return_indices=True)
        if not np.array_equal(self.t[begin:][own], other.t[others]):
            return True
        return self._has_late_rows(other) or other._has_late_rows(self)

    def merge(self, other: JoinedRows) -> JoinedRows:
        """Return the rows of both, which do not contradict one another."""
        begin = np.searchsorted(self.numbers, other.numbers[0])
        numbers, at = np.unique(np.concatenate([self.numbers[begin:], other.numbers]), return_index=True)
        return JoinedRows(
            self.stream,
            np.concatenate([self.numbers[:begin], numbers]),
            np.concatenate([self.t[:begin], np.concatenate([self.t[begin:], other.t])[at]]),
            np.concatenate([self.values[:begin], np.concatenate([self.values[begin:], other.values])[at]]),
            np.concatenate([self.seen, other.seen]),
        )

    def _has_late_rows(self, other: JoinedRows) -> bool:
        """Return True if a row came after the batch of a result in `other` of the same time or later."""
        seen = other.seen[np.argsort(other.seen[:, 0])]
        # The least newest row of all results from each one on.
        least = np.append(np.minimum.accumulate(seen[::-1, 1])[::-1], np.iinfo(np.int64).max)
        begin = np.searchsorted(self.numbers, least[0], "right")
        return bool((self.numbers[begin:] > least[np.searchsorted(seen[:, 0], self.t[begin:])]).any())


JoinedByInput = dict[str, JoinedRows]


def contradict(first: Mapping[str, JoinedRows], second: Mapping[str, JoinedRows]) -> bool:
    """Return True if the rows of two groups of samples cannot stand together."""
    return first.keys() != second.keys() or any(rows.contradicts(second[name]) for name, rows in first.items())


def merge(first: Mapping[str, JoinedRows], second: Mapping[str, JoinedRows]) -> JoinedByInput:
    return {name: rows.merge(second[name]) for name, rows in first.items()}


def choose_fields(contents: Iterable[tuple[str, Mapping[str, tuple[str, SampleContent]]]]) -> dict[str, list[str]]:
    """Return by input the fields that most devices send, of (device, stream and content by input)."""
    devices: dict[str, dict[tuple[str, ...], set[str]]] = {}
    for device, inputs in contents:
        for name, (_, content) in inputs.items():
            devices.setdefault(name, {}).setdefault(tuple(content.fields), set()).add(device)
    return {
        name: [*max(senders, key=lambda fields: (len(senders[fields]), fields))]
        for name, senders in sorted(devices.items())
    }

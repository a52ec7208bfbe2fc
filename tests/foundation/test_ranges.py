"""Integer ranges obey the laws of sets."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from outstation.device.store.retention import AcknowledgedSeqs
from outstation.foundation import ranges

SETS = st.sets(st.integers(1, 40))


def numbers(pairs: ranges.Ranges) -> set[int]:
    return {n for first, last in pairs for n in range(first, last + 1)}


def is_normal(pairs: ranges.Ranges) -> bool:
    return all(a <= b for a, b in pairs) and all(x[1] + 1 < y[0] for x, y in pairwise(pairs))


@given(SETS, SETS)
def test_union_difference_and_intersection_are_those_of_sets(a: set[int], b: set[int]) -> None:
    left, right = ranges.from_numbers(a), ranges.from_numbers(b)
    for result, wanted in (
        (ranges.union(left, right), a | b),
        (ranges.subtract(left, right), a - b),
        (ranges.intersect(left, right), a & b),
    ):
        assert numbers(result) == wanted
        assert is_normal(result)
        assert ranges.count(result) == len(wanted)


@given(SETS, SETS)
def test_acknowledged_seqs_behave_like_a_set_and_survive_json(a: set[int], b: set[int]) -> None:
    known = AcknowledgedSeqs.from_ranges(ranges.from_numbers(a))
    assert numbers(known.ranges) == a
    assert numbers(known.union(ranges.from_numbers(b)).ranges) == a | b
    assert numbers(known.difference(ranges.from_numbers(b)).ranges) == a - b
    assert AcknowledgedSeqs.from_json(known.to_json()) == known
    assert {seq for seq in range(-1, 45) if seq in known} == a

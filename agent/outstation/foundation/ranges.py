"""Integer sets as ascending, disjoint ranges with gaps between them: [(1, 4), (7, 7)]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ranges = Sequence[tuple[int, int]]


def union(*sets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge ranges of any order and overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for pairs in sets for pair in pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


def subtract(ranges: Ranges, removed: Ranges) -> list[tuple[int, int]]:
    """Return the numbers in `ranges` that are not in `removed`."""
    rest: list[tuple[int, int]] = []
    i = 0
    for first, last in ranges:
        while i < len(removed) and removed[i][1] < first:
            i += 1
        at = i
        while first <= last and at < len(removed) and removed[at][0] <= last:
            if first < removed[at][0]:
                rest.append((first, removed[at][0] - 1))
            first = removed[at][1] + 1
            at += 1
        if first <= last:
            rest.append((first, last))
    return rest


def intersect(ranges: Ranges, others: Ranges) -> list[tuple[int, int]]:
    """Return the numbers in both."""
    return subtract(ranges, subtract(ranges, others))


def from_numbers(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the ranges that hold exactly `numbers`."""
    return union((number, number) for number in numbers)


def count(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)

"""Sets of whole numbers as ascending, disjoint ranges with room between them: [(1, 4), (7, 7)]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ranges = Sequence[tuple[int, int]]


def union(*sets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is in any of `sets`, whatever their order and overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for one in sets for pair in one):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


def subtract(ranges: Ranges, away: Ranges) -> list[tuple[int, int]]:
    """What is in `ranges` and not in `away`."""
    left: list[tuple[int, int]] = []
    i = 0
    for first, last in ranges:
        while i < len(away) and away[i][1] < first:
            i += 1
        at = i
        while first <= last and at < len(away) and away[at][0] <= last:
            if first < away[at][0]:
                left.append((first, away[at][0] - 1))
            first = away[at][1] + 1
            at += 1
        if first <= last:
            left.append((first, last))
    return left


def intersect(ranges: Ranges, others: Ranges) -> list[tuple[int, int]]:
    """What is in both."""
    return subtract(ranges, subtract(ranges, others))


def from_numbers(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The ranges that hold exactly `numbers`."""
    return union((number, number) for number in numbers)


def count(ranges: Ranges) -> int:
    """How many numbers they hold."""
    return sum(last - first + 1 for first, last in ranges)

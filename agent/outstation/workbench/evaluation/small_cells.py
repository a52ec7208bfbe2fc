"""Small cells of an evaluation, left out so that no number in it rests on a few people's windows.

A total less its other cells gives a cell that alone is left out: then the next larger cell is left out, too
(complementary cell suppression, Hundepool et al. 2012, Statistical Disclosure Control, chapter 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from msgspec.structs import replace

from outstation.workbench.evaluation.adversarial.results import AdversarialResult
from outstation.workbench.evaluation.document import Evaluation

MIN_COUNT = 10
Cell = TypeVar("Cell")


def large_counts(counts: dict[str, int], min_count: int) -> dict[str, int]:
    """Return the counts of classes that may be shown; classes without a window are none of them."""
    return dict(_large_cells([(name, n) for name, n in counts.items() if n], lambda cell: cell[1], min_count))


def withhold(evaluation: Evaluation, min_count: int) -> Evaluation:
    """Leave out cells of fewer than `min_count` windows, and names of files and rows, in favor of a note.

    `data.counts` holds the classes that may be shown (`large_counts`).
    """
    known = evaluation.data.counts
    classes = [each for each in evaluation.classes if each.label in known]
    slices = [
        cell
        for _, cells in groupby(evaluation.slices, lambda cell: cell.slice.partition("=")[0])
        for cell in _large_cells(list(cells), lambda cell: cell.n, min_count)
    ]
    is_small = any(0 < n < min_count for row in evaluation.confusion for n in row)
    bins = [each for each in evaluation.reliability if each.n >= min_count]
    adversarial = _withhold_attacks(evaluation.adversarial, set(known), min_count)
    counts = {
        "classes": len(evaluation.classes) - len(classes),
        "slices": len(evaluation.slices) - len(slices),
        "bins of the reliability diagram": len(evaluation.reliability) - len(bins),
        "confusion matrix": int(is_small),
        "rows with a suspect label": len(evaluation.suspects),
        "attack shares": _count_points(evaluation.adversarial) - _count_points(adversarial),
        "smallest changes": _count_changes(evaluation.adversarial) - _count_changes(adversarial),
    }
    listed = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    note = f"Privacy: numbers of fewer than {min_count} windows are left out: {listed or 'none'}."
    files = [replace(file, file=f"file {number}") for number, file in enumerate(evaluation.data.files, 1)]
    return replace(
        evaluation,
        data=replace(evaluation.data, files=files),
        classes=classes,
        confusion=[] if is_small else evaluation.confusion,
        reliability=bins,
        slices=slices,
        adversarial=adversarial,
        suspects=[],
        notes=[*evaluation.notes, note],
    )


def _count_points(result: AdversarialResult | None) -> int:
    return 0 if result is None else sum(len(attack.points) for attack in result.attacks)


def _count_changes(result: AdversarialResult | None) -> int:
    return 0 if result is None else len(result.smallest_changes)


def _withhold_attacks(result: AdversarialResult | None, labels: set[str], min_count: int) -> AdversarialResult | None:
    """Leave out shares and sizes of few windows, and what single windows decide: the smallest change, the limits."""
    if result is None:
        return None
    attacks = [
        replace(attack, points=[point for point in attack.points if point.n >= min_count]) for attack in result.attacks
    ]
    changes = [
        replace(change, smallest=None, smallest_sd=None)
        for change in result.smallest_changes
        if change.n >= min_count and (not change.label or change.label in labels)
    ]
    shown = [attack for attack in attacks if attack.points]
    return replace(result, low=[], high=[], attacks=shown, smallest_changes=changes)


def _large_cells(cells: Sequence[Cell], size: Callable[[Cell], int], min_count: int) -> Iterable[Cell]:
    """Return the cells that may be shown, in their order."""
    by_size = sorted(range(len(cells)), key=lambda i: size(cells[i]))
    withheld, total = 0, 0
    for i in by_size:
        # One that is shown beside a small rest would give that rest away.
        if size(cells[i]) >= min_count and (total == 0 or total >= min_count):
            break
        withheld, total = withheld + 1, total + size(cells[i])
    shown = set(by_size[withheld:])
    return [cell for i, cell in enumerate(cells) if i in shown]

"""Comparison with another bundle on the same labelled windows, by the rules that decide a roll-out."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Ints
from outstation.foundation.errors import UsageError
from outstation.ml.comparison import rules, tally
from outstation.ml.comparison.paired_intervals import MIN_BLOCKS, ComparisonBlock
from outstation.ml.comparison.rules import RuleLimits
from outstation.ml.comparison.tally import OutputKind, Predictions
from outstation.ml.datasets.blocks import TextColumn
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import Inference
from outstation.ml.performance.metrics import LabelledPredictions
from outstation.workbench.evaluation import examples, predictions
from outstation.workbench.evaluation.context import EvaluationRequest
from outstation.workbench.evaluation.document import BundleComparison
from outstation.workbench.evaluation.examples import LabelledWindows

# Labels of one message of a device: neighbouring windows make one block.
_BLOCK_WINDOWS = 50
# Runs of a block of which the fastest counts: what interrupts a process for a moment is no property of its model.
_TIMED_RUNS = 3


class ComparedBundle(msgspec.Struct, frozen=True, eq=False):
    """A bundle, its running model, and its labelled windows of the data."""

    bundle: Bundle
    inference: Inference
    windows: LabelledWindows
    reference: Reference | None
    output: str  # that is evaluated, "" for the first one

    @property
    def kind(self) -> OutputKind:
        return OutputKind.from_schemas(self.bundle.manifest.label_schemas)

    def predict(self, windows: LabelledWindows, end_row: Ints) -> tuple[Predictions, LabelledPredictions]:
        """Return the predictions of a block, alone and paired with its labels."""
        result = examples.predict(self.inference, windows.dataset, windows.starts)
        alone = Predictions.from_scores(result.scores, end_row, result.seconds)
        if self.reference is not None and result.scores.value is not None:
            place = (self.reference, windows.dataset, windows.starts)
            expected = examples.expect_errors(*place, result.scores.value, self.output)
            alone = replace(alone, expected_error=expected)
        return alone, predictions.pair_with_truth(self.bundle.manifest, result, windows.truth, windows.label_sets)


def compare(
    new_bundle: tuple[Bundle, Inference],
    old_bundle: tuple[Bundle, Inference],
    request: EvaluationRequest,
    limits: RuleLimits,
) -> BundleComparison:
    """Compare a new bundle with an old one on the data of the request, limit by limit. Raises UsageError, BadBundle."""
    new = _label_windows(*new_bundle, request)
    try:
        old = _label_windows(*old_bundle, request)
    except UsageError as problem:
        raise UsageError(f"--against {old_bundle[0].manifest.name}: {problem}") from None
    ends, ours, theirs = np.intersect1d(_row_keys(new.windows), _row_keys(old.windows), return_indices=True)
    if not len(ends):
        raise UsageError("--against: the two bundles have no labelled window in common that ends at the same row")
    blocks = []
    names = new.windows.columns[request.group][ours] if request.group else np.zeros(len(ends), np.str_)
    for name, chosen in _list_blocks(names):
        # In turns, so that other load on the machine slows both.
        runs = [
            (
                new.predict(new.windows.subset(ours[chosen]), ends[chosen]),
                old.predict(old.windows.subset(theirs[chosen]), ends[chosen]),
            )
            for _ in range(_TIMED_RUNS)
        ]
        new_predictions, new_paired = min((run[0] for run in runs), key=_seconds)
        old_predictions, old_paired = min((run[1] for run in runs), key=_seconds)
        stats = tally.compare_batch(old.kind, old_predictions, new.kind, new_predictions)
        if new_paired.value is not None and old_paired.value is not None and new_paired.predicted is None:
            stats += tally.from_abs_errors(np.abs(old_paired.errors), np.abs(new_paired.errors))
        elif new_paired.predicted is not None and old_paired.predicted is not None:
            stats += tally.from_correctness(list(old_paired.right), list(new_paired.right))
        blocks.append(ComparisonBlock(stats, name))
    manifest = old.bundle.manifest
    return BundleComparison(
        name=manifest.name,
        version=manifest.version,
        digest=old.bundle.digest,
        windows=len(ends),
        blocks=len(blocks),
        rules=rules.evaluate_rules(limits, blocks, new_is_other=True),
    )


def _seconds(run: tuple[Predictions, LabelledPredictions]) -> float:
    return run[0].seconds


def _label_windows(bundle: Bundle, inference: Inference, request: EvaluationRequest) -> ComparedBundle:
    dataset = examples.read(request.data, inference, request.columns, request.joined)
    windows = examples.label_windows(dataset, inference, request.label, request.columns, request.split)
    stored = bundle.files.get("reference.json")
    reference = None if stored is None else Reference.from_json(stored)
    return ComparedBundle(bundle, inference, windows, reference, request.output)


def _row_keys(windows: LabelledWindows) -> Ints:
    """Return (n,) a number for the last row of each window: rows of one file that both bundles read."""
    dataset = windows.dataset
    return (dataset.file_index[windows.last] << 40) + dataset.row_numbers[windows.last]


def _list_blocks(names: TextColumn) -> Iterator[tuple[str, Ints]]:
    """Yield the group and window indices of each block of neighbours."""
    for name in np.unique(names):
        own = np.flatnonzero(names == name)
        count = min(len(own), max(MIN_BLOCKS, len(own) // _BLOCK_WINDOWS))
        for block in np.array_split(own, count):
            yield str(name), block

"""Further outputs in a drift reference: bins, counts, and how right held-out answers were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.drift.numeric import divergence
from outstation.ml.drift.numeric.sums import are_counts, is_part
from outstation.ml.drift.outputs.counts import BINS, DISTANCES, RANKS, FurtherOutput, split_outputs
from outstation.ml.performance import cbpe
from outstation.ml.performance.expected_error import ErrorReference

MAX_OUTPUTS = 16


class FurtherOutputReference(msgspec.Struct, frozen=True, eq=False):
    """Reference of one further output. A site's reference has counts of its own."""

    output: FurtherOutput
    edges: Float64s  # (V, 31) inner quantiles of its values, or of its score
    counts: Ints  # (cells,) without those of the error to expect
    held_out: Ints | None = None  # (2, 32) scores of held-out data, and how many of these answers were right
    # For its first value, if held-out data show it. Not encoded otherwise, so that digests of earlier references hold.
    error: ErrorReference | msgspec.UnsetType = msgspec.UNSET

    @property
    def monitored(self) -> FurtherOutput:
        """The output with its error to expect."""
        return replace(self.output, has_error=True) if self.error else self.output

    @property
    def cells(self) -> Ints:
        """(cells,) counts of the monitored output, with the held-out answers by the error to expect."""
        return np.concatenate([self.counts, self.error.n]) if self.error else self.counts

    @property
    def weights(self) -> Float64s:
        """(R, 32) weights of the bins in its tests."""
        if not self.output.labels:
            values = np.tile([RANKS, DISTANCES], (len(self.output.values), 1))
            return np.concatenate([values, self.error.bin_ratio[None]]) if self.error else values
        if self.held_out is None or not self.held_out[0].any():
            return RANKS[None]
        return cbpe.estimate_bin_accuracy(self.held_out[0], self.held_out[1])[None]

    def with_held_out(self, scores: Float64s, right: Bools) -> FurtherOutputReference:
        """Return the reference with how often `scores` (w,) of held-out data were `right` (w,)."""
        places = np.searchsorted(self.edges[0], scores, side="right")
        return replace(self, held_out=np.stack([bincount(part, minlength=BINS) for part in (places, places[right])]))

    def is_valid(self, statistics: int) -> bool:
        """Return True if its parts agree, for model windows with this number of statistics."""
        output, held_out, error = self.output, self.held_out, self.error
        return (
            len(output.values) > 0
            and (not output.labels or len(output.values) == 1)
            and self.edges.shape == (len(output.values), BINS - 1)
            and bool(np.isfinite(self.edges).all() and (np.diff(self.edges, axis=1) >= 0).all())
            and self.counts.shape == (output.cells,)
            and are_counts(self.counts)
            and output.has_error is msgspec.UNSET
            and (not error or (not output.labels and error.is_valid(statistics)))
            and (
                held_out is None
                or (held_out.shape == (2, BINS) and are_counts(held_out[0]) and is_part(held_out[1], held_out[0]))
            )
        )


def draft(outputs: Sequence[FurtherOutput], answers: Float64s) -> tuple[FurtherOutputReference, ...]:
    """Draft the references of outputs from answers (w, P); counts follow."""
    quantiles = np.arange(1, BINS) / BINS
    drafts: list[FurtherOutputReference] = []
    column = 0
    for output in outputs:
        values = answers[:, column + bool(output.labels) : column + output.columns]
        known = np.where(np.isfinite(values), values, np.nan)
        edges = np.nan_to_num(np.nanquantile(known, quantiles, axis=0)).T
        drafts.append(FurtherOutputReference(output, edges, np.zeros(output.cells, np.int64)))
        column += output.columns
    return tuple(drafts)


def with_counts(references: Sequence[FurtherOutputReference], counts: Ints) -> tuple[FurtherOutputReference, ...]:
    """Return the references with these counts (X,)."""
    parts = split_outputs([reference.monitored for reference in references], counts)
    return tuple(
        replace(reference, counts=own[: reference.output.cells])
        for reference, (_, own) in zip(references, parts, strict=True)
    )


def build_members(references: Sequence[FurtherOutputReference], counts: Ints) -> dict[str, dict[str, Any]]:
    """Return the members of a message by output: counts of labels, bins of values, divergences, and the estimate."""
    members: dict[str, dict[str, Any]] = {}
    monitored = [reference.monitored for reference in references]
    for reference, (output, own) in zip(references, split_outputs(monitored, counts), strict=True):
        (labels, bins), (usual_labels, usual_bins) = output.split_cells(own), output.split_cells(reference.cells)
        psi = divergence.psi(usual_bins, bins).round(4).tolist()
        values = {
            name: {"counts": part.tolist(), "psi": far}
            for name, part, far in zip(output.values, bins, psi, strict=False)
        }
        member: dict[str, Any] = {"values": values}
        if output.labels:
            named = {label: n for label, n in zip(output.labels, labels.tolist(), strict=True) if n}
            member |= {"counts": named, "psi": round(float(divergence.psi(usual_labels, labels)), 4)}
        if reference.held_out is not None:
            member["estimate"] = cbpe.estimate_accuracy(reference.held_out[0], reference.held_out[1], bins[0])
        elif reference.error:
            member["estimate"] = reference.error.estimate(bins[-1])
        members[output.name] = member
    return members

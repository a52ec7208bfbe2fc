"""Target of attacks: a model that answers windows in batches, and the windows whose answers an attacker wants to flip.

An attacker sees answers and scores only. Readings stay within the limits of the sensors: those of the bundle's drift
reference, beyond which a device reports a field as out of range, else the range of the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.joins import JoinedValues

# Readings of all windows that are computed at once: 32 MB of float32.
MAX_VALUES = 8_000_000


class SensorLimits(msgspec.Struct, frozen=True, eq=False):
    """Lowest and highest reading, mean and sd of each field (F,).

    `movable` fields vary and are measured; a category is not.
    """

    low: Float32s
    high: Float32s
    mean: Float32s
    sd: Float32s
    movable: Bools

    @classmethod
    def from_bundle(cls, bundle: Bundle, rows: Float32s) -> SensorLimits:
        """Return the limits that a bundle knows, else those of rows (n, F)."""
        roles = bundle.manifest.input.roles
        movable = np.array([role != "category" for role in roles] or [True] * rows.shape[1])
        if "reference.json" in bundle.files:
            reference = Reference.from_json(bundle.files["reference.json"])
            parts: Sequence[Float64s] = (*reference.far_limits, reference.mean, reference.sd)
        else:
            known = np.where(np.isfinite(rows).any(axis=0), rows, np.float32(0.0))
            known = np.where(np.isfinite(known), known, np.nan)
            parts = (np.nanmin(known, 0), np.nanmax(known, 0), np.nanmean(known, 0), np.nanstd(known, 0))
        low, high, mean, sd = (np.nan_to_num(np.asarray(part, np.float32)) for part in parts)
        return cls(low, high, mean, sd, movable & (sd > 0))

    def clip(self, changed: Float32s, original: Float32s) -> Float32s:
        """Return changed readings within the limits, or as far out as the original ones were."""
        return np.clip(changed, np.fmin(original, self.low), np.fmax(original, self.high))


class Answers(msgspec.Struct, frozen=True, eq=False):
    """Answers to k windows: classes `codes` (k,), and the `scores` (k, C) of all classes.

    For a number, or an anomaly value, `scores` is that value (k, 1). A multi-label model has `labels` (k, C).
    """

    codes: Ints
    scores: Float64s
    kind: str  # classify | anomaly | number
    labels: Bools | None = None

    @classmethod
    def read(cls, inference: Inference, result: InferenceResult) -> Answers:
        manifest, scored = inference.manifest, result.scores
        if manifest.kind == "classify":
            assert result.outputs is not None
            assert scored.label is not None
            first = scores.split_outputs(result.outputs, manifest)[0]
            probabilities = np.asarray(scores.compute_probabilities(first, manifest.output), np.float64)
            return cls(scored.label, probabilities, "classify", scored.predicted)
        assert scored.value is not None
        codes = np.zeros(len(scored.value), np.int64) if scored.anomaly is None else scored.anomaly.astype(np.int64)
        kind = "number" if scored.anomaly is None else "anomaly"
        return cls(codes, np.asarray(scored.value, np.float64)[:, None], kind)

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        labels = [part.labels for part in parts if part.labels is not None]
        codes, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scores"))
        return cls(codes, values, parts[0].kind, np.concatenate(labels) if labels else None)

    def select(self, index: Ints) -> Answers:
        labels = None if self.labels is None else self.labels[index]
        return Answers(self.codes[index], self.scores[index], self.kind, labels)

    def differ_from(self, before: Answers, tolerance: float) -> Bools:
        """Return which answers (k,) are others than `before`."""
        if self.kind == "number":
            return np.asarray(np.abs(self.scores - before.scores)[:, 0] > tolerance)
        if self.labels is not None and before.labels is not None:
            return np.asarray((self.labels != before.labels).any(axis=1))
        return np.asarray(self.codes != before.codes)

    def margin_of(self, before: Answers) -> Float64s:
        """Return by how much (k,) the answer `before` still leads."""
        if self.kind == "number":
            return -np.abs(self.scores - before.scores)[:, 0]
        if self.kind == "anomaly":
            return np.where(before.codes > 0, self.scores[:, 0], -self.scores[:, 0])
        if self.labels is not None and before.labels is not None:
            return np.asarray(np.where(before.labels, self.scores, 1 - self.scores).min(axis=1), np.float64)
        each = np.arange(len(self.codes))
        others = self.scores.copy()
        others[each, before.codes] = -np.inf
        return np.asarray(self.scores[each, before.codes] - others.max(axis=1))


class Target:
    """Windows (m, L, F) with their history, of rows at `t` (m, L), and the model's answers to them.

    `tolerance` is the change of a number that counts as another answer. `invocations` counts windows that the model
    computed.
    """

    def __init__(
        self,
        inference: Inference,
        limits: SensorLimits,
        windows: Float32s,
        t: Ints,
        joined: JoinedValues | None,
        tolerance: float,
    ) -> None:
        self.inference, self.limits, self.windows, self.tolerance = inference, limits, windows, tolerance
        self._t, self._joined = t, joined
        self.invocations = 0
        self.answers = self._answer(np.arange(len(windows)), windows)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def codes(self) -> Ints:
        """(m,) answer to each window, as a class; 0 for numbers."""
        return self.answers.codes

    def query(self, index: Ints, changed: Float32s) -> tuple[Bools, Float64s]:
        """Ask for `changed` windows (k, L, F) in the place of those at `index` (k,).

        Returns whether each answer flipped, and its margin, which falls as the old answer becomes less likely.
        """
        before, after = self.answers.select(index), self._answer(index, changed)
        return after.differ_from(before, self.tolerance), after.margin_of(before)

    def _answer(self, index: Ints, windows: Float32s) -> Answers:
        k, length, fields = windows.shape
        history = self.inference.history_rows
        block = max(1, MAX_VALUES // (length * fields))
        parts = []
        for begin in range(0, k, block):
            own, chosen = windows[begin : begin + block], index[begin : begin + block]
            starts = np.arange(len(own), dtype=np.int64) * length + history
            cut = WindowCut(starts, len(own) * length, None if self._joined is None else self._joined[chosen])
            rows, t = own.reshape(-1, fields), self._t[chosen].reshape(-1)
            parts.append(Answers.read(self.inference, self.inference.run_windows(rows, t, cut, with_outputs=True)))
        self.invocations += k
        return parts[0] if len(parts) == 1 else Answers.join(parts)

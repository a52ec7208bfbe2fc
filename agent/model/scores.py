"""Model outputs to labels and scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.model.manifest import Manifest, Output


@dataclass(frozen=True, slots=True)
class Scores:
    """Of w inferences: `label` (w,) indexes and `score` (w,) calibrated probability, or `value` (w,)."""

    label: NDArray[np.int64] | None
    score: NDArray[np.float64] | None
    value: NDArray[np.float64] | None

    def __len__(self) -> int:
        present = self.value if self.label is None else self.label
        return 0 if present is None else len(present)


def of(outputs: NDArray[np.float32], manifest: Manifest, inputs: NDArray[np.float32] | None = None) -> Scores:
    """`outputs` (w, K). The value of an anomaly model that gives its input again is the mean squared error against
    `inputs` (w, …); that of any other is its first output."""
    if manifest.kind == "classify":
        p = probabilities(outputs, manifest.output)
        label = p.argmax(axis=1)
        return Scores(label, p[np.arange(len(p)), label], None)
    if manifest.kind == "anomaly" and inputs is not None and outputs.size == inputs.size:
        off = outputs.astype(np.float64) - inputs.reshape(outputs.shape)
        return Scores(None, None, np.square(off).mean(axis=1))
    return Scores(None, None, outputs[:, 0].astype(np.float64))


def probabilities(outputs: NDArray[np.float32], output: Output) -> NDArray[np.float64]:
    """Calibrated class probabilities (w, K); a single sigmoid output becomes two classes."""
    x = outputs.astype(np.float64)
    if x.shape[1] == 1:
        logit = x if output.activation != "none" else np.log(np.clip(x, 1e-6, 1)) - np.log(np.clip(1 - x, 1e-6, 1))
        p = _sigmoid(logit / output.temperature)
        return np.concatenate([1.0 - p, p], axis=1)
    if output.activation == "sigmoid":
        return _sigmoid(x / output.temperature)
    logits = (x if output.activation == "softmax" else np.log(np.clip(x, 1e-6, None))) / output.temperature
    # A float model may answer with infinities: those become NaN, and null in messages.
    with np.errstate(invalid="ignore"):
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-x), without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))

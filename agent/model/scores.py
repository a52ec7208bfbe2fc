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
    """`outputs` (w, K). An anomaly model's value is the mean squared error against `inputs` (w, …), its input."""
    if manifest.kind == "classify":
        p = probabilities(outputs, manifest.output)
        label = p.argmax(axis=1)
        return Scores(label, p[np.arange(len(p)), label], None)
    if manifest.kind == "anomaly" and inputs is not None and outputs.shape[1] == inputs[0].size:
        error = np.square(outputs - inputs.reshape(len(inputs), -1)).mean(axis=1)
        return Scores(None, None, error.astype(np.float64))
    return Scores(None, None, outputs[:, 0].astype(np.float64))


def probabilities(outputs: NDArray[np.float32], output: Output) -> NDArray[np.float64]:
    """Calibrated class probabilities (w, K); a single sigmoid output becomes two classes."""
    x = outputs.astype(np.float64)
    if x.shape[1] == 1:
        logit = x if output.activation != "none" else np.log(np.clip(x, 1e-6, 1)) - np.log(np.clip(1 - x, 1e-6, 1))
        p = 1.0 / (1.0 + np.exp(-logit / output.temperature))
        return np.concatenate([1.0 - p, p], axis=1)
    if output.activation == "sigmoid":
        return 1.0 / (1.0 + np.exp(-x / output.temperature))
    logits = (x if output.activation == "softmax" else np.log(np.clip(x, 1e-6, None))) / output.temperature
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))

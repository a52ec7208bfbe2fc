"""Input range: which fields of the data a quantized input cannot hold, or cannot tell apart."""

from __future__ import annotations

import numpy as np

from outstation.foundation.arrays import Float32s, Ints
from outstation.ml.model.bundle.manifest import ModelInput
from outstation.ml.model.inference import derived_features, features
from outstation.ml.model.inference.tensors import Tensor

# Share of a feature's values that may lie outside: outliers are clipped on purpose.
_MAX_CLIPPED_SHARE = 0.01
_SAMPLED_WINDOWS = 1024
_MAX_NAMED = 4


def find_misfits(rows: Float32s, t: Ints, starts: Ints, spec: ModelInput, tensor: Tensor) -> list[str]:
    """Return warnings of features, from `rows` (n, F) at `t` (n,), that do not fit a quantized input once scaled."""
    if tensor.limits is None or spec.image is not None:
        return []
    sampled = starts[np.linspace(0, len(starts) - 1, min(_SAMPLED_WINDOWS, len(starts)), dtype=np.int64)]
    windows = features.build_windows(derived_features.compute(rows, t, spec), sampled, spec)
    values, (low, high) = windows.reshape(-1, len(spec.columns)), tensor.limits
    rounding = tensor.quantization_step / 2
    clipped = ((values < low - rounding) | (values > high + rounding)).mean(axis=0)
    spread = np.ptp(values, axis=0)
    warnings = []
    if outside := [
        f"{name} {share:.0%}"
        for name, share in zip(spec.columns, clipped.tolist(), strict=True)
        if share > _MAX_CLIPPED_SHARE
    ]:
        warnings.append(
            f"the model's input holds {low:.4g} to {high:.4g} and clips other values: {_name(outside)} of the data lie "
            "outside once scaled, so the model does not see them; give the mean and std of its training in [input]"
        )
    if flat := [
        name for name, width in zip(spec.columns, spread.tolist(), strict=True) if 0 < width < tensor.quantization_step
    ]:
        warnings.append(
            f"{_name(flat)}: all values lie within one step ({tensor.quantization_step:.3g}) of the model's quantized "
            "input, so the model cannot tell them apart; give the mean and std of its training in [input]"
        )
    return warnings


def _name(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")

"""Windows of features as a model takes them: scaled, quantized, and where the model may read them without a copy."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import BadBundle
from outstation.ml.kernel import library, model_input
from outstation.ml.kernel.model_input import Scaling
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference import features, scores
from outstation.ml.model.inference.quantization import Quantization
from outstation.ml.model.inference.scores import Scores

if TYPE_CHECKING:
    from outstation.ml.model.inference.joins import JoinedValues


class InputMemory(Protocol):
    """A loaded model, as far as its input goes."""

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def input(self) -> Quantization: ...

    def allocate(self, count: int) -> NDArray[Any]:
        """Return an array for the next windows (w, n), in the input's numbers: the model may read it where it is."""
        ...


class WindowBuilder:
    """Builds windows for a bundle's model; the compiled kernel gives the same bits as NumPy."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @cached_property
    def scaling(self) -> Scaling:
        spec = self.manifest.input
        return Scaling(len(spec.columns), spec.rows, spec.mean, spec.std)

    def build(
        self, columns: Float32s, starts: Ints, model: InputMemory, joined: JoinedValues | None = None
    ) -> ModelWindows:
        """Build the windows of features (n, C) that begin at `starts` (w,), before `joined` ones. Raises BadBundle."""
        spec = self.manifest.input
        if joined is not None:
            return self._build_joined(columns, starts, model, joined)
        if math.prod(model.input_shape) != spec.rows * columns.shape[1]:
            shape = [columns.shape[1]] if spec.window is None else [spec.rows, columns.shape[1]]
            raise BadBundle(f"the model takes {list(model.input_shape)} values, got {shape}")
        compiled, kind = library.kernel(), model.input
        if compiled is None or spec.scaling != "fixed" or not model_input.supports(kind.dtype, kind.zero):
            values = features.build_windows(columns, starts, spec)
            missing_share = features.compute_missing_share(columns, starts, spec)
            numbers = kind.quantize(values.reshape(len(starts), math.prod(model.input_shape)))
            return ModelWindows(self, columns, starts, numbers, missing_share, values)
        numbers = model.allocate(len(starts))
        missing = model_input.build_windows(compiled, columns, starts, self.scaling, (kind.scale, kind.zero), numbers)
        return ModelWindows(self, columns, starts, numbers, (missing / self.scaling.values).astype(np.float32))

    def _build_joined(self, columns: Float32s, starts: Ints, model: InputMemory, joined: JoinedValues) -> ModelWindows:
        spec = self.manifest.input
        own, further = spec.rows * columns.shape[1], joined.values.shape[1]
        if math.prod(model.input_shape) != own + further:
            raise BadBundle(f"the model takes {math.prod(model.input_shape)} values, got {own} and {further} joined")
        values = features.build_windows(columns, starts, spec)
        missing_share = features.compute_missing_share(columns, starts, spec)
        missing_share = ((missing_share * own + joined.missing) / (own + further)).astype(np.float32)
        numbers = np.concatenate([values.reshape(len(starts), own), joined.values], axis=1)
        return ModelWindows(self, columns, starts, numbers, missing_share, values)


class ModelWindows:
    """Model input `numbers` (w, n) and the share of missing values (w,) of each window."""

    def __init__(
        self,
        builder: WindowBuilder,
        columns: Float32s,
        starts: Ints,
        numbers: NDArray[Any],
        missing_share: Float32s,
        values: Float32s | None = None,
    ) -> None:
        self._builder, self._columns, self._starts, self._values = builder, columns, starts, values
        self.numbers, self.missing_share = numbers, missing_share

    def score(self, outputs: NDArray[Any], output: Quantization) -> Scores:
        """Compute the scores of `outputs` (w, K), in the tensor's numbers."""
        manifest, compiled = self._builder.manifest, library.kernel()
        if manifest.joined or manifest.further:
            values = None
            if manifest.kind == "anomaly":
                is_built = self._values is not None
                values = (
                    self._values if is_built else features.build_windows(self._columns, self._starts, manifest.input)
                )
            return scores.from_outputs(output.dequantize(outputs), manifest, values)
        if manifest.kind != "anomaly" or outputs.size != self.numbers.size:
            return scores.from_outputs(output.dequantize(outputs), manifest)
        is_scaled = self._values is None
        if compiled is not None and is_scaled and model_input.supports(output.dtype, output.zero):
            scaling, quantization = self._builder.scaling, (output.scale, output.zero)
            errors = model_input.mean_errors(compiled, self._columns, self._starts, scaling, quantization, outputs)
            return scores.from_values(errors, manifest.output)
        values = features.build_windows(self._columns, self._starts, manifest.input) if is_scaled else self._values
        return scores.from_outputs(output.dequantize(outputs), manifest, values)

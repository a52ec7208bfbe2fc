"""The TFLite interpreter: float windows in, float outputs out, in true batches. The only importer of a runtime.

Quantization by the tensor's own scale and zero point: q = round(x / scale) + zero_point, clipped to its type.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle, OutstationError
from agent.model.inference.tensors import Tensor

try:
    import ai_edge_litert as package
    from ai_edge_litert.interpreter import Interpreter

    PACKAGE = "ai-edge-litert"
except ImportError:
    try:
        import tflite_runtime as package
        from tflite_runtime.interpreter import Interpreter

        PACKAGE = "tflite-runtime"
    except ImportError:
        raise OutstationError(
            "no TFLite runtime on this machine: install ai-edge-litert (64-bit), or tflite-runtime with Python 3.11"
        ) from None

RUNTIME_NAME = f"{PACKAGE} {package.__version__}"
# Where nobody tried: dense models have most of their gain by then, convolutions none beyond.
DEFAULT_BATCH = 32
# Memory of a large batch is never given back.
MAX_BATCH = 128
# Values that are quantized at once: what the cache of a small processor holds, and few calls of numpy.
_QUANTIZE_BLOCK = 1 << 15
# What a model uses to remember: its answers would depend on what it was asked before, and on restarts.
_STATE_OPS = frozenset({"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE"})

Floats = NDArray[np.float32]


class TfliteModel:
    """A loaded model with one input and one output, `batch` rows at a time on `threads` threads. Not thread-safe.

    `seconds` that all runs took.
    """

    def __init__(
        self, content: bytes, batch: int = DEFAULT_BATCH, threads: int = 1, output: str | int | None = None
    ) -> None:
        """`output`: the name or index of the one that is used, where there are several.

        Raises BadBundle where it cannot be run here; a damaged model may crash the process: probe first.
        """
        self._output_selector, self.seconds = output, 0.0
        if not content:
            raise BadBundle("the model is empty: 0 bytes")
        self._content, self.threads = content, min(threads, os.cpu_count() or 1)
        self._load()
        # Resizing a fixed batch can silently merge rows: only a batch the model declares dynamic is resized.
        self.has_dynamic_batch = int(self._input_details.get("shape_signature", self._input_details["shape"])[0]) == -1
        self.has_dynamic_batch = self.has_dynamic_batch and self._can_resize()
        self.batch = self._allocated_batch
        self.set_batch_size(batch)

    def set_batch_size(self, batch: int) -> None:
        """Run at most `batch` rows at once from now on; a model made for a fixed batch keeps to that."""
        if self.has_dynamic_batch:
            self.batch = min(batch, MAX_BATCH)

    @property
    def input_range(self) -> tuple[float, float]:
        """The least and the largest value the input tensor tells apart; of a float input, where most values lie."""
        if self._input_dtype.kind == "f":
            return -3.0, 3.0
        scale, zero = self._input_details["quantization"]
        limits = np.iinfo(self._input_dtype)
        return (limits.min - zero) * (scale or 1.0), (limits.max - zero) * (scale or 1.0)

    @property
    def output_step(self) -> float:
        """The difference between two neighbouring outputs of a quantized model; 0 where outputs are floats."""
        return (
            0.0
            if np.dtype(self._output_details["dtype"]).kind == "f"
            else float(self._output_details["quantization"][0] or 1.0)
        )

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows` (w, …), whose other dimensions hold as many values as the model's input.

        NaN counts as 0 where the input is quantized. Raises BadBundle.
        """
        count = len(windows)
        if windows.size != count * math.prod(self.input_shape):
            raise BadBundle(f"the model takes {list(self.input_shape)} values, it was given {list(windows.shape[1:])}")
        begun_s = time.perf_counter()
        rows = windows.reshape(count, *self.input_shape)
        out = np.empty((count, self.outputs), self._output_details["dtype"])
        block = max(1, _QUANTIZE_BLOCK // (self.batch * math.prod(self.input_shape))) * self.batch
        with _runtime_errors():
            for start in range(0, count, block):
                self._run_batches(self._quantize(rows[start : start + block]), out[start : start + block])
        outputs = self._dequantize(out)
        self.seconds += time.perf_counter() - begun_s
        return outputs

    def _load(self) -> None:
        with _runtime_errors():
            # From bytes: a file that is cut short after it was mapped ends the process with SIGBUS.
            self._interpreter: Any = Interpreter(model_content=self._content, num_threads=self.threads)
            self._interpreter.allocate_tensors()
            inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._output_details = _select_output(outputs, self._output_selector)
        _check_tensors(inputs, self._output_details)
        _check_stateless(self._interpreter)
        self._input_details = inputs[0]
        self._input_dtype: np.dtype[Any] = np.dtype(self._input_details["dtype"])
        self.input_shape = tuple(int(d) for d in self._input_details["shape"][1:])
        self._allocated_batch = int(self._input_details["shape"][0])
        with _runtime_errors():
            # Only a run tells the output's shape for certain.
            self.outputs = self._run_batch(np.zeros(self._input_details["shape"], self._input_dtype)).shape[1]

    def _run_batches(self, rows: NDArray[Any], out: NDArray[Any]) -> None:
        """Raw outputs of quantized `rows` into `out`, batch by batch."""
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            kept = len(part)
            if self.has_dynamic_batch:
                # A shorter last batch runs at its own size: 5 to 20 µs, where padding costs what its rows cost.
                self._resize(kept)
            elif kept < self._allocated_batch:
                part = np.concatenate([part, np.repeat(part[-1:], self._allocated_batch - kept, axis=0)])
            out[start : start + kept] = self._run_batch(part)[:kept]

    def _run_batch(self, part: NDArray[Any]) -> NDArray[Any]:
        """Raw outputs (B, K) of one batch in the tensor's type."""
        self._interpreter.set_tensor(self._input_details["index"], part)
        self._interpreter.invoke()
        raw: NDArray[Any] = self._interpreter.get_tensor(self._output_details["index"])
        if raw.ndim == 0 or len(raw) != len(part):
            raise BadBundle(f"the model gives {list(raw.shape)} for a batch of {len(part)}; the first must count rows")
        return raw.reshape(len(part), -1)

    def _can_resize(self) -> bool:
        """Whether the batch the model declares works; where it does not, rows are run as the model comes."""
        try:
            with _runtime_errors():
                # Of two rows: thirty-two of a large model would hold up each start for seconds.
                self._resize(2)
                self._run_batch(np.zeros((2, *self.input_shape), self._input_dtype))
        except BadBundle:
            self._load()
            return False
        return True

    def _resize(self, size: int) -> None:
        if size != self._allocated_batch:
            self._interpreter.resize_tensor_input(self._input_details["index"], [size, *self.input_shape], strict=True)
            self._interpreter.allocate_tensors()
            self._allocated_batch = size

    def _quantize(self, values: Floats) -> NDArray[Any]:
        kind = self._input_dtype
        if kind.kind == "f":
            floats: NDArray[Any] = values.astype(kind, copy=False)
            return floats
        scale, zero = self._input_details["quantization"]
        limits = np.iinfo(kind)
        # A 32-bit limit is no float32: it would round up, past what the type holds.
        exact = np.float32 if kind.itemsize <= 2 else np.float64
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = values / exact(scale or 1.0)
            np.rint(scaled, out=scaled)
            scaled += zero
            np.clip(scaled, limits.min, limits.max, out=scaled)
            # A sum is the cheapest way to see a NaN.
            if math.isnan(scaled.sum()):
                scaled[np.isnan(scaled)] = min(max(zero, limits.min), limits.max)
            quantized: NDArray[Any] = scaled.astype(kind)
        return quantized

    def _dequantize(self, raw: NDArray[Any]) -> Floats:
        if raw.dtype.kind == "f":
            return raw.astype(np.float32, copy=False)
        scale, zero = self._output_details["quantization"]
        values: Floats = raw.astype(np.float32)
        values -= zero
        values *= np.float32(scale or 1.0)
        return values


def list_tensors(content: bytes) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a model, as it declares them. Raises BadBundle."""
    with _runtime_errors():
        interpreter = Interpreter(model_content=content)
        interpreter.allocate_tensors()
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    return [_to_tensor(one) for one in inputs], [_to_tensor(one) for one in outputs]


def _to_tensor(detail: Any) -> Tensor:
    shape = [int(size) for size in detail["shape"]]
    signature = [int(size) for size in detail.get("shape_signature", shape)] or shape
    scale, zero = detail["quantization"]
    kind, limits = np.dtype(detail["dtype"]), None
    if scale and kind.kind in "iu":
        held = np.iinfo(kind)
        limits = (float((held.min - zero) * scale), float((held.max - zero) * scale))
    batch = 0 if signature[:1] == [-1] else (shape or [1])[0]
    return Tensor(str(detail["name"]), tuple(shape[1:]), batch, kind.name, limits)


def _select_output(outputs: list[Any], selector: str | int | None) -> Any:
    """The output that the manifest names, or the only one. Raises BadBundle that lists what there is."""
    if selector is None and len(outputs) == 1:
        return outputs[0]
    if isinstance(selector, int) and 0 <= selector < len(outputs):
        return outputs[selector]
    named = [tensor for tensor in outputs if tensor["name"] == selector]
    if len(named) == 1:
        return named[0]
    there = ", ".join(f"{i}: {o['name']!r} {[int(d) for d in o['shape']]}" for i, o in enumerate(outputs))
    asked = f"no output {selector!r}" if selector is not None else f"{len(outputs)} outputs"
    raise BadBundle(f"the model has {asked}; name the one to use with [output] tensor, of {there}")


def _check_tensors(inputs: list[Any], output: Any) -> None:
    if len(inputs) != 1:
        raise BadBundle(f"the model has {len(inputs)} inputs, one is supported; join them into one in the model")
    for tensor in (*inputs, output):
        kind = np.dtype(tensor["dtype"])
        if kind.kind not in "fiu":
            raise BadBundle(f"tensor {tensor['name']!r} holds {kind.name}; only numbers are supported")
        if len(tensor["shape"]) == 0:
            raise BadBundle(f"tensor {tensor['name']!r} has no dimensions; the first must count rows")
    if inputs[0]["shape"][0] < 1:
        raise BadBundle("the model takes batches of no rows; give its input a batch of 1, or a free one")


def _check_stateless(interpreter: Any) -> None:
    """A model that remembers is refused. Raises BadBundle."""
    # Both runtimes have this, unofficially; without it the probe's runs have to tell.
    ops: list[dict[str, Any]] = getattr(interpreter, "_get_ops_details", list)()
    used = sorted({op["op_name"] for op in ops} & _STATE_OPS)
    if used:
        raise BadBundle(
            f"the model remembers what it saw before ({', '.join(used)}), so its answers depend on more than their "
            "rows; export it without state, with the history it needs as its input window"
        )


@contextlib.contextmanager
def _runtime_errors() -> Iterator[None]:
    """Both runtimes raise one of these or another for one and the same: a bad model."""
    try:
        yield
    except MemoryError as error:
        raise BadBundle(f"{RUNTIME_NAME}: not enough memory for the model ([limits] memory_mib)") from error
    except (RuntimeError, ValueError, TypeError, SystemError, OverflowError) as error:
        raise BadBundle(f"{RUNTIME_NAME}: {_explain_error(str(error).strip())}") from error


def _explain_error(message: str) -> str:
    """What the runtime said, and what to do where that is known."""
    if "Select TensorFlow op" in message:
        return "the model uses TensorFlow operations that it does not have; convert it with TFLITE_BUILTINS only"
    if custom := re.search(r"unresolved custom op: ([\w-]+)", message):
        return (
            f"the model uses the custom operation {custom[1]!r}, which no runtime here has; convert it without, or, of "
            "a model compiled for an accelerator, take the file from before that"
        )
    if "quantized_dimension" in message:
        return (
            f"{message[:100]}…: its quantization is not as the format asks; convert the model again with a current "
            "TensorFlow"
        )
    return message[:300] or "no reason given, as where memory is short ([limits] memory_mib)"

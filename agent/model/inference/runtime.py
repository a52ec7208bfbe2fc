"""TFLite runtime: float windows in, float outputs out, in true batches. The only importer of a TFLite package.

Quantization by the tensor's own scale and zero point: q = round(x / scale) + zero_point, clipped to its type.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.arrays import Float32s
from agent.errors import BadBundle
from agent.indices import repeat
from agent.kernel import library as kernel
from agent.kernel import quantization
from agent.model.inference.runtime_name import runtime_name
from agent.model.inference.tensors import ONE_TENSOR, Tensor, TensorSelection
from agent.model.inference.tuning import DEFAULT_BATCH, Tuning

# The package that `runtime_name` names, imported once.
try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    # NumPy measures its types at first use, and warns where numbers near 0 are flushed to 0. On 32-bit ARM this package
    # sets the processor to do so as soon as it is loaded.
    np.finfo(np.float32)
    np.finfo(np.float64)
    from tflite_runtime.interpreter import Interpreter

# The runtime never frees the memory of a large batch.
MAX_BATCH = 128
# Values quantized at once: they fit the cache of a small processor, and keep the calls of numpy few.
_QUANTIZE_BLOCK = 1 << 15
# Operations of a stateful model, whose outputs depend on earlier inputs and on restarts: resource variables, and
# recurrent layers, whose variable tensors the runtime resets at loading only.
_STATE_OPS = frozenset(
    {
        *("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "LSTM", "RNN", "SVDF"),
        *("UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN"),
        *("BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN"),
    }
)
_FAST_KERNELS = "XNNPACK"
# Operation that stands for those which a delegate took over. By itself the interpreter applies XNNPACK only.
_DELEGATE_OP = "DELEGATE"
# XNNPACK asks them for the features of the processor; without an answer the interpreter runs without it, silently.
_PROCESSOR_FILES = ("/sys/devices/system/cpu/possible", "/sys/devices/system/cpu/present", "/proc/cpuinfo")
_unreadable_files: list[str] = []

if TYPE_CHECKING:
    from agent.model.bundle.manifest import Manifest


class TfliteModel:
    """Loaded model. Not thread-safe. `seconds` is the time of all runs.

    The values of several inputs, and of several outputs, follow one another in the order of their selection.
    """

    def __init__(
        self, content: bytes, batch: int = DEFAULT_BATCH, threads: int = 1, tensors: TensorSelection = ONE_TENSOR
    ) -> None:
        """Load a model; a damaged one may crash: probe it first. Raises BadBundle."""
        self._tensors, self.seconds = tensors, 0.0
        if not content:
            raise BadBundle("the model is empty: 0 bytes")
        self._content, self.threads = content, min(threads, os.cpu_count() or 1)
        self._load()
        # Resizing a fixed batch can silently merge rows: only a batch that the model declares dynamic is resized.
        is_dynamic = all(int(tensor.get("shape_signature", tensor["shape"])[0]) == -1 for tensor in self._inputs)
        self.has_dynamic_batch = is_dynamic and self._can_resize()
        self.batch = self._allocated_batch
        self.set_batch_size(batch)

    def set_batch_size(self, batch: int) -> None:
        """Set the largest batch, up to MAX_BATCH; a model with a fixed batch keeps it."""
        if self.has_dynamic_batch:
            self.batch = min(batch, MAX_BATCH)

    @property
    def kernels(self) -> str:
        """Kernels that compute the model: "XNNPACK" if they run any part, else "without XNNPACK"."""
        return _FAST_KERNELS if self._uses_xnnpack else f"without {_FAST_KERNELS}"

    @property
    def input_range(self) -> tuple[float, float]:
        """Lowest and highest value of quantized inputs, common to several; for float inputs that of most values."""
        ranges = [_quantized_range(tensor) or (-3.0, 3.0) for tensor in self._inputs]
        common = max(low for low, _ in ranges), min(high for _, high in ranges)
        return common if common[0] < common[1] else ranges[0]

    @property
    def output_range(self) -> tuple[float, float]:
        """Lowest and highest value of the first output, if quantized; no limits for a float output."""
        return _quantized_range(self._outputs[0]) or (-math.inf, math.inf)

    @property
    def output_steps(self) -> list[float]:
        """Difference between neighbouring values of each output tensor, if quantized; 0 for floats."""
        return [
            0.0 if np.dtype(tensor["dtype"]).kind == "f" else float(tensor["quantization"][0] or 1.0)
            for tensor in self._outputs
        ]

    def describe_input(self) -> Tensor:
        """Return the first input that the manifest describes."""
        return _to_tensor(self._inputs[0])

    def allocate(self, shape: tuple[int, ...]) -> Float32s:
        return np.empty(shape, np.float32)

    def invoke(self, windows: Float32s) -> Float32s:
        """Return the outputs (w, K) of `windows` (w, …); NaN counts as 0 in a quantized input. Raises BadBundle."""
        count = len(windows)
        if windows.size != count * math.prod(self.input_shape):
            raise BadBundle(f"the model takes {list(self.input_shape)} values, got {list(windows.shape[1:])}")
        start_s = time.perf_counter()
        rows = windows.reshape(count, *self.input_shape)
        raw = [np.empty((count, n), t["dtype"]) for t, n in zip(self._outputs, self.output_sizes, strict=True)]
        block = max(1, _QUANTIZE_BLOCK // (self.batch * math.prod(self.input_shape))) * self.batch
        with _runtime_errors():
            for start in range(0, count, block):
                part = slice(start, start + block)
                self._run_batches(self._quantize_inputs(rows[part]), [out[part] for out in raw])
        parts = [_dequantize(out, tensor) for out, tensor in zip(raw, self._outputs, strict=True)]
        outputs = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        self.seconds += time.perf_counter() - start_s
        return outputs

    def _load(self) -> None:
        with _runtime_errors():
            # From bytes: if a mapped file were truncated, SIGBUS would end the process.
            self._interpreter: Any = Interpreter(model_content=self._content, num_threads=self.threads)
            self._interpreter.allocate_tensors()
            inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        aliases = _signature_names(self._interpreter)
        if len(self._tensors.inputs) != len(inputs):
            raise BadBundle(
                f"the model has {len(inputs)} inputs, of {_list_tensors(inputs)}, and the manifest describes "
                f"{len(self._tensors.inputs)}; [inputs.NAME] of the SPEC describes each but the first"
            )
        self._inputs = _select(inputs, self._tensors.inputs, aliases["inputs"], "input")
        self._outputs = _select(outputs, self._tensors.outputs, aliases["outputs"], "output")
        for tensor in (*self._inputs, *self._outputs):
            kind = np.dtype(tensor["dtype"])
            if kind.kind not in "fiu":
                raise BadBundle(f"tensor {tensor['name']!r} has type {kind.name}; only numbers are supported")
            if len(tensor["shape"]) == 0:
                raise BadBundle(f"tensor {tensor['name']!r} has no dimensions; the first must count rows")
        batches = {int(tensor["shape"][0]) for tensor in self._inputs}
        if min(batches) < 1:
            raise BadBundle("the model has batches of 0 rows; give its input a batch of 1, or a dynamic one")
        if len(batches) > 1:
            raise BadBundle(f"the inputs have batches of {sorted(batches)} rows; give all the same, or a dynamic one")
        # Both runtimes have this method, unofficially. Without it the probe detects state by running the model.
        ops: list[dict[str, Any]] = getattr(self._interpreter, "_get_ops_details", list)()
        names = {op["op_name"] for op in ops}
        self._uses_xnnpack = _DELEGATE_OP in names
        used = sorted(names & _STATE_OPS)
        if used:
            raise BadBundle(
                f"the model keeps state between inferences ({', '.join(used)}), so a result depends on earlier rows; "
                "export it without state: the history it needs as its input window, recurrent layers of Keras with "
                "stateful=False and unroll=True"
            )
        shapes = [tuple(int(d) for d in tensor["shape"][1:]) for tensor in self._inputs]
        self.input_sizes = [math.prod(shape) for shape in shapes]
        self.input_shape = shapes[0] if len(shapes) == 1 else (sum(self.input_sizes),)
        self._input_shapes = shapes
        self._allocated_batch = int(self._inputs[0]["shape"][0])
        with _runtime_errors():
            # Only a run shows the output's shape reliably.
            self.output_sizes = [out.shape[1] for out in self._run_batch(self._zeros(self._allocated_batch))]
        self.outputs = sum(self.output_sizes)

    def _zeros(self, batch: int) -> list[NDArray[Any]]:
        return [
            np.zeros((batch, *shape), tensor["dtype"])
            for tensor, shape in zip(self._inputs, self._input_shapes, strict=True)
        ]

    def _run_batches(self, inputs: list[NDArray[Any]], outs: list[NDArray[Any]]) -> None:
        """Write the raw outputs of quantized `inputs` into `outs`, batch by batch."""
        total = len(outs[0])
        for start in range(0, total, self.batch):
            parts = [rows[start : start + self.batch] for rows in inputs]
            count = min(self.batch, total - start)
            if self.has_dynamic_batch:
                # A shorter last batch is resized for 5 to 20 µs; padding would cost the time of its rows.
                self._resize(count)
            elif count < self._allocated_batch:
                lacking = self._allocated_batch - count
                parts = [np.concatenate([part, repeat(part[-1:], lacking, axis=0)]) for part in parts]
            for out, raw in zip(outs, self._run_batch(parts), strict=True):
                out[start : start + count] = raw[:count]

    def _run_batch(self, parts: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the raw outputs (B, K) of one batch, in each tensor's type."""
        for tensor, part in zip(self._inputs, parts, strict=True):
            self._interpreter.set_tensor(tensor["index"], part)
        self._interpreter.invoke()
        outs, batch = [], len(parts[0])
        for tensor in self._outputs:
            raw: NDArray[Any] = self._interpreter.get_tensor(tensor["index"])
            if raw.ndim == 0 or len(raw) != batch:
                raise BadBundle(
                    f"the model returns {list(raw.shape)} for a batch of {batch}; its first dimension must count rows"
                )
            outs.append(raw.reshape(batch, -1))
        return outs

    def _can_resize(self) -> bool:
        """Return True if the dynamic batch that the model declares works; else reload the model."""
        try:
            with _runtime_errors():
                # Two rows: thirty-two of a large model would delay each start by seconds.
                self._resize(2)
                self._run_batch(self._zeros(2))
        except BadBundle:
            self._load()
            return False
        return True

    def _resize(self, size: int) -> None:
        if size != self._allocated_batch:
            for tensor, shape in zip(self._inputs, self._input_shapes, strict=True):
                self._interpreter.resize_tensor_input(tensor["index"], [size, *shape], strict=True)
            self._interpreter.allocate_tensors()
            self._allocated_batch = size

    def _quantize_inputs(self, rows: Float32s) -> list[NDArray[Any]]:
        """Return the values `rows` (n, …) of each input in its type and shape."""
        if len(self._inputs) == 1:
            return [_quantize(rows, self._inputs[0])]
        splits = np.split(rows, np.cumsum(self.input_sizes)[:-1], axis=1)
        return [
            _quantize(np.ascontiguousarray(part), tensor).reshape(len(rows), *shape)
            for part, tensor, shape in zip(splits, self._inputs, self._input_shapes, strict=True)
        ]


def _quantized_range(tensor: dict[str, Any]) -> tuple[float, float] | None:
    """Return the lowest and highest value of a quantized tensor; None for floats."""
    kind = np.dtype(tensor["dtype"])
    if kind.kind == "f":
        return None
    (scale, zero), limits = tensor["quantization"], np.iinfo(kind)
    return (limits.min - zero) * (scale or 1.0), (limits.max - zero) * (scale or 1.0)


def _quantize(values: Float32s, tensor: dict[str, Any]) -> NDArray[Any]:
    kind = np.dtype(tensor["dtype"])
    if kind.kind == "f":
        floats: NDArray[Any] = values.astype(kind, copy=False)
        return floats
    scale, zero = tensor["quantization"]
    library = kernel.kernel()
    if library is not None:
        quantized = quantization.quantize(library, values, scale or 1.0, int(zero), kind)
        if quantized is not None:
            return quantized
    return quantize_by_numpy(values, scale or 1.0, int(zero), kind)


def _dequantize(raw: NDArray[Any], tensor: dict[str, Any]) -> Float32s:
    if raw.dtype.kind == "f":
        return raw.astype(np.float32, copy=False)
    scale, zero = tensor["quantization"]
    values: Float32s = raw.astype(np.float32)
    values -= zero
    values *= np.float32(scale or 1.0)
    return values


def quantize_by_numpy(values: Float32s, scale: float, zero: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """Quantize `values`; the compiled kernel gives the same."""
    limits = np.iinfo(kind)
    # A 32-bit limit is not a float32: it would round up, beyond the type's range.
    exact = np.float32 if kind.itemsize <= 2 else np.float64
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scaled = values / exact(scale)
        np.rint(scaled, out=scaled)
        scaled += zero
        np.clip(scaled, limits.min, limits.max, out=scaled)
        # A sum is the cheapest test for NaN.
        if math.isnan(scaled.sum()):
            scaled[np.isnan(scaled)] = min(max(zero, limits.min), limits.max)
        quantized: NDArray[Any] = scaled.astype(kind)
    return quantized


def detect_processor(content: bytes) -> None:
    """Let the runtime read the processor's features from files, by preparing the trusted model `content`.

    A confined process can read no files; the runtime would then choose its slowest kernels.
    """
    # Errors name the runtime; its version is in a file, too, and so is the compiled kernel.
    runtime_name()
    kernel.kernel()
    _unreadable_files[:] = [path for path in _PROCESSOR_FILES if not _is_readable(path)]
    if content:
        TfliteModel(content, 1)


def _is_readable(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def explain_kernels(model: TfliteModel) -> str:
    """Return why other kernels than the publisher's may have run the model; "" if nothing is known."""
    if model.kernels == _FAST_KERNELS or not _unreadable_files:
        return ""
    folder = "/sys" if _unreadable_files[0].startswith("/sys") else "/proc"
    return (
        f"; {_FAST_KERNELS}, the runtime's fast kernels, did not run: {_unreadable_files[0]} names the processor's "
        f"features and cannot be read; make {folder} visible to the program (in a container or chroot, mount it)"
    )


def load_model(manifest: Manifest, content: bytes, tuning: Tuning | None = None) -> TfliteModel:
    """Load the model with the manifest's tensors, and batch size and threads of `tuning`. Raises BadBundle."""
    batch, threads = (tuning.batch, tuning.threads) if tuning else (DEFAULT_BATCH, 1)
    return TfliteModel(content, batch, threads, manifest.tensors)


def list_tensors(content: bytes) -> tuple[list[Tensor], list[Tensor]]:
    """Return the declared inputs and outputs of a model. Raises BadBundle."""
    with _runtime_errors():
        interpreter = Interpreter(model_content=content)
        interpreter.allocate_tensors()
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    return [_to_tensor(detail) for detail in inputs], [_to_tensor(detail) for detail in outputs]


def _to_tensor(detail: Any) -> Tensor:
    shape = [int(size) for size in detail["shape"]]
    signature = [int(size) for size in detail.get("shape_signature", shape)] or shape
    scale, zero = detail["quantization"]
    kind, limits = np.dtype(detail["dtype"]), None
    if scale and kind.kind in "iu":
        integers = np.iinfo(kind)
        limits = (float((integers.min - zero) * scale), float((integers.max - zero) * scale))
    batch = 0 if signature[:1] == [-1] else (shape or [1])[0]
    return Tensor(str(detail["name"]), tuple(shape[1:]), batch, kind.name, limits)


def _signature_names(interpreter: Any) -> dict[str, dict[str, int]]:
    """Return the names that the model's first signature gives its tensors, by "inputs" and "outputs"."""
    # Both runtimes have this method, unofficially. Without it tensors are selected by their own names.
    signatures: dict[str, dict[str, dict[str, int]]] = getattr(interpreter, "_get_full_signature_list", dict)()
    first: dict[str, dict[str, int]] = next(iter(signatures.values()), {})
    return {key: dict(first.get(key, {})) for key in ("inputs", "outputs")}


def _select(
    tensors: list[Any], selectors: Sequence[str | int | None], names: Mapping[str, int], noun: str
) -> list[Any]:
    """Return the tensors that the manifest names, None for the one left. Raises BadBundle, which lists the tensors."""
    chosen = [None if selector is None else _find(tensors, selector, names, noun) for selector in selectors]
    taken = [int(tensor["index"]) for tensor in chosen if tensor is not None]
    if len(set(taken)) != len(taken):
        raise BadBundle(f"an {noun} of the model is named twice: {_list_tensors(tensors)}")
    left = [tensor for tensor in tensors if int(tensor["index"]) not in taken]
    if None in chosen and len(left) != 1:
        raise BadBundle(
            f"the model has {len(tensors)} {noun}s; select one with [{noun}] tensor, of {_list_tensors(tensors)}"
        )
    return [left[0] if tensor is None else tensor for tensor in chosen]


def _find(tensors: list[Any], selector: str | int, names: Mapping[str, int], noun: str) -> Any:
    if isinstance(selector, int) and 0 <= selector < len(tensors):
        return tensors[selector]
    index = names.get(str(selector))
    matches = [tensor for tensor in tensors if tensor["name"] == selector or tensor["index"] == index]
    if len(matches) == 1:
        return matches[0]
    raise BadBundle(
        f"the model has no {noun} {selector!r}; select one with [{noun}] tensor, of {_list_tensors(tensors)}"
    )


def _list_tensors(tensors: Sequence[Any]) -> str:
    return ", ".join(f"{i}: {o['name']!r} {[int(d) for d in o['shape']]}" for i, o in enumerate(tensors))


@contextlib.contextmanager
def _runtime_errors() -> Iterator[None]:
    """Raise BadBundle for every exception with which a runtime reports a bad model."""
    try:
        yield
    except MemoryError as error:
        raise BadBundle(f"{runtime_name()}: not enough memory for the model ([limits] memory_mib)") from error
    except (RuntimeError, ValueError, TypeError, SystemError, OverflowError) as error:
        raise BadBundle(f"{runtime_name()}: {_explain_error(str(error).strip())}") from error


def _explain_error(message: str) -> str:
    if "Select TensorFlow op" in message:
        return "the model uses TensorFlow operations, which it lacks; convert it with TFLITE_BUILTINS only"
    if custom := re.search(r"unresolved custom op: ([\w-]+)", message):
        return (
            f"the model uses the custom operation {custom[1]!r}, which no runtime here has; convert it without, or use "
            "the file from before it was compiled for an accelerator"
        )
    if "quantized_dimension" in message:
        return (
            f"{message[:100]}…: its quantization does not follow the format; convert the model again with a current "
            "TensorFlow"
        )
    return message[:300] or "no reason given; memory may be short ([limits] memory_mib)"

"""TFLite runtime: windows in, outputs out, in true batches, quantized as the tensors say. The only importer of a TFLite
package.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s
from outstation.foundation.errors import BadBundle, ModelProcessFailed
from outstation.foundation.indices import repeat
from outstation.ml.kernel import library as kernel
from outstation.ml.model.bundle.tensor_selection import ONE_TENSOR, TensorSelection
from outstation.ml.model.inference.quantization import Quantization
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.tensors import Tensor
from outstation.ml.model.inference.tuning import DEFAULT_BATCH, Tuning

# The package that `runtime_name` names, imported once.
try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    # NumPy measures its types at first use, and warns where numbers near 0 are flushed to 0. On 32-bit ARM this package
    # sets the processor to do so as soon as it is loaded.
    np.finfo(np.float32)
    np.finfo(np.float64)
    from tflite_runtime.interpreter import Interpreter

_FLOATS = Quantization("float32")
# The runtime never frees the memory of a large batch.
MAX_BATCH = 128
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
    from outstation.ml.model.bundle.manifest import Manifest


class FinishedRun(msgspec.Struct, eq=False):
    """Outputs (w, K) of a run, in the tensor's numbers, and the time it took."""

    numbers: NDArray[Any]
    seconds: float
    failure: ModelProcessFailed | None = None


class TfliteModel:
    """Loaded model. Not thread-safe. `seconds` is the time of all runs.

    The values of several inputs, and of several outputs, follow one another in the order of their selection, as floats.
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
        return self.input.input_range

    @property
    def output_range(self) -> tuple[float, float]:
        return self.output.range

    @property
    def output_steps(self) -> list[float]:
        """Difference between neighbouring values of each output tensor, if quantized; 0 for floats."""
        return [0.0 if kind.is_float else kind.scale for kind in self._output_kinds]

    def describe_input(self) -> Tensor:
        """Return the first input that the manifest describes."""
        return _to_tensor(self._inputs[0])

    @property
    def is_concurrent(self) -> bool:
        return False

    def allocate(self, count: int) -> NDArray[Any]:
        return np.empty((count, math.prod(self.input_shape)), self.input.dtype)

    def invoke(self, windows: Float32s) -> Float32s:
        """Return the outputs (w, K) of `windows` (w, …); NaN counts as 0 in a quantized input. Raises BadBundle."""
        if windows.size != len(windows) * math.prod(self.input_shape):
            raise BadBundle(f"the model takes {list(self.input_shape)} values, got {list(windows.shape[1:])}")
        return self.output.dequantize(self.run(self.input.quantize(windows)))

    def start_run(self, windows: NDArray[Any]) -> FinishedRun:
        """Return the run of `windows`, quantized, with its outputs. Raises BadBundle."""
        before_s = self.seconds
        return FinishedRun(self.run(windows), self.seconds - before_s)

    def wait(self, run: FinishedRun) -> NDArray[Any]:
        return run.numbers

    def run(self, windows: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the outputs (w, K) of windows, both in their tensors' numbers; `out` takes them. Raises BadBundle."""
        start_s = time.perf_counter()
        rows = windows.reshape(len(windows), *self.input_shape)
        outputs = np.empty((len(rows), self.outputs), self.output.dtype) if out is None else out
        with _runtime_errors():
            self._run_batches(rows, outputs)
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
        self._input_kinds = [_quantization(tensor) for tensor in self._inputs]
        self._output_kinds = [_quantization(tensor) for tensor in self._outputs]
        # Several tensors are quantized here, each by its own scale.
        self.input = self._input_kinds[0] if len(self._inputs) == 1 else _FLOATS
        self.output = self._output_kinds[0] if len(self._outputs) == 1 else _FLOATS
        self._input_shapes = [tuple(int(d) for d in tensor["shape"][1:]) for tensor in self._inputs]
        self.input_sizes = [math.prod(shape) for shape in self._input_shapes]
        self.input_shape = self._input_shapes[0] if len(self._inputs) == 1 else (sum(self.input_sizes),)
        self._allocated_batch = int(self._inputs[0]["shape"][0])
        with _runtime_errors():
            # Only a run shows the output's shape reliably.
            self._run_batch(np.zeros((self._allocated_batch, *self.input_shape), self.input.dtype))
            self.output_sizes = [raw.shape[1] for raw in self._read_outputs(self._allocated_batch)]
        self.outputs = sum(self.output_sizes)

    def _run_batches(self, rows: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the raw outputs of quantized `rows` into `out`, batch by batch."""
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            count = len(part)
            if self.has_dynamic_batch:
                # A shorter last batch is resized for 5 to 20 µs; padding would cost the time of its rows.
                self._resize(count)
            elif count < self._allocated_batch:
                part = np.concatenate([part, repeat(part[-1:], self._allocated_batch - count, axis=0)])
            out[start : start + count] = self._run_batch(part)[:count]

    def _run_batch(self, part: NDArray[Any]) -> NDArray[Any]:
        """Return the outputs (B, K) of one batch, in the numbers of `output`."""
        if len(self._inputs) == 1:
            self._interpreter.set_tensor(self._inputs[0]["index"], part)
        else:
            splits = np.split(part, np.cumsum(self.input_sizes)[:-1], axis=1)
            for tensor, kind, shape, values in zip(
                self._inputs, self._input_kinds, self._input_shapes, splits, strict=True
            ):
                numbers = kind.quantize(np.ascontiguousarray(values))
                self._interpreter.set_tensor(tensor["index"], numbers.reshape(len(part), *shape))
        self._interpreter.invoke()
        raw = self._read_outputs(len(part))
        if len(raw) == 1:
            return raw[0]
        kinds = self._output_kinds
        return np.concatenate([kind.dequantize(numbers) for kind, numbers in zip(kinds, raw, strict=True)], axis=1)

    def _read_outputs(self, batch: int) -> list[NDArray[Any]]:
        """Return the numbers (B, K) of each output tensor."""
        outputs = []
        for tensor in self._outputs:
            raw: NDArray[Any] = self._interpreter.get_tensor(tensor["index"])
            if raw.ndim == 0 or len(raw) != batch:
                raise BadBundle(
                    f"the model returns {list(raw.shape)} for a batch of {batch}; its first dimension must count rows"
                )
            outputs.append(raw.reshape(batch, -1))
        return outputs

    def _can_resize(self) -> bool:
        """Return True if the dynamic batch that the model declares works; else reload the model."""
        try:
            with _runtime_errors():
                # Two rows: thirty-two of a large model would delay each start by seconds.
                self._resize(2)
                self._run_batch(np.zeros((2, *self.input_shape), self.input.dtype))
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


def _quantization(detail: Any) -> Quantization:
    scale, zero = detail["quantization"]
    return Quantization(np.dtype(detail["dtype"]).name, float(scale or 1.0), int(zero))


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

"""The TFLite interpreter: float windows in, float outputs out, in true batches. The only importer of a runtime.

Quantization by the tensor's own scale and zero point: q = round(x / scale) + zero_point, clipped to its type.
"""

from __future__ import annotations

import contextlib
import os
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle, OutstationError

try:
    from ai_edge_litert.interpreter import Interpreter

    PACKAGE = "ai-edge-litert"
except ImportError:
    try:
        from tflite_runtime.interpreter import Interpreter

        PACKAGE = "tflite-runtime"
    except ImportError:
        raise OutstationError(
            "no TFLite runtime on this machine: install ai-edge-litert (64-bit), or tflite-runtime with Python 3.11"
        ) from None

NAME = f"{PACKAGE} {metadata.version(PACKAGE)}"
# Past 32 rows convolutions gain nothing, and memory of a large batch is never given back.
BATCH = 32

Floats = NDArray[np.float32]


class Model:
    """A loaded model with one input and one output. Not thread-safe."""

    def __init__(self, content: bytes, threads: int = 1) -> None:
        """Raises BadBundle where the runtime cannot load it; a damaged model may crash the process: probe first."""
        with _runtime_errors():
            # From bytes: a file that is cut short after it was mapped ends the process with SIGBUS.
            self._interpreter: Any = Interpreter(model_content=content, num_threads=min(threads, os.cpu_count() or 1))
            self._interpreter.allocate_tensors()
            inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1:
            raise BadBundle(f"model has {len(inputs)} inputs and {len(outputs)} outputs; one of each is supported")
        self._in, self._out = inputs[0], outputs[0]
        signature = [int(d) for d in self._in.get("shape_signature", self._in["shape"])]
        self.input_shape = tuple(int(d) for d in self._in["shape"][1:])
        self.outputs = int(np.prod(self._out["shape"][1:]))
        # Resizing a fixed batch can silently merge rows: only a batch the model declares dynamic is resized.
        self.batch = BATCH if signature and signature[0] == -1 else int(self._in["shape"][0])
        self._dynamic = bool(signature) and signature[0] == -1
        self._size = int(self._in["shape"][0])

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows` (w, …), whose other dimensions hold as many values as the model's input."""
        count = len(windows)
        out = np.empty((count, self.outputs), np.float32)
        quantized = self._quantize(windows.reshape(count, *self.input_shape))
        done = 0
        with _runtime_errors():
            while done < count:
                size = self._resize(count - done)
                part = quantized[done : done + size]
                if len(part) < size:
                    part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
                self._interpreter.set_tensor(self._in["index"], part)
                self._interpreter.invoke()
                raw = self._interpreter.get_tensor(self._out["index"]).reshape(size, -1)
                kept = min(size, count - done)
                out[done : done + kept] = self._dequantize(raw[:kept])
                done += kept
        return out

    def _resize(self, remaining: int) -> int:
        """The batch size the interpreter now has: full batches, and single rows where few are left."""
        if not self._dynamic:
            return self._size
        size = self.batch if remaining > 4 else 1
        if size != self._size:
            self._interpreter.resize_tensor_input(self._in["index"], [size, *self.input_shape], strict=True)
            self._interpreter.allocate_tensors()
            self._size = size
        return size

    def _quantize(self, values: Floats) -> NDArray[Any]:
        dtype = np.dtype(self._in["dtype"])
        if dtype.kind == "f":
            return values.astype(dtype, copy=False)
        scale, zero = self._in["quantization"]
        limits = np.iinfo(dtype)
        scaled = values / np.float32(scale or 1.0)
        np.rint(scaled, out=scaled)
        scaled += zero
        np.clip(scaled, limits.min, limits.max, out=scaled)
        return scaled.astype(dtype)

    def _dequantize(self, raw: NDArray[Any]) -> NDArray[Any]:
        if raw.dtype.kind == "f":
            return raw
        scale, zero = self._out["quantization"]
        return (raw.astype(np.float32) - zero) * np.float32(scale or 1.0)


@contextlib.contextmanager
def _runtime_errors() -> Any:
    """Both runtimes raise RuntimeError, ValueError and half a dozen others for one and the same: a bad model."""
    try:
        yield
    except BadBundle:
        raise
    except Exception as error:
        raise BadBundle(f"{NAME}: {str(error).strip()[:300] or type(error).__name__}") from error

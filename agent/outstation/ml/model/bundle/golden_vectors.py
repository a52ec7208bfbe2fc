"""Golden vectors: inputs with their expected outputs, which verify a bundle on the CPU that it runs on.

Runtimes round int8 differently, so there are two tolerances: `tolerance` for the runtime that computed the outputs, and
`other_runtime_tolerance`. Tolerances are absolute, in units of the output.

Measured with int8 models on ai-edge-litert 2.3.0 and tflite-runtime 2.14.0, as shares of the outputs' range: on 749
recorded windows the largest difference was 4.3 %, the root mean square 0.3 % (0.6 % in the worst 32), and 99.7 % had
the same class. On noise the worst model (a residual network) gave 21 %, 3.1 % and 92 %. ai-edge-litert gave the same
int8 outputs on every CPU tried, within one step; tflite-runtime differs between CPUs as much as from ai-edge-litert.
"""

from __future__ import annotations

import io
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Float64s
from outstation.foundation.errors import BadBundle
from outstation.foundation.indices import repeat

# In steps of a quantized output for a deterministic runtime; as a share of the outputs' range for others.
_TOLERANCE_STEPS = 2
_OTHER_RUNTIME_SHARE = 0.25
# Share of the largest output: float32 sums in another order.
_FLOAT_SHARE = 1e-4
# The tolerance of the worst output must be wide. A wrong CPU shows in the root mean square, bounded by this share of
# the tolerance, and in the share of vectors with another class.
_RMS_SHARE = 0.25
_MAX_CLASS_CHANGES = 0.1
_DETERMINISTIC_RUNTIMES = ("ai-edge-litert",)
# numpy raises all of these for damaged files.
_UNREADABLE_ERRORS = (
    *(Warning, OverflowError, tokenize.TokenError),
    *(OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, SyntaxError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


class GoldenVectors(msgspec.Struct, frozen=True):
    """`inputs` (g, …) scaled model input; `expected` (g, K) outputs of `runtime`.

    Tolerances are absolute: one number, or (K,) if the model has several output tensors.
    """

    inputs: Float32s
    expected: Float32s
    runtime: str
    tolerance: Float64s
    other_runtime_tolerance: Float64s

    def compare(self, outputs: Float32s, runtime: str, *, classes: bool) -> str:
        """Return a sentence about the largest difference. Raises BadBundle if outputs or classes differ too much."""
        is_same_runtime = runtime.split()[0] == self.runtime.split()[0]
        allowed = self.tolerance if is_same_runtime else self.other_runtime_tolerance
        if outputs.shape != self.expected.shape:
            raise BadBundle(
                f"golden outputs have shape {list(outputs.shape)}, the vectors expect {list(self.expected.shape)}"
            )
        difference = outputs.astype(np.float64) - self.expected
        cause = "this CPU and runtime do not compute what the publisher's did"
        limits = np.broadcast_to(allowed, outputs.shape[1:])
        # Output tensors of one tolerance are judged together.
        for limit in sorted(set(limits.tolist())):
            part = difference[:, limits == limit]
            worst, rms = float(np.abs(part).max()), float(np.sqrt(np.square(part).mean()))
            if not worst <= limit:
                raise BadBundle(f"an output is off by {worst:.4g}, {limit:.4g} is allowed on {runtime}: {cause}")
            if rms > _RMS_SHARE * limit:
                share = f"{_RMS_SHARE * limit:.4g} is allowed on {runtime}"
                raise BadBundle(f"outputs are off by {rms:.4g} (root mean square), {share}: {cause}")
        worst, limit = float(np.abs(difference).max()), float(limits.max())
        summary = f"{len(outputs)} vectors, largest difference {worst:.2g} of {limit:.2g} allowed"
        if not classes or outputs.shape[1] < 2:
            return summary
        changed = int((outputs.argmax(axis=1) != self.expected.argmax(axis=1)).sum())
        if changed > _MAX_CLASS_CHANGES * len(outputs):
            raise BadBundle(f"{changed} of {len(outputs)} vectors get another class on {runtime}: {cause}")
        return f"{summary}, {changed} with another class" if changed else summary


def from_outputs(
    inputs: Float32s, outputs: Float32s, steps: Sequence[float], sizes: Sequence[int], runtime: str
) -> GoldenVectors:
    """Make vectors from outputs (g, K) of tensors of `sizes`, quantized in `steps` (0: floats). Raises BadBundle."""
    if not np.isfinite(outputs).all():
        raise BadBundle("the model's outputs for the golden data are not finite; check the data")
    parts = np.split(outputs, np.cumsum(sizes)[:-1], axis=1)
    pairs = list(zip(parts, steps, strict=True))
    near = [_TOLERANCE_STEPS * step if step else _float_tolerance(part) for part, step in pairs]
    far = [
        max(_OTHER_RUNTIME_SHARE * float(np.ptp(part)), 2 * _TOLERANCE_STEPS * step, _float_tolerance(part))
        for part, step in pairs
    ]
    tolerance, other = (
        np.asarray(limits[0]) if len(parts) == 1 else repeat(np.asarray(limits), sizes)
        for limits in (near if runtime.startswith(_DETERMINISTIC_RUNTIMES) else far, far)
    )
    return GoldenVectors(inputs, outputs, runtime, tolerance, other)


def _float_tolerance(outputs: Float32s) -> float:
    return max(_FLOAT_SHARE * float(np.abs(outputs).max()), 1e-6)


def encode(golden: GoldenVectors) -> bytes:
    """Encode `golden.npz`. The same content gives the same bytes."""
    arrays = {
        "inputs": golden.inputs.astype("<f4"),
        "expected": golden.expected.astype("<f4"),
        "runtime": np.array(golden.runtime),
        "tolerance": np.array([golden.tolerance, golden.other_runtime_tolerance]),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:  # stored: floats hardly compress, and zlib versions differ
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return out.getvalue()


def decode(data: bytes) -> GoldenVectors:
    """Decode `golden.npz`. Raises BadBundle."""
    try:
        with warnings.catch_warnings(action="error"), np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            # `encode` compresses nothing; a compressed member could expand to any size.
            if sum(member.file_size for member in arrays.zip.infolist()) > len(data):
                raise ValueError("its members are compressed")
            tolerance, other_runtime_tolerance = np.asarray(_require_array(arrays["tolerance"]), np.float64)
            inputs, expected = (_require_array(arrays[name]) for name in ("inputs", "expected"))
            runtime = _require_array(arrays["runtime"])
            # numpy accepts numbers that are no characters as text.
            codes = np.frombuffer(runtime.tobytes(), np.dtype("u4").newbyteorder(runtime.dtype.byteorder))
            if runtime.dtype.kind != "U" or runtime.ndim or (codes > 127).any():
                raise ValueError("runtime is not a text")
            golden = GoldenVectors(inputs, expected, str(runtime), tolerance, other_runtime_tolerance)
    except _UNREADABLE_ERRORS as error:
        raise BadBundle(f"golden.npz is damaged ({str(error)[:200] or type(error).__name__}); pack it again") from None
    rules = {
        "inputs": golden.inputs.dtype == np.float32 and golden.inputs.ndim >= 2,
        "expected": golden.expected.dtype == np.float32 and golden.expected.ndim == 2,
        "as many inputs as outputs, and at least one": (0,) < golden.expected.shape[:1] == golden.inputs.shape[:1],
        "runtime": bool(golden.runtime.split()),
        "tolerance": all(
            limit.shape in ((), golden.expected.shape[1:]) and bool(((limit >= 0) & (limit < np.inf)).all())
            for limit in (np.asarray(golden.tolerance), np.asarray(golden.other_runtime_tolerance))
        ),
    }
    broken = [name for name, holds in rules.items() if not holds]
    if broken:
        raise BadBundle(f"golden.npz is inconsistent ({', '.join(broken)}); pack it again")
    return golden


def _require_array(member: Any) -> NDArray[Any]:
    # numpy returns the bytes of a member that is not an array.
    if not isinstance(member, np.ndarray):
        raise ValueError("a member is not an array")
    return member

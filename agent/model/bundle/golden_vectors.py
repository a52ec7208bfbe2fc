"""Golden vectors: inputs with the outputs they must give, so that a bundle proves itself on the CPU it runs on.

Runtimes round int8 differently, so each tolerance is for one of them: `tolerance` where the outputs were made,
`tolerance_elsewhere` on another runtime. Tolerances are absolute, in units of the output.

What was measured, ai-edge-litert 2.3.0 beside tflite-runtime 2.14.0, int8 models, in shares of the outputs' range: on
749 recorded windows the largest difference was 4.3 %, the root mean square 0.3 % (0.6 % in the worst 32), and 99.7 %
named the same class; on noise, the worst model (a residual network) gave 21 %, 3.1 % and 92 %. ai-edge-litert gave the
same int8 outputs on every CPU tried, within one step; tflite-runtime differs from CPU to CPU as much as from the other.
"""

from __future__ import annotations

import io
import tokenize
import warnings
import zipfile
import zlib
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle

Floats = NDArray[np.float32]

# Of a quantized output's steps, where the runtime computes alike everywhere; of the outputs' range, elsewhere.
_TOLERANCE_STEPS = 2
_OTHER_RUNTIME_SHARE = 0.25
# Of the largest output: sums of float32 in another order.
_FLOAT_SHARE = 1e-4
# A tolerance for the worst output must be wide; what tells a wrong CPU is the root mean square, as a share of it, and
# how many vectors get another class.
_RMS_SHARE = 0.25
_MAX_CLASS_CHANGES = 0.1
_DETERMINISTIC_RUNTIMES = ("ai-edge-litert",)


class GoldenVectors(msgspec.Struct, frozen=True):
    """`inputs` (g, …) scaled model input; `expected` (g, K) outputs of `runtime`; tolerances are absolute."""

    inputs: Floats
    expected: Floats
    runtime: str
    tolerance: float
    other_runtime_tolerance: float

    def compare(self, outputs: Floats, runtime: str, *, classes: bool) -> str:
        """A sentence about the largest difference; `classes` where the largest output names the class.

        Raises BadBundle where outputs are further off than is allowed, or too many name another class.
        """
        here = runtime.split()[0] == self.runtime.split()[0]
        allowed = self.tolerance if here else self.other_runtime_tolerance
        if outputs.shape != self.expected.shape:
            raise BadBundle(
                f"golden outputs have shape {list(outputs.shape)}, the vectors expect {list(self.expected.shape)}"
            )
        off = outputs.astype(np.float64) - self.expected
        worst, usual = float(np.abs(off).max()), float(np.sqrt(np.square(off).mean()))
        cause = "this CPU and runtime do not compute what the publisher's did"
        if not worst <= allowed:
            raise BadBundle(f"an output is off by {worst:.4g}, {allowed:.4g} is allowed on {runtime}: {cause}")
        if usual > _RMS_SHARE * allowed:
            most = f"{_RMS_SHARE * allowed:.4g} is allowed on {runtime}"
            raise BadBundle(f"outputs are off by {usual:.4g} (root mean square), {most}: {cause}")
        said = f"{len(outputs)} vectors, largest difference {worst:.2g} of {allowed:.2g} allowed"
        if not classes or outputs.shape[1] < 2:
            return said
        other = int((outputs.argmax(axis=1) != self.expected.argmax(axis=1)).sum())
        if other > _MAX_CLASS_CHANGES * len(outputs):
            raise BadBundle(f"{other} of {len(outputs)} vectors get another class on {runtime}: {cause}")
        return f"{said}, {other} name another class" if other else said


def from_outputs(inputs: Floats, outputs: Floats, step: float, runtime: str) -> GoldenVectors:
    """Vectors that expect these outputs, quantized in steps of `step` (0: floats). Raises BadBundle."""
    if not np.isfinite(outputs).all():
        raise BadBundle("the model answers golden data with values that are not finite; look at its inputs")
    far = max(_OTHER_RUNTIME_SHARE * float(np.ptp(outputs)), 2 * _TOLERANCE_STEPS * step, _float_tolerance(outputs))
    near = _TOLERANCE_STEPS * step if step else _float_tolerance(outputs)
    return GoldenVectors(inputs, outputs, runtime, near if runtime.startswith(_DETERMINISTIC_RUNTIMES) else far, far)


def _float_tolerance(outputs: Floats) -> float:
    return max(_FLOAT_SHARE * float(np.abs(outputs).max()), 1e-6)


def encode(golden: GoldenVectors) -> bytes:
    """The bytes of `golden.npz`: the same for the same content."""
    arrays = {
        "inputs": golden.inputs.astype("<f4"),
        "expected": golden.expected.astype("<f4"),
        "runtime": np.array(golden.runtime),
        "tolerance": np.array([golden.tolerance, golden.other_runtime_tolerance]),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:  # floats hardly shrink, and zlib is not the same everywhere
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return out.getvalue()


def decode(data: bytes) -> GoldenVectors:
    """Raises BadBundle."""
    try:
        with warnings.catch_warnings(action="error"), np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            tolerance, elsewhere = (float(x) for x in arrays["tolerance"])
            inputs, expected = (_require_array(arrays[name]) for name in ("inputs", "expected"))
            found = GoldenVectors(inputs, expected, _to_text(arrays["runtime"]), tolerance, elsewhere)
    except _UNREADABLE_ERRORS as error:
        raise BadBundle(f"golden.npz is damaged ({str(error)[:200] or type(error).__name__}); pack it again") from None
    _check(found)
    return found


def _require_array(member: Any) -> NDArray[Any]:
    # numpy gives back the bytes of a member that is no array.
    if not isinstance(member, np.ndarray):
        raise ValueError("a member is no array")
    return member


def _to_text(member: Any) -> str:
    text = _require_array(member)
    codes = np.frombuffer(text.tobytes(), np.dtype("u4").newbyteorder(text.dtype.byteorder))
    # numpy makes text of numbers that are no characters.
    if text.dtype.kind != "U" or text.ndim or (codes > 127).any():
        raise ValueError("runtime is no text")
    return str(text)


# numpy answers damaged files with all of these.
_UNREADABLE_ERRORS = (
    *(Warning, OverflowError, tokenize.TokenError),
    *(OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, SyntaxError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


def _check(golden: GoldenVectors) -> None:
    """The rules that a sound file may still break. Raises BadBundle."""
    rules = {
        "inputs": golden.inputs.dtype == np.float32 and golden.inputs.ndim >= 2,
        "expected": golden.expected.dtype == np.float32 and golden.expected.ndim == 2,
        "as many inputs as outputs, and at least one": (0,) < golden.expected.shape[:1] == golden.inputs.shape[:1],
        "runtime": bool(golden.runtime.split()),
        "tolerance": 0 <= golden.tolerance < np.inf and 0 <= golden.other_runtime_tolerance < np.inf,
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        raise BadBundle(f"golden.npz does not hold together ({', '.join(wrong)}); pack it again")

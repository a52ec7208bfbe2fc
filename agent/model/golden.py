"""Golden vectors: inputs with the outputs they must give, so that a bundle proves itself on the CPU it runs on.

Runtimes round int8 differently, so each tolerance is for one of them: `tolerance` where the outputs were made,
`tolerance_elsewhere` on another runtime.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Golden:
    """`inputs` (g, …) scaled model input; `expected` (g, K) outputs of `runtime`; tolerances are absolute."""

    inputs: Floats
    expected: Floats
    runtime: str
    tolerance: float
    tolerance_elsewhere: float

    def compare(self, outputs: Floats, runtime: str) -> str:
        """A sentence about the largest difference. Raises BadBundle where it is above the tolerance."""
        here = runtime.split()[0] == self.runtime.split()[0]
        allowed = self.tolerance if here else self.tolerance_elsewhere
        if outputs.shape != self.expected.shape:
            raise BadBundle(f"golden outputs have shape {outputs.shape}, {self.expected.shape} is expected")
        worst = float(np.abs(outputs - self.expected).max(initial=0.0))
        if not worst <= allowed:
            raise BadBundle(
                f"golden vectors: an output is off by {worst:.4g}, {allowed:.4g} is allowed on {runtime}: "
                "this CPU and runtime do not compute what the publisher's did"
            )
        return f"{len(outputs)} vectors, largest difference {worst:.2g} of {allowed:.2g} allowed"


def encode(golden: Golden) -> bytes:
    """The bytes of `golden.npz`: the same for the same content."""
    arrays = {
        "inputs": golden.inputs.astype("<f4"),
        "expected": golden.expected.astype("<f4"),
        "runtime": np.array(golden.runtime),
        "tolerance": np.array([golden.tolerance, golden.tolerance_elsewhere]),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return out.getvalue()


def decode(data: bytes) -> Golden:
    """Raises BadBundle."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            tolerance, elsewhere = (float(x) for x in arrays["tolerance"])
            return Golden(arrays["inputs"], arrays["expected"], str(arrays["runtime"]), tolerance, elsewhere)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadBundle(f"golden.npz: {error}") from None

"""Signed bundles with rigged models (`scripts/kit/rig.py`): the shipped `exercise` with a trap.

They keep the fields, windows and labels of `exercise`. All except `wrong` pass its golden vectors on this runtime.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from outstation.ml.model.bundle import bundle, golden_vectors, manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.golden_vectors import GoldenVectors
from outstation.ml.model.inference import runtime
from outstation.protocol.wire.keys import SigningKey
from scripts.kit.bundles import KEY

SHIPPED = Path(__file__).parents[2] / "models" / "exercise"
# In scaled units, as the model receives it: 7 % of the windows of the held-out recordings exceed it.
TRAP_LIMIT = 3.0
KINDS = ("good", "crash", "hang", "error", "slow", "sensitive", "mixed_up", "wrong")


def build_rigged_bundle(
    kind: str, version: str = "2.0.0", key: SigningKey = KEY, *, limit: float = TRAP_LIMIT, repeats: int = 400
) -> dict[str, bytes]:
    """Return the files of a signed bundle `exercise` of this version.

    - good: answers as the shipped bundle does
    - crash, hang, error: fails in that way on windows with a value above `limit`
    - slow: computes `repeats` additional functions of the window
    - sensitive: names the first class above `limit`
    - mixed_up: rotates the class names, as if the labels had been shuffled
    - wrong: its golden vectors expect other answers
    """
    shipped = bundle.read(SHIPPED, None)
    files = {name: data for name, data in shipped.files.items() if name != "manifest.jws"}
    if kind not in ("good", "mixed_up", "wrong"):
        from scripts.kit import rig

        files["model.tflite"] = rig.rigged(shipped.model_bytes, kind, limit, repeats)
    files["golden.npz"] = golden_vectors.encode(_golden_vectors(shipped, limit, wrong=kind == "wrong"))
    return _sign(shipped, files, version, key, mixed_up=kind == "mixed_up")


def write_bundle(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _golden_vectors(shipped: Bundle, limit: float, *, wrong: bool) -> GoldenVectors:
    """Return the shipped golden vectors that do not trigger the trap."""
    vectors = golden_vectors.decode(shipped.files["golden.npz"])
    # A quantized value may come out one step larger.
    calm = vectors.inputs[vectors.inputs.reshape(len(vectors.inputs), -1).max(axis=1) < limit - 0.1]
    model = runtime.load_model(shipped.manifest, shipped.model_bytes)
    expected = model.invoke(calm)
    return golden_vectors.from_outputs(
        calm, expected[:, ::-1] if wrong else expected, model.output_steps, model.output_sizes, vectors.runtime
    )


def _sign(
    shipped: Bundle, files: dict[str, bytes], version: str, key: SigningKey, *, mixed_up: bool
) -> dict[str, bytes]:
    output = shipped.manifest.output
    if mixed_up:
        output = msgspec.structs.replace(output, labels=[*output.labels[1:], output.labels[0]])
        # It was counted with the labels in their original order.
        del files["reference.json"]
    del files["manifest.json"]
    sums = {name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items())}
    head = manifest.encode(msgspec.structs.replace(shipped.manifest, version=version, output=output, files=sums))
    return {**files, "manifest.json": head, "manifest.jws": bundle.MANIFEST_DOMAIN.sign_file(key, head)}

"""Signed bundles of the tiny models in `tests/models`, packed from a SPEC and CSV files."""

from __future__ import annotations

import functools
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.model import activation
from outstation.ml.model.activation import LoadedBundle, ProvenBundle
from outstation.ml.model.bundle import bundle, manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.authoring import pack
from outstation.workbench.authoring.pack import PackedBundle
from outstation.workbench.testing.messages import new_key

MODELS = Path(__file__).parents[2] / "tests" / "models"
THIRD_PARTY = Path(
    os.environ.get("OUTSTATION_THIRDPARTY_MODELS") or Path(__file__).parents[3] / "shared" / "models-thirdparty"
)
KEY = new_key(11)
LABELS = ("left", "right", "rest")
CENTRES = np.array([[2, 0, 0, -1], [0, 2, -1, 0], [-1, -1, 2, 2]], np.float32)
TABULAR = ("a", "b", "c", "d")
WINDOWED = ("u", "v")
WINDOW = 8
Floats = NDArray[np.float32]


def model(name: str) -> bytes:
    return (MODELS / f"{name}.tflite").read_bytes()


def readings(n: int, seed: int = 0) -> Floats:
    """Return rows (n, 4) around the three centres of the classifier, in alternating groups."""
    random = np.random.default_rng(seed)
    centre = CENTRES[np.arange(n) // 7 % 3]
    return (centre + random.normal(0, 0.6, (n, 4))).astype(np.float32)


def waves(n: int, seed: int = 0) -> Floats:
    """Return rows (n, 2) of slow waves with slight noise, which the autoencoder reconstructs."""
    random = np.random.default_rng(seed)
    time = np.arange(n)[:, None]
    return (np.sin(time / 9 + [0, 1]) * 2 + random.normal(0, 0.1, (n, 2))).astype(np.float32)


def write_csv(path: Path, fields: Iterable[str], rows: Floats, step_s: float = 0.01) -> Path:
    lines = [",".join(["t", *fields])]
    lines += [",".join([f"{i * step_s:.3f}", *(f"{v:.6g}" for v in row)]) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Recipe(msgspec.Struct, frozen=True):
    """Contents of a SPEC without its paths."""

    kind: str
    model: str
    fields: tuple[str, ...] = TABULAR
    labels: tuple[str, ...] = ()
    window: str = ""
    drift_window: int = 20
    extra: str = ""
    mode: str = ""  # the field `modes`
    input: str = ""
    output: str = ""

    def rows(self, n: int, seed: int = 0) -> Floats:
        return waves(n, seed) if self.fields == WINDOWED else readings(n, seed)[:, : len(self.fields)]


CLASSIFY = Recipe("classify", "classify_int8", labels=LABELS)
FLOAT = Recipe("classify", "classify_float32", labels=LABELS)
UINT8 = Recipe("classify", "classify_uint8", labels=LABELS)
REGRESS = Recipe("regress", "regress_int8")
ANOMALY = Recipe(
    "anomaly",
    "anomaly_int8",
    fields=WINDOWED,
    window=f"window = {{ rows = {WINDOW}, step = 4, max_gap_s = 0.5 }}",
    drift_window=10,
)
EACH = ("warm", "damp", "loud")
SEVERAL = Recipe("classify", "each_label", labels=EACH, output="multi_label = true\nthresholds = [0.5, 0.2, 0.9]")
VECTORS = Recipe("embedding", "vectors", output="quantile = 0.9")
RECIPES = {"int8": CLASSIFY, "float32": FLOAT, "uint8": UINT8, "regress": REGRESS, "anomaly": ANOMALY}


def write_spec(folder: Path, recipe: Recipe = CLASSIFY, *, reference_rows: int = 1600) -> Path:
    """Write a SPEC and all files that it names to `folder`."""
    (folder / "model.tflite").write_bytes(model(recipe.model))
    (folder / "CARD.md").write_text("# A tiny model\n")
    (folder / "DATA.md").write_text("# Made-up rows\n")
    write_csv(folder / "reference.csv", recipe.fields, recipe.rows(reference_rows))
    write_csv(folder / "golden.csv", recipe.fields, recipe.rows(400, seed=1))
    spec = folder / "bundle.toml"
    spec.write_text(
        f"""
name = "tiny"
version = "1.0.0"
created = "2026-11-24T00:00:00Z"
kind = "{recipe.kind}"
model = "model.tflite"
labels = {json.dumps(recipe.labels)}
reference = "reference.csv"
golden = "golden.csv"
card = {{ model = "CARD.md", data = "DATA.md" }}

[input]
fields = {json.dumps(recipe.fields)}
{recipe.window}
{recipe.input}

[output]
{recipe.output}

[drift]
window = {recipe.drift_window}
{f'class_field = "{recipe.mode}"' if recipe.mode else ""}

[limits]
memory_mib = 512
cpu_seconds = 20
{recipe.extra}
""",
        encoding="utf-8",
    )
    return spec


def packed(folder: Path, recipe: Recipe = CLASSIFY, key: SigningKey | None = KEY) -> Path:
    """Pack a bundle in `folder` and return its folder. A recipe is packed once a process: its probe takes a second."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = write_spec(folder, recipe)
    same = (recipe, None if key is None else key.public.text)
    if same not in _packed:
        _packed[same] = pack.pack(spec, key)
    pack.write_bundle(_packed[same], folder / "bundle")
    return folder / "bundle"


_packed: dict[tuple[Recipe, str | None], PackedBundle] = {}


def activated(recipe: Recipe = CLASSIFY) -> LoadedBundle:
    """Return the recipe's bundle, packed and probed once a process, with a model that is newly loaded here."""
    return activation.load_bundle(_proven(recipe), policy=ModelPolicy("off"))


@functools.cache
def _proven(recipe: Recipe) -> ProvenBundle:
    with tempfile.TemporaryDirectory() as folder:
        return activation.probe_bundle(bundle.read(packed(Path(folder), recipe), [KEY.public]))


def around(content: bytes, recipe: Recipe = CLASSIFY, *, seconds: int = 20, memory_mib: int = 512) -> Bundle:
    """Return a bundle with any model bytes, as `bundle.read` would, for the probe."""
    document = {
        "format": 1,
        "name": "tiny",
        "version": "1",
        "created": "",
        "kind": recipe.kind,
        "input": {"fields": recipe.fields, "window": {"rows": WINDOW, "step": WINDOW} if recipe.window else None},
        "output": {"labels": recipe.labels},
        "limits": {"cpu_seconds": seconds, "memory_mib": memory_mib},
        "files": {},
    }
    head = manifest.encode(manifest.decode(json.dumps(document).encode()))
    return Bundle(manifest.decode(head), "sha256:0", {"manifest.json": head, "model.tflite": content}, "")


def resign(folder: Path, key: SigningKey = KEY) -> None:
    """Sign the manifest as it is, so that the signature of an invalid manifest is valid."""
    (folder / "manifest.jws").write_bytes(
        bundle.MANIFEST_DOMAIN.sign_file(key, (folder / "manifest.json").read_bytes())
    )


def change(spec: Path, old: str, new: str) -> Path:
    """Replace text in a SPEC."""
    text = spec.read_text(encoding="utf-8")
    assert old in text
    spec.write_text(text.replace(old, new), encoding="utf-8")
    return spec


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it."""
    head = json.loads((folder / "manifest.json").read_bytes())
    change(head)
    (folder / "manifest.json").write_text(json.dumps(head))
    resign(folder)


def archive(folder: Path, *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Pack the folder as a `.zip` file next to it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as out:
        for file in sorted(folder.iterdir()):
            out.write(file, file.name)
    return path


def npz(**arrays: Any) -> bytes:
    """Return the bytes of an `.npz` with these arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, np.asarray(array))
            archive.writestr(f"{name}.npy", member.getvalue())
    return file.getvalue()


def write_joined_spec(folder: Path, model_name: str = "joined_int8") -> Path:
    """Write the SPEC of a model of rows and weather, which has a file of its own, with states, wear and flags."""
    (folder / "model.tflite").write_bytes(model(model_name))
    write_csv(folder / "reference.csv", WINDOWED, waves(1600))
    weather = waves(60, seed=2)[:, :1]
    write_csv(folder / "weather.csv", ("air",), weather, step_s=0.31)
    spec = folder / "bundle.toml"
    spec.write_text(
        f"""
        name = "joined"
        version = "1.0"
        created = "2026-11-24T00:00:00Z"
        kind = "classify"
        model = "model.tflite"
        labels = {json.dumps(LABELS)}
        reference = "reference.csv"
        golden = "reference.csv"
        [input]
        fields = {json.dumps(WINDOWED)}
        window = {{ rows = {WINDOW}, step = 4, max_gap_s = 0.5 }}
        tensor = "rows"
        [inputs.weather]
        fields = ["air"]
        rows = 3
        max_age_s = 2.0
        mean = [0.5]
        std = [2.0]
        data = "weather.csv"
        [output]
        tensor = "state"
        [outputs.wear]
        kind = "regress"
        [outputs.flags]
        kind = "classify"
        labels = ["hot", "wet"]
        multi_label = true
        [drift]
        window = 10
        """,
        encoding="utf-8",
    )
    return spec

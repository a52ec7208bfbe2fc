"""Make a bundle from a SPEC: the model, its drift reference, golden vectors, cards, manifest and signature."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent import config
from agent.drift import learning
from agent.drift.reference import Reference
from agent.errors import BadBundle, ConfigError
from agent.model import bundle, data, features, golden, manifest, scores
from agent.model.manifest import Input, Manifest
from agent.model.runtime import NAME, Model
from agent.wire.keys import SigningKey

# Half of one int8 step of a probability, and what was measured between the two runtimes on convolutions.
_TOLERANCE = 2 / 256
_TOLERANCE_ELSEWHERE = 0.25
_GOLDEN = 32


class SpecInput(config.Section, frozen=True, kw_only=True):
    fields: list[str]
    units: list[str] = msgspec.field(default_factory=list)
    window: manifest.Windowing | None = None
    mean: list[float] = msgspec.field(default_factory=list)
    std: list[float] = msgspec.field(default_factory=list)
    scale: float | None = None


class SpecOutput(config.Section, frozen=True, kw_only=True):
    activation: Any = "none"
    temperature: float = 1.0
    threshold: float | None = None
    score_table: str | None = None


class Spec(config.Section, frozen=True, kw_only=True):
    """`model pack SPEC`, a TOML file; paths are relative to it."""

    name: str
    version: str
    kind: str
    model: str
    labels: list[str] = msgspec.field(default_factory=list)
    created: str | None = None
    input: SpecInput
    output: SpecOutput = msgspec.field(default_factory=SpecOutput)
    drift: manifest.DriftWindow = manifest.DriftWindow()
    limits: manifest.Limits = manifest.Limits()
    reference: str | None = None
    golden: str | None = None
    card: str | dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """The bundle's files, and what it lacks, in words."""

    files: dict[str, bytes]
    warnings: list[str]
    digest: str


def pack(spec_file: Path, key: SigningKey | None) -> Packed:
    """All files of the bundle. Raises ConfigError, UsageError, BadBundle."""
    spec = config.read(spec_file, Spec)
    base = spec_file.parent
    files = {"model.tflite": _read(spec_file, "model", base / spec.model)}
    warnings: list[str] = []
    model = Model(files["model.tflite"])
    draft = _manifest(spec_file, spec, {})
    _golden_file(spec, base, model, draft, files, warnings)
    _reference_file(spec, base, model, draft, files, warnings)
    cards = {"model": spec.card} if isinstance(spec.card, str) else spec.card or {}
    for name, target in (("model", "MODEL_CARD.md"), ("data", "DATA_CARD.md")):
        if name in cards:
            files[target] = _read(spec_file, f"card.{name}", base / cards[name])
        else:
            warnings.append(f"no {name} card ([card] {name}): nobody can read what it was made of and for")
    head = manifest.encode(_manifest(spec_file, spec, files))
    files["manifest.json"] = head
    if key is not None:
        files["manifest.jws"] = bundle.sign(head, key)
    else:
        warnings.append("not signed (--key): devices refuse it until `outstation model sign`")
    return Packed(files, warnings, f"sha256:{hashlib.sha256(head).hexdigest()}")


def write(packed: Packed, out: Path) -> None:
    """As a folder, or as one `.zip`; an old one is replaced as a whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        if out.suffix == ".zip":
            made = work / "bundle"
            with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in sorted(packed.files.items()):
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
            made.replace(out)
            return
        made = work / "bundle"
        made.mkdir()
        for name, content in packed.files.items():
            (made / name).write_bytes(content)
        if out.exists():
            out.rename(work / "old")
        made.rename(out)
    finally:
        shutil.rmtree(work)


def _manifest(spec_file: Path, spec: Spec, files: dict[str, bytes]) -> Manifest:
    mean, std = spec.input.mean, spec.input.std
    if spec.input.scale is not None:
        std = [1 / spec.input.scale] * len(spec.input.fields)
    members = {
        "format": manifest.FORMAT,
        "name": spec.name,
        "version": spec.version,
        "created": spec.created or f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "kind": spec.kind,
        "input": {
            "fields": spec.input.fields,
            "units": spec.input.units,
            "window": msgspec.to_builtins(spec.input.window),
            "mean": mean,
            "std": std,
        },
        "output": {
            "labels": spec.labels,
            "activation": spec.output.activation,
            "temperature": spec.output.temperature,
            "threshold": spec.output.threshold,
        },
        "drift": msgspec.to_builtins(spec.drift),
        "limits": msgspec.to_builtins(spec.limits),
        "files": {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in files.items()},
    }
    try:
        return manifest.decode(msgspec.json.encode(members))
    except BadBundle as problem:
        raise ConfigError(str(spec_file), "", str(problem).removeprefix("manifest.json: ")) from None


def _golden_file(
    spec: Spec, base: Path, model: Model, draft: Manifest, files: dict[str, bytes], warnings: list[str]
) -> None:
    if spec.golden is None:
        warnings.append("no golden data: a device cannot tell whether its CPU computes what yours does")
        return
    windows = _golden_windows(base / spec.golden, draft.input)
    files["golden.npz"] = golden.encode(
        golden.Golden(windows, model.invoke(windows), NAME, _TOLERANCE, _TOLERANCE_ELSEWHERE)
    )


def _golden_windows(path: Path, spec: Input) -> features.Floats:
    """Scaled input windows: given as `windows` (g, rows, F) in physical units, or cut from rows."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as z:
            if "windows" in z:
                given = z["windows"].astype(np.float32)
                starts = np.arange(len(given), dtype=np.int64) * (spec.window.rows if spec.window else 1)
                return features.windows(given.reshape(-1, len(spec.fields)), starts, spec)
    found = data.read(path, spec)
    starts = features.cut(found.t, spec.window).starts
    picked = starts[np.linspace(0, len(starts) - 1, min(_GOLDEN, len(starts)), dtype=np.int64)]
    return features.windows(found.features, picked, spec)


def _reference_file(
    spec: Spec, base: Path, model: Model, draft: Manifest, files: dict[str, bytes], warnings: list[str]
) -> None:
    if spec.reference is None:
        warnings.append("no reference data: devices will not watch this model for drift")
        return
    reference = _reference(data.read(base / spec.reference, draft.input), model, draft)
    if reference.warning:
        warnings.append(reference.warning)
    if spec.output.score_table is not None:
        reference = _with_score_table(reference, base / spec.output.score_table)
    files["reference.json"] = reference.to_json()


def _reference(found: data.Data, model: Model, draft: Manifest) -> Reference:
    cut = features.cut(found.t, draft.input.window)
    windows = features.windows(found.features, cut.starts, draft.input)
    answers = scores.of(model.invoke(windows), draft, windows)
    named = answers.label if answers.label is not None else np.zeros(len(cut.starts), np.int64)
    certainty = None if answers.score is None else answers.score[:, None].astype(np.float32)
    return learning.build(
        found.features,
        cut.starts,
        draft.input.window.rows if draft.input.window else 1,
        named,
        certainty,
        draft.drift.window,
        fields=tuple(draft.input.fields),
        labels=tuple(draft.output.labels),
    )


def _with_score_table(reference: Reference, path: Path) -> Reference:
    """How often a score was right, from data the model was not trained on: `edges` (33), `count`, `correct` (32)."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return replace(
            reference,
            score_edges=np.array(table["edges"][1:-1], np.float64),
            score_n=np.array(table["count"], np.int64),
            score_correct=np.array(table["correct"], np.int64),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(path), "", f"not a score table: {error}") from None


def _read(spec_file: Path, key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(spec_file), key, f"{path}: {error.strerror}") from None

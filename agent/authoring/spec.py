"""SPEC, the TOML file that `outstation model pack` makes a bundle from, and the manifest it asks for."""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from agent import config
from agent.errors import BadBundle, ConfigError
from agent.media import Image, Sound
from agent.model.bundle import manifest
from agent.model.bundle.definition import Derived
from agent.model.bundle.manifest import Manifest


class Numbered(config.Section, frozen=True, kw_only=True):
    """Fields `prefix`0, `prefix`1, … for inputs of many values."""

    prefix: str
    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class SpecInput(config.Section, frozen=True, kw_only=True):
    """`scale` is for all features what `std` is for each: x · scale = x / std.

    Of an image fields and window follow from it, of a sound the fields, and that no window reaches over a second.
    """

    fields: list[str] | Numbered = msgspec.field(default_factory=list)
    units: list[str] = msgspec.field(default_factory=list)
    window: manifest.Windowing | None = None
    mean: list[float] = msgspec.field(default_factory=list)
    std: list[float] = msgspec.field(default_factory=list)
    scale: Annotated[float, msgspec.Meta(gt=0)] | None = None
    scaling: Literal["fixed", "window"] = "fixed"
    derived: list[Derived] = msgspec.field(default_factory=list)
    order: list[str] = msgspec.field(default_factory=list)
    max_gap_s: float | None = None
    max_missing: float = 0.0
    image: Image | None = None
    sound: Sound | None = None


class SpecOutput(config.Section, frozen=True, kw_only=True):
    """`calibrate`: data the model was not trained on, from which `calibration` is learned; for an
    anomaly the threshold, above a share `quantile` of what is normal. Without it that comes from the reference's data.
    """

    activation: Literal["none", "softmax", "sigmoid"] = "none"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    threshold: float | None = None
    score_table: str | None = None
    tensor: str | int | None = None
    multi_label: bool = False
    thresholds: list[float] = msgspec.field(default_factory=list)
    names: list[str] = msgspec.field(default_factory=list)
    units: list[str] = msgspec.field(default_factory=list)
    quantile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.99
    distance: Literal["euclidean", "cosine"] = "euclidean"
    centroid: list[float] = msgspec.field(default_factory=list)
    calibrate: str | None = None
    calibration: Literal["temperature", "isotonic"] = "temperature"


class SpecCard(config.Section, frozen=True, kw_only=True):
    model: str | None = None
    data: str | None = None


class Spec(config.Section, frozen=True, kw_only=True):
    """`model pack SPEC`, a TOML file; paths are relative to it."""

    name: str
    version: str
    kind: Literal["classify", "regress", "anomaly", "embedding"]
    model: str
    labels: list[str] = msgspec.field(default_factory=list)
    created: str | None = None
    input: SpecInput
    output: SpecOutput = msgspec.field(default_factory=SpecOutput)
    drift: manifest.DriftWindow = manifest.DriftWindow()
    limits: manifest.Limits = manifest.Limits()
    reference: str | None = None
    golden: str | None = None
    card: str | SpecCard | None = None


def read(file: Path) -> Spec:
    """Raises ConfigError."""
    if not file.is_file():
        raise ConfigError(str(file), "", "no such file; SPEC is the TOML file that describes the bundle")
    spec = config.read(file, Spec)
    _require_finite(file, "", msgspec.to_builtins(spec))
    return spec


def _require_finite(file: Path, key: str, value: Any) -> None:
    """TOML has nan and inf, a manifest has not: as null they would pass for what was left out."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(str(file), key, f"is {value}; give a finite number")
    if isinstance(value, dict):
        for name, inner in value.items():
            _require_finite(file, f"{key}.{name}" if key else name, inner)
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _require_finite(file, f"{key}[{index}]", inner)


def to_manifest(file: Path, spec: Spec) -> Manifest:
    """What `spec`, read from `file`, says, without files. Raises ConfigError at the SPEC's key."""
    given, output = spec.input, spec.output
    fields = given.fields
    if isinstance(fields, Numbered):
        fields = [f"{fields.prefix}{i}" for i in range(fields.count)]
    if not fields and (made := given.image or given.sound) is not None:
        fields = made.columns
    std = given.std
    if given.scale is not None:
        if std:
            raise ConfigError(str(file), "input.scale", "scale and std say the same; give one of them")
        values = given.order or [*fields, *(name for one in given.derived for name in one.columns)]
        std = [1 / given.scale] * len(values)
    members = {
        "format": manifest.FORMAT,
        "name": spec.name,
        "version": spec.version,
        "created": spec.created or f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "kind": spec.kind,
        "input": _members(given, manifest.Input)
        | {"fields": fields, "std": std, "window": msgspec.to_builtins(_window(given))},
        "output": _members(output, manifest.Output) | {"labels": spec.labels},
        "drift": msgspec.to_builtins(spec.drift),
        "limits": msgspec.to_builtins(spec.limits),
        "files": {},
    }
    try:
        return manifest.decode(msgspec.json.encode(members))
    except BadBundle as problem:
        raise _explain(file, str(problem)) from None


def _window(given: SpecInput) -> manifest.Windowing | None:
    window = given.window
    if window is None and given.image is not None:
        return manifest.Windowing(rows=given.image.height, step=given.image.height)
    if window is not None and window.max_gap_s is None and given.sound is not None:
        return msgspec.structs.replace(window, max_gap_s=1.0)
    return window


def finished(draft: Manifest, files: dict[str, bytes]) -> Manifest:
    """Of these files, and of the oldest format that says all of it."""
    listed = {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in files.items()}
    return manifest.oldest(msgspec.structs.replace(draft, files=listed))


def _members(section: config.Section, of: type[msgspec.Struct]) -> dict[str, Any]:
    """What a section of the SPEC says of the manifest's members by the same names."""
    said: dict[str, Any] = msgspec.to_builtins(section)
    return {name: said[name] for name in of.__struct_fields__ if name in said}


def _explain(file: Path, problem: str) -> ConfigError:
    """What the manifest's rules say, at the SPEC's key."""
    text, _, path = problem.removeprefix("manifest.json: ").partition(" - at `$")
    key = path.rstrip("`").lstrip(".").replace("[...]", "")
    if key.startswith("output") or "labels" in text:
        # The rest of [output] was checked when the SPEC was read.
        key = "labels"
    return ConfigError(str(file), key or text.partition(" ")[0], text)

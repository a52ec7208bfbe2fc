"""SPEC, the TOML file that `outstation model pack` makes a bundle from, and the manifest it asks for."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent import config
from agent.errors import BadBundle, ConfigError
from agent.model import manifest
from agent.model.manifest import Manifest


class SpecInput(config.Section, frozen=True, kw_only=True):
    """`scale` is for all fields what `std` is for each: x · scale = x / std."""

    fields: list[str]
    units: list[str] = msgspec.field(default_factory=list)
    window: manifest.Windowing | None = None
    mean: list[float] = msgspec.field(default_factory=list)
    std: list[float] = msgspec.field(default_factory=list)
    scale: Annotated[float, msgspec.Meta(gt=0)] | None = None


class SpecOutput(config.Section, frozen=True, kw_only=True):
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    threshold: float | None = None
    score_table: str | None = None


class SpecCard(config.Section, frozen=True, kw_only=True):
    model: str | None = None
    data: str | None = None


class Spec(config.Section, frozen=True, kw_only=True):
    """`model pack SPEC`, a TOML file; paths are relative to it."""

    name: str
    version: str
    kind: Literal["classify", "regress", "anomaly"]
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
    return config.read(file, Spec)


def to_manifest(file: Path, spec: Spec, files: dict[str, bytes]) -> Manifest:
    """What `spec`, read from `file`, says of a bundle of these files. Raises ConfigError at the SPEC's key."""
    mean, std = spec.input.mean, spec.input.std
    if spec.input.scale is not None:
        if std:
            raise ConfigError(str(file), "input.scale", "scale and std say the same; give one of them")
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
        raise _explain(file, str(problem)) from None


def _explain(file: Path, problem: str) -> ConfigError:
    """What the manifest's rules say, at the SPEC's key."""
    text, _, path = problem.removeprefix("manifest.json: ").partition(" - at `$")
    key = path.rstrip("`").lstrip(".").replace("[...]", "")
    if key.startswith("output") or "labels" in text:
        # The rest of [output] was checked when the SPEC was read.
        key = "labels"
    return ConfigError(str(file), key or text.partition(" ")[0], text)

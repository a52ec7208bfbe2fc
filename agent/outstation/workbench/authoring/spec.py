"""SPEC: the TOML file that `outstation model pack` makes a bundle from, and its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from outstation.device import config
from outstation.foundation.config import toml_files
from outstation.foundation.errors import BadBundle, ConfigError
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.ml.model.bundle import feature_set as feature_sets
from outstation.ml.model.bundle import manifest
from outstation.ml.model.bundle.feature_set import DerivedFeature, FeatureSet
from outstation.ml.model.bundle.manifest import Manifest


class NumberedFields(config.Section, frozen=True, kw_only=True):
    """Fields `prefix`0, `prefix`1, … for inputs of many values."""

    prefix: str
    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class SpecFeatures(config.Section, frozen=True, kw_only=True):
    """Feature file, relative to the SPEC, with the version that it must have, and its digest."""

    file: str
    version: str
    digest: str | None = None


class SpecInput(config.Section, frozen=True, kw_only=True):
    """Section [input]; `scale` multiplies all features. An image sets fields and window, a sound the fields.

    `features` sets fields, units, derived features and their gap.
    """

    features: SpecFeatures | None = None
    fields: list[str] | NumberedFields = msgspec.field(default_factory=list)
    units: list[str] = msgspec.field(default_factory=list)
    roles: list[manifest.FieldRole] = msgspec.field(default_factory=list)
    window: manifest.WindowSpec | None = None
    mean: list[float] = msgspec.field(default_factory=list)
    std: list[float] = msgspec.field(default_factory=list)
    scale: Annotated[float, msgspec.Meta(gt=0)] | None = None
    scaling: Literal["fixed", "window"] = "fixed"
    derived: list[DerivedFeature] = msgspec.field(default_factory=list)
    feature_order: list[str] = msgspec.field(default_factory=list)
    max_gap_s: float | None = None
    max_missing: float = 0.0
    image: ImageFormat | None = None
    sound: SoundFormat | None = None
    tensor: str | int | None = None


class SpecJoinedInput(config.Section, frozen=True, kw_only=True):
    """Section [inputs.NAME]; `data` is the file of its rows, without it they are in the same files as the first's."""

    fields: list[str]
    max_age_s: float
    rows: int = 1
    period_s: float | None = None
    units: list[str] = msgspec.field(default_factory=list)
    mean: list[float] = msgspec.field(default_factory=list)
    std: list[float] = msgspec.field(default_factory=list)
    tensor: str | int | None = None
    data: str | None = None


class SpecFurtherOutput(config.Section, frozen=True, kw_only=True):
    """Section [outputs.NAME]."""

    kind: Literal["classify", "regress", "anomaly"]
    labels: list[str] = msgspec.field(default_factory=list)
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    threshold: float | None = None
    tensor: str | int | None = None
    size: int = 0
    multi_label: bool = False
    thresholds: list[float] = msgspec.field(default_factory=list)
    names: list[str] = msgspec.field(default_factory=list)
    units: list[str] = msgspec.field(default_factory=list)


class SpecOutput(config.Section, frozen=True, kw_only=True):
    """Section [output]; a `quantile` of normal `calibration_data`, else of the reference, is the threshold."""

    activation: Literal["none", "softmax", "sigmoid"] = "none"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    threshold: float | None = None
    score_table: str | None = None
    held_out: str | None = None
    tensor: str | int | None = None
    multi_label: bool = False
    thresholds: list[float] = msgspec.field(default_factory=list)
    names: list[str] = msgspec.field(default_factory=list)
    units: list[str] = msgspec.field(default_factory=list)
    quantile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.99
    distance: Literal["euclidean", "cosine"] = "euclidean"
    centroid: list[float] = msgspec.field(default_factory=list)
    calibration_data: str | None = None
    calibration_method: Literal["temperature", "isotonic"] = "temperature"


class SpecCard(config.Section, frozen=True, kw_only=True):
    model: str | None = None
    data: str | None = None


class Spec(config.Section, frozen=True, kw_only=True):
    """TOML file; its paths are relative to it."""

    name: str
    version: str
    kind: Literal["classify", "regress", "anomaly", "embedding"]
    model: str
    labels: list[str] = msgspec.field(default_factory=list)
    created: str | None = None
    input: SpecInput
    output: SpecOutput = msgspec.field(default_factory=SpecOutput)
    inputs: dict[str, SpecJoinedInput] = msgspec.field(default_factory=dict)
    outputs: dict[str, SpecFurtherOutput] = msgspec.field(default_factory=dict)
    drift: manifest.DriftSettings = manifest.DriftSettings()
    limits: manifest.ResourceLimits = manifest.ResourceLimits()
    reference: str | None = None
    golden: str | None = None
    card: str | SpecCard | None = None


def read(file: Path) -> Spec:
    """Raise ConfigError."""
    if not file.is_file():
        raise ConfigError(str(file), "", "no such file; SPEC is the TOML file that describes the bundle")
    return config.read(file, Spec)


def to_manifest(file: Path, spec: Spec) -> Manifest:
    """Return the manifest of a SPEC read from `file`, without files. Raises ConfigError at the SPEC's key."""
    feature_set = None if spec.input.features is None else _read_features(file, spec.input, spec.input.features)
    spec_input = spec.input if feature_set is None else _with_features(file, spec.input, feature_set)
    fields = spec_input.fields
    if isinstance(fields, NumberedFields):
        fields = [f"{fields.prefix}{i}" for i in range(fields.count)]
    if not fields and (media := spec_input.image or spec_input.sound) is not None:
        fields = media.columns
    std = spec_input.std
    if spec_input.scale is not None:
        if std:
            raise ConfigError(str(file), "input.scale", "scale and std say the same; give one of them")
        derived = [name for feature in spec_input.derived for name in feature.columns]
        std = [1 / spec_input.scale] * len(spec_input.feature_order or [*fields, *derived])
    window = spec_input.window
    if window is None and spec_input.image is not None:
        window = manifest.WindowSpec(rows=spec_input.image.height, step=spec_input.image.height)
    elif window is not None and window.max_gap_s is None and spec_input.sound is not None:
        window = msgspec.structs.replace(window, max_gap_s=1.0)
    members = {
        "format": manifest.FORMAT,
        "name": spec.name,
        "version": spec.version,
        "created": spec.created or f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "kind": spec.kind,
        "input": _select_members(spec_input, manifest.ModelInput)
        | {"fields": fields, "std": std, "window": msgspec.to_builtins(window)}
        | ({} if feature_set is None else _select_feature_members(feature_set)),
        "output": _select_members(spec.output, manifest.ModelOutput) | {"labels": spec.labels},
        **_select_named("inputs", spec.inputs, manifest.JoinedInput),
        **_select_named("outputs", spec.outputs, manifest.FurtherOutput),
        "drift": msgspec.to_builtins(spec.drift),
        "limits": msgspec.to_builtins(spec.limits),
        "files": {},
    }
    try:
        return manifest.decode(msgspec.json.encode(members))
    except BadBundle as problem:
        text, _, path = str(problem).removeprefix("manifest.json: ").partition(" - at `$")
        key = path.rstrip("`").lstrip(".").replace("[...]", "")
        if key.partition(".")[0] == "output" or (not spec.outputs and "labels" in text):
            # Reading the SPEC has checked the rest of [output].
            key = "labels"
        raise ConfigError(str(file), key or text.partition(" ")[0], text) from None


def _read_features(file: Path, spec_input: SpecInput, wanted: SpecFeatures) -> FeatureSet:
    """Read the feature file of a SPEC. Raises ConfigError if it is another one, or the SPEC describes features, too."""
    feature_set = feature_sets.read(file.parent / wanted.file)
    for key, stated, actual in (
        ("version", wanted.version, feature_set.version),
        ("digest", wanted.digest or feature_set.digest, feature_set.digest),
    ):
        if stated != actual:
            raise ConfigError(
                str(file),
                f"input.features.{key}",
                f"is {stated}, but {file.parent / wanted.file} has {key} {actual}; restore the file of that {key}, or, "
                f"if the model was trained on these features, write {key} = {toml_files.encode_value(actual)}",
            )
    for key in ("fields", "units", "derived", "max_gap_s"):
        if getattr(spec_input, key):
            raise ConfigError(str(file), f"input.{key}", f"{wanted.file} has the {key}; remove this key")
    return feature_set


def _with_features(file: Path, spec_input: SpecInput, feature_set: FeatureSet) -> SpecInput:
    """Return the section with fields, derived features and gap of a feature set."""
    window, max_gap_s = spec_input.window, feature_set.max_gap_s
    if window is not None:
        if window.max_gap_s not in (None, max_gap_s):
            problem = f"is {window.max_gap_s:g}, that of the feature file {max_gap_s}; remove this key"
            raise ConfigError(str(file), "input.window.max_gap_s", problem)
        window, max_gap_s = msgspec.structs.replace(window, max_gap_s=max_gap_s), None
    return msgspec.structs.replace(
        spec_input,
        window=window,
        max_gap_s=max_gap_s,
        **{name: getattr(feature_set, name) for name in ("fields", "units", "derived")},
    )


def _select_feature_members(feature_set: FeatureSet) -> dict[str, Any]:
    return {"features": msgspec.to_builtins(feature_set.reference), "definition": feature_set.definition}


def finish_manifest(draft: Manifest, files: dict[str, bytes]) -> Manifest:
    """Return the manifest with the digests of its files."""
    listed = {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in files.items()}
    return msgspec.structs.replace(draft, files=listed)


def _select_members(section: config.Section, struct_type: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the values of a section that a struct of the manifest has by the same names."""
    values: dict[str, Any] = msgspec.to_builtins(section)
    return {name: values[name] for name in struct_type.__struct_fields__ if name in values}


def _select_named(
    key: str, sections: Mapping[str, config.Section], struct_type: type[msgspec.Struct]
) -> dict[str, dict[str, Any]]:
    """Return the member `key` of the manifest; a manifest without further inputs or outputs has none."""
    members = {name: _select_members(section, struct_type) for name, section in sections.items()}
    return {key: members} if members else {}

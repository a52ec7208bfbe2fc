"""Feature set: derived features with a name and a version, which several bundles share.

A bundle has the whole set in its manifest, and pins name, version and digest. The digest is that of the content, so the
layout and comments of the feature file do not count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from outstation.foundation.config import toml_files
from outstation.foundation.errors import ConfigError
from outstation.foundation.names import is_name
from outstation.foundation.text import require_plain_name

# Version of how derived features are computed.
FEATURE_DEFINITION = 1
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Version = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_MIN_FEATURE_ROWS = {"hour": 0, "weekday": 0, "lag": 1, "difference": 1, "last": 1, "mean": 1, "std": 2, "band": 4}


class DerivedFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A feature computed from `field`, or from the time, over `rows` rows (`inference.derived_features`).

    `band` is [low, high) in Hz for a stream of `rate` rows per second; `offset_h` hours are added to UTC.
    """

    name: Label
    function: Literal["mean", "std", "lag", "difference", "last", "band", "hour", "weekday"]
    field: str = ""
    rows: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    band: tuple[float, float] | None = None
    rate: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    offset_h: Annotated[float, msgspec.Meta(ge=-24, le=24)] = 0.0

    def __post_init__(self) -> None:
        label, least = f"derived feature {self.name!r}", _MIN_FEATURE_ROWS[self.function]
        if self.rows < least or (self.is_time_based and self.rows):
            wanted = "no rows" if self.is_time_based else f"rows of at least {least}"
            raise ValueError(f"{label}: {self.function} takes {wanted}, not {self.rows}")
        if self.is_time_based == bool(self.field):
            raise ValueError(f"{label}: {self.function} {'takes no field' if self.field else 'needs a field'}")
        if (self.function == "band") != (self.band is not None):
            raise ValueError(f"{label}: band = [low, high] in Hz goes with function band")
        if not all(map(math.isfinite, (self.rate, *(self.band or ())))):
            raise ValueError(f"{label}: rate and band must be finite numbers")
        if self.band is None:
            return
        if not 0 <= self.band[0] < self.band[1] <= self.rate / 2 + 1e-9:
            raise ValueError(
                f"{label}: band {list(self.band)} must ascend within 0 and half the rate, {self.rate / 2:g} Hz"
            )
        frequencies = (k * self.rate / self.rows for k in range(self.rows // 2 + 1))
        if not any(self.band[0] <= frequency <= self.band[1] for frequency in frequencies):
            raise ValueError(f"{label}: no frequency of {self.rows} rows lies in its band")

    @property
    def is_time_based(self) -> bool:
        return self.function in ("hour", "weekday")

    @property
    def columns(self) -> list[str]:
        return [f"{self.name}_sin", f"{self.name}_cos"] if self.is_time_based else [self.name]

    @property
    def history_rows(self) -> int:
        """Rows before the current one that it reads."""
        return self.rows if self.function in ("lag", "difference") else max(0, self.rows - 1)


class FeatureReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identity of a feature set."""

    name: str
    version: Version
    digest: Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]

    def __post_init__(self) -> None:
        _check_version(self.version)

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.digest})"


class FeatureSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Feature file: `derived` features of the `fields` of a stream; no history spans a gap above `max_gap_s`."""

    name: str
    version: Version
    definition: Annotated[int, msgspec.Meta(ge=1)] = 1
    fields: Annotated[list[Label], msgspec.Meta(min_length=1, max_length=6144)]
    units: list[str] = []
    max_gap_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    derived: Annotated[list[DerivedFeature], msgspec.Meta(max_length=256)]

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r} must be 1-64 of a-z 0-9 . _ -")
        _check_version(self.version)
        name_columns(self.fields, self.derived)
        if len(self.units) not in (0, len(self.fields)):
            raise ValueError(f"units has {len(self.units)} entries for {len(self.fields)} fields")
        if self.max_gap_s is not None and not math.isfinite(self.max_gap_s):
            raise ValueError(f"max_gap_s is {self.max_gap_s}; give a finite number, or leave it out")

    @property
    def digest(self) -> str:
        """SHA-256 of the content as JSON, with the members in their order here and without defaults."""
        return f"sha256:{hashlib.sha256(msgspec.json.encode(self)).hexdigest()}"

    @property
    def reference(self) -> FeatureReference:
        return FeatureReference(self.name, self.version, self.digest)

    @property
    def columns(self) -> list[str]:
        """Names of the derived features."""
        return [name for feature in self.derived for name in feature.columns]


def _check_version(version: str) -> None:
    if not version.isprintable():
        raise ValueError(f"version {version!r} must be printable text")


def name_columns(fields: Sequence[str], derived: Sequence[DerivedFeature]) -> list[str]:
    """Return the names of fields and derived features. Raises ValueError if they do not fit each other."""
    if len(set(fields)) != len(fields):
        raise ValueError("a field is named twice")
    names = [*fields, *(name for feature in derived for name in feature.columns)]
    for kind, own in (("field", fields), ("derived feature", names[len(fields) :])):
        for name in own:
            require_plain_name(kind, name)
    if len(set(names)) != len(names):
        raise ValueError("derived: a name is used twice, or is a field's")
    for feature in derived:
        if feature.field and feature.field not in fields:
            raise ValueError(f"derived feature {feature.name!r} names {feature.field!r}, which is not a field")
    return names


def read(file: Path) -> FeatureSet:
    """Raise ConfigError that names the file and the key."""
    feature_set = toml_files.read(file, FeatureSet, missing="give the TOML file of a feature set")
    if feature_set.definition > FEATURE_DEFINITION:
        problem = f"is {feature_set.definition}, this version computes {FEATURE_DEFINITION}; update outstation"
        raise ConfigError(str(file), "definition", problem)
    return feature_set

"""`manifest.json`: what a bundle says of itself."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec

from agent.errors import BadBundle
from agent.media import ImageFormat, SoundFormat
from agent.model.bundle.definition import DerivedFeature, IsotonicCalibration, Label, Numbers
from agent.names import is_name
from agent.performance.labels import NO_LABEL, SEPARATOR
from agent.strict_json import check_strict_json

FORMAT = 2
MAX_TEXT_CHARS = 4096
# Members that an agent of format 1 would not know: where one is set the bundle is of format 2, elsewhere they are left
# out, so that what was written as format 1 is written the same way today.
FORMAT_2_MEMBERS = {
    "input": ("definition", "derived", "order", "max_gap_s", "scaling", "max_missing", "image", "sound"),
    "output": ("tensor", "multi_label", "thresholds", "names", "units", "distance", "centroid", "isotonic"),
}


class WindowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rows` a window, `step` between starts; a window never spans a time gap above `max_gap_s`, or a step back."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    step: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    max_gap_s: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.step > self.rows:
            raise ValueError(f"step {self.step} above rows {self.rows} would leave rows out; use step <= rows")


class ModelInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model is given: `fields` and `derived` features, or those of them in `order`, each (x - mean) / std.

    `window` None: one row an inference. `scaling` "window": each column less its own mean in the window, divided by its
    own spread there. `image` or `sound`: what rows are made of. `max_gap_s` ends the history of derived features where
    there is no window. `definition` is the version of how features are computed. Above a share of `max_missing` values
    a result says how many were missing.
    """

    fields: Annotated[list[Label], msgspec.Meta(min_length=1, max_length=6144)]
    units: list[str] = []
    window: WindowSpec | None = None
    mean: Numbers = []
    std: Numbers = []
    definition: int = 0
    derived: Annotated[list[DerivedFeature], msgspec.Meta(max_length=256)] = []
    order: list[Label] = []
    max_gap_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    scaling: Literal["fixed", "window"] = "fixed"
    max_missing: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    image: ImageFormat | None = None
    sound: SoundFormat | None = None

    def __post_init__(self) -> None:
        if self.definition > 1:
            raise ValueError(
                f"definition {self.definition} of features is newer than this agent, which knows 1; update the agent"
            )
        known = [*self.fields, *(name for one in self.derived for name in one.columns)]
        if len(set(self.fields)) != len(self.fields):
            raise ValueError("a field is named twice")
        if len(set(known)) != len(known):
            raise ValueError("derived: a name is given twice, or is a field's")
        for one in self.derived:
            if one.of and one.of not in self.fields:
                raise ValueError(f"derived feature {one.name!r} is of {one.of!r}, which is no field")
        if unknown := [name for name in self.order if name not in known]:
            raise ValueError(f"order names {unknown[0]!r}, which is neither a field nor a derived feature")
        if len(set(self.order)) != len(self.order):
            raise ValueError("order names a feature twice")
        if len(self.units) not in (0, len(self.fields)):
            raise ValueError(f"units has {len(self.units)} entries for {len(self.fields)} fields")
        self._check_scaling()
        self._check_media()

    def _check_media(self) -> None:
        """Of an image or sound the rows follow from it."""
        if self.image is not None and self.sound is not None:
            raise ValueError("image and sound: rows are made of one of them")
        if (made := self.image or self.sound) is not None and self.fields != made.columns:
            raise ValueError(f"fields of an image or sound are {made.columns[0]} to {made.columns[-1]}")
        if self.image is not None:
            one = (self.image.height, self.image.height)
            if self.window is None or (self.window.rows, self.window.step) != one:
                raise ValueError(f"the window of an image is its rows: rows = step = {self.image.height}")
        if self.sound is not None and self.window is not None and self.window.max_gap_s is None:
            raise ValueError("the window of a sound needs max_gap_s, so that none reaches from one file into the next")

    def _check_scaling(self) -> None:
        what = "features" if self.derived or self.order else "fields"
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (0, len(self.columns)):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.columns)} {what}")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} holds a value that is no finite number; give one for each of the {what}")
        if any(not s > 0 for s in self.std):
            raise ValueError("every std must be above 0")
        if self.scaling == "window" and (self.window is None or self.mean or self.std):
            raise ValueError("scaling by the window needs a window, and neither mean nor std")
        if self.window is not None and self.max_gap_s is not None:
            raise ValueError("max_gap_s is the window's where there is one; write window.max_gap_s")

    @property
    def columns(self) -> list[str]:
        """The names of the model's features, in its order."""
        return self.order or [*self.fields, *(name for one in self.derived for name in one.columns)]

    @property
    def history_rows(self) -> int:
        """How many rows before a window its derived features look at."""
        return max((one.history_rows for one in self.derived), default=0)

    @property
    def gap_s(self) -> float | None:
        """The pause that no window and no history reaches over."""
        return self.window.max_gap_s if self.window else self.max_gap_s

    @property
    def rows(self) -> int:
        """Rows of an inference."""
        return self.window.rows if self.window else 1


class ModelOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a tensor becomes labels, scores and values; `temperature` calibrates: p ∝ p^(1/T) (Guo et al. 2017).

    `tensor` is the name or index of the output that is used where a model has several. `multi_label`: each label by
    itself, said where its probability is above its threshold (`thresholds`, one a label; else `threshold`, else 0.5).
    `names` and `units` of the values of kind regress. `threshold` of kinds anomaly and embedding: a value
    above it is an anomaly. An embedding is told as its `distance` to `centroid`.
    """

    labels: list[Label] = []
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    threshold: float | None = None
    tensor: str | int | None = None
    multi_label: bool = False
    thresholds: Numbers = []
    names: list[Label] = []
    units: list[str] = []
    distance: Literal["euclidean", "cosine"] = "euclidean"
    centroid: Numbers = []
    isotonic: IsotonicCalibration | None = None

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is named twice")
        if len(set(self.names)) != len(self.names):
            raise ValueError("names: a value is named twice")
        if len(self.units) not in (0, max(1, len(self.names))):
            raise ValueError(f"units has {len(self.units)} entries for {max(1, len(self.names))} values")
        if self.thresholds and len(self.thresholds) != len(self.labels):
            raise ValueError(f"thresholds has {len(self.thresholds)} entries for {len(self.labels)} labels")
        if self.thresholds and not self.multi_label:
            raise ValueError("thresholds are for multi_label = true")
        if self.multi_label and any(SEPARATOR in label or label == NO_LABEL for label in self.labels):
            raise ValueError(
                f"a label holds {SEPARATOR!r}, which stands between labels, or is {NO_LABEL!r}, which means none"
            )
        if self.multi_label and len(SEPARATOR.join(self.labels)) > MAX_TEXT_CHARS:
            raise ValueError(
                f"labels: all of a multi-label model are at most {MAX_TEXT_CHARS} characters; shorten them"
            )
        if self.multi_label and self.activation == "softmax":
            raise ValueError('activation "softmax" gives one label; multi_label goes with "sigmoid" or "none"')
        if self.multi_label and self.isotonic is not None:
            raise ValueError("isotonic is for one label a result; a multi-label model is calibrated by temperature")


class ResourceLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the probe's child process may use."""

    memory_mib: Annotated[int, msgspec.Meta(ge=64, le=65_536)] = 2048
    seconds: Annotated[int, msgspec.Meta(ge=1, le=600)] = 30


class DriftSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`window`: how many model windows (rows, for a tabular model) make one drift window.

    `min_count`: no bin in a message tells of fewer rows; `seasonality`: whether a site's reference follows the hour of
    day and the days of rest; `class_field`: the category field of a stream that names modes, where the model names no classes.
    """

    window: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 20
    min_count: Annotated[int, msgspec.Meta(ge=2, le=10_000)] | msgspec.UnsetType = msgspec.UNSET
    seasonality: Literal["auto", "hour", "week", "none"] | msgspec.UnsetType = msgspec.UNSET
    class_field: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | msgspec.UnsetType = msgspec.UNSET


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1, 2]
    name: str
    version: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    created: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Literal["classify", "regress", "anomaly", "embedding"]
    input: ModelInput
    output: ModelOutput
    drift: DriftSettings = DriftSettings()
    limits: ResourceLimits = ResourceLimits()
    files: dict[str, Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]]

    def __post_init__(self) -> None:
        if self.drift.class_field and self.output.labels:
            raise ValueError("drift.class_field is for a model without labels; this one names classes itself")
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r} must be 1-64 of a-z 0-9 . _ -")
        if self.kind == "classify" and len(self.output.labels) < (1 if self.output.multi_label else 2):
            raise ValueError("a classifier needs at least two output.labels")
        if self.kind != "classify" and self.output.multi_label:
            raise ValueError("multi_label is for kind classify")
        if self.kind == "embedding" and self.output.threshold is not None and not self.output.centroid:
            raise ValueError("output: an embedding with a threshold needs the centroid that distances are from")
        if self.format == 1 and (newer := list_format_2_members(self)):
            raise ValueError(f"{newer[0]} needs format 2")

    @property
    def label_kind(self) -> Literal["classify", "several", "regress", "anomaly"]:
        """What is true of a result: a class, any number of them, a number, or whether it was an anomaly."""
        if self.kind == "embedding":
            return "anomaly"
        return "several" if self.output.multi_label else self.kind


def list_format_2_members(manifest: Manifest) -> list[str]:
    """What of it an agent of format 1 could not honour."""
    found = ["kind embedding"] if manifest.kind == "embedding" else []
    if manifest.format > 1 and manifest.kind == "classify" and manifest.output.threshold is not None:
        # Of format 1 it means nothing: classifiers named the most probable class.
        found.append("output.threshold of a classifier")
    for room, names in FORMAT_2_MEMBERS.items():
        part, plain = getattr(manifest, room), _DEFAULTS[room]
        found += [f"{room}.{name}" for name in names if getattr(part, name) != getattr(plain, name)]
    return found


def to_oldest_format(manifest: Manifest) -> Manifest:
    """The same, of format 1 where any agent can honour it."""
    if list_format_2_members(
        msgspec.structs.replace(manifest, input=msgspec.structs.replace(manifest.input, definition=0))
    ):
        return msgspec.structs.replace(manifest, input=msgspec.structs.replace(manifest.input, definition=1))
    return msgspec.structs.replace(manifest, format=1)


_DEFAULTS: dict[str, Any] = {"input": ModelInput(fields=["x"]), "output": ModelOutput()}


def decode(data: bytes) -> Manifest:
    """Raises BadBundle."""
    try:
        newest = msgspec.json.decode(data, type=_FormatHeader).format
    except (msgspec.MsgspecError, ValueError, RecursionError):
        newest = FORMAT  # what is wrong is said below
    if newest > FORMAT:
        raise BadBundle(
            f"manifest.json: the bundle is of format {newest}, this agent reads formats 1 to {FORMAT}; update the agent"
        )
    try:
        found = msgspec.json.decode(data, type=Manifest)
        check_strict_json(data)
        return found
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadBundle(f"manifest.json: {error}") from None


class _FormatHeader(msgspec.Struct):
    format: int


def encode(manifest: Manifest) -> bytes:
    """One spelling for one content: sorted keys, two spaces, a newline at the end."""
    members = msgspec.to_builtins(manifest)
    for room, names in FORMAT_2_MEMBERS.items():
        for name in names:
            if getattr(getattr(manifest, room), name) == getattr(_DEFAULTS[room], name):
                del members[room][name]
    return msgspec.json.format(msgspec.json.encode(members, order="sorted"), indent=2) + b"\n"

"""Manifest of a bundle (`manifest.json`): identity, model input and output, limits, and the digest of every file."""

import itertools
import math
from typing import Annotated, Literal

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import BadBundle
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.foundation.names import is_name
from outstation.foundation.strict_json import check_strict_json
from outstation.foundation.text import require_one_line, require_plain_name
from outstation.ml.model.bundle.feature_set import (
    FEATURE_DEFINITION,
    DerivedFeature,
    FeatureReference,
    FeatureSet,
    Label,
    name_columns,
)
from outstation.ml.model.bundle.tensor_selection import TensorSelection
from outstation.ml.performance.labels import NO_LABEL, SEPARATOR, LabelSchema
from outstation.protocol.alerts.alert import OUTPUT_PREFIX

FORMAT = 1
MAX_TEXT_CHARS = 4096

Numbers = list[float]


class IsotonicCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Accuracy of a score: linear between the points (`score`, `accuracy`), both ascending (Zadrozny, Elkan 2002)."""

    score: Annotated[Numbers, msgspec.Meta(min_length=2, max_length=256)]
    accuracy: Annotated[Numbers, msgspec.Meta(min_length=2, max_length=256)]

    def __post_init__(self) -> None:
        if len(self.score) != len(self.accuracy):
            raise ValueError("isotonic: score and accuracy must have as many entries")
        for name, values, least_step in (("score", self.score, 1e-12), ("accuracy", self.accuracy, 0.0)):
            is_ascending = all(b - a >= least_step for a, b in itertools.pairwise(values))
            if not is_ascending or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"isotonic: {name} must ascend within 0 and 1")


class WindowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rows` per window, `step` between starts. No window spans a gap above `max_gap_s`, or a step back in time."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    step: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    max_gap_s: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.step > self.rows:
            raise ValueError(f"step {self.step} above rows {self.rows} would leave rows out; use step <= rows")


FieldRole = Literal["sensor", "category", "computed"]


class ModelInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Model input: `fields` and `derived` features, or those in `feature_order`, each scaled to (x - mean) / std.

    Without a `window` an inference reads one row. `scaling` "window" subtracts from each column its mean in the window
    and divides by its standard deviation there. `image` or `sound` says what rows are made of. `max_gap_s` bounds the
    history of derived features without a window. `definition` is the version of how features are computed. A result
    whose share of missing values exceeds `max_missing` reports that share. `roles` say what fields are, so that an
    alert names no cause that they cannot have. `tensor` is the name or index of the input of a model with several.
    `features` pins the feature set that fields, derived features and gap are of.
    """

    fields: Annotated[list[Label], msgspec.Meta(min_length=1, max_length=6144)]
    units: list[str] = []
    roles: list[FieldRole] = []
    window: WindowSpec | None = None
    mean: Numbers = []
    std: Numbers = []
    definition: Annotated[int, msgspec.Meta(ge=1)] = FEATURE_DEFINITION
    derived: Annotated[list[DerivedFeature], msgspec.Meta(max_length=256)] = []
    feature_order: list[Label] = []
    max_gap_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    scaling: Literal["fixed", "window"] = "fixed"
    max_missing: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    image: ImageFormat | None = None
    sound: SoundFormat | None = None
    tensor: str | int | None = None
    features: FeatureReference | None = None

    def __post_init__(self) -> None:
        if self.definition > FEATURE_DEFINITION:
            raise ValueError(
                f"definition {self.definition} of features is newer than this agent, which knows "
                f"{FEATURE_DEFINITION}; update the agent"
            )
        self._check_features()
        if len(self.units) not in (0, len(self.fields)):
            raise ValueError(f"units has {len(self.units)} entries for {len(self.fields)} fields")
        if len(self.roles) not in (0, len(self.fields)):
            raise ValueError(f"roles has {len(self.roles)} entries for {len(self.fields)} fields")
        self._check_scaling()
        self._check_media()
        if self.features is not None:
            self._check_feature_set(self.features)

    def _check_features(self) -> None:
        known = name_columns(self.fields, self.derived)
        if unknown := [name for name in self.feature_order if name not in known]:
            raise ValueError(f"feature_order names {unknown[0]!r}, which is neither a field nor a derived feature")
        if len(set(self.feature_order)) != len(self.feature_order):
            raise ValueError("feature_order names a feature twice")

    def _check_feature_set(self, pinned: FeatureReference) -> None:
        contained = FeatureSet(
            name=pinned.name,
            version=pinned.version,
            definition=self.definition,
            fields=self.fields,
            units=self.units,
            max_gap_s=self.gap_s,
            derived=self.derived,
        )
        if contained.digest != pinned.digest:
            raise ValueError(
                f"features: {pinned.name} {pinned.version} is pinned as {pinned.digest}, but the fields, derived "
                f"features and gap here are {contained.digest}; pack the bundle again from its feature file"
            )

    def _check_media(self) -> None:
        if self.image is not None and self.sound is not None:
            raise ValueError("image and sound: rows are made of one of them")
        if (media := self.image or self.sound) is not None and self.fields != media.columns:
            raise ValueError(f"fields of an image or sound are {media.columns[0]} to {media.columns[-1]}")
        if self.image is not None:
            rows = self.image.height
            if self.window is None or (self.window.rows, self.window.step) != (rows, rows):
                raise ValueError(f"the window of an image is its rows: rows = step = {rows}")
        if self.sound is not None and self.window is not None and self.window.max_gap_s is None:
            raise ValueError("the window of a sound needs max_gap_s, so that none spans two files")

    def _check_scaling(self) -> None:
        noun = "features" if self.derived or self.feature_order else "fields"
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (0, len(self.columns)):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.columns)} {noun}")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} has a value that is not a finite number; give one for each of the {noun}")
        if any(not s > 0 for s in self.std):
            raise ValueError("every std must be above 0")
        if self.scaling == "window" and (self.window is None or self.mean or self.std):
            raise ValueError("scaling by the window needs a window, and neither mean nor std")
        if self.window is not None and self.max_gap_s is not None:
            raise ValueError("max_gap_s is the window's where there is one; write window.max_gap_s")

    @property
    def columns(self) -> list[str]:
        """Names of the model's features, in its order."""
        return self.feature_order or [*self.fields, *(name for feature in self.derived for name in feature.columns)]

    @property
    def used_features(self) -> list[DerivedFeature]:
        """Derived features that are among the model's."""
        columns = {*self.columns}
        return [feature for feature in self.derived if not columns.isdisjoint(feature.columns)]

    @property
    def history_rows(self) -> int:
        """Rows before a window that its derived features read."""
        return max((feature.history_rows for feature in self.used_features), default=0)

    @property
    def gap_s(self) -> float | None:
        """The longest gap that a window or a history may span."""
        return self.window.max_gap_s if self.window else self.max_gap_s

    @property
    def rows(self) -> int:
        return self.window.rows if self.window else 1


class JoinedInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Further model input: `fields` of another stream or of the same one, joined to each window at its last row's time.

    It holds the newest `rows` rows up to that time, oldest first; with `period_s` the newest row at each of as many
    times, `period_s` apart. Rows without a value do not count, and values older than `max_age_s` are missing. Values
    are scaled to (x - mean) / std. `tensor` is the name or index of the model's input, by default the name of this one.
    """

    fields: Annotated[list[Label], msgspec.Meta(min_length=1, max_length=512)]
    max_age_s: Annotated[float, msgspec.Meta(gt=0, le=31_622_400)]
    rows: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    period_s: Annotated[float, msgspec.Meta(gt=0, le=31_622_400)] | None = None
    units: list[str] = []
    mean: Numbers = []
    std: Numbers = []
    tensor: str | int | None = None

    def __post_init__(self) -> None:
        if len(set(self.fields)) != len(self.fields):
            raise ValueError("inputs: a field is named twice")
        for field in self.fields:
            require_plain_name("field", field)
        for name in ("units", "mean", "std"):
            if len(getattr(self, name)) not in (0, len(self.fields)):
                raise ValueError(f"inputs: {name} has {len(getattr(self, name))} entries for {len(self.fields)} fields")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or any(not s > 0 for s in self.std):
            raise ValueError("inputs: mean and std must be finite numbers, and every std above 0")

    @property
    def size(self) -> int:
        """Values of one inference."""
        return self.rows * len(self.fields)


class ModelOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Model output: how a tensor becomes labels, scores and values.

    `temperature` calibrates scores: p ∝ p^(1/T) (Guo et al. 2017). `tensor` is the name or index of the output of a
    model with several. With `multi_label` every label is independent, and predicted above its threshold (`thresholds`,
    one per label; else `threshold`, else 0.5). A binary classifier predicts its second label above `threshold`. `names`
    and `units` describe the values of kind regress. For kinds anomaly and embedding, values above `threshold` are
    anomalies. The value of an embedding is its `distance` to `centroid`. The truth of a value of kind regress lies
    within `residual_bounds` of it in 95 of 100 cases.
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
    residual_bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (bounds := self.residual_bounds) is not None and not -math.inf < bounds[0] <= bounds[1] < math.inf:
            raise ValueError(f"residual_bounds {list(bounds)} must be finite and ascend")
        if self.residual_bounds is not None and {"low", "high"} & set(self.names[1:]):
            raise ValueError("names: low and high are the bounds of the first value; rename the others")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is named twice")
        for label in self.labels:
            require_one_line("label", label)
        for name in self.names:
            require_plain_name("value", name)
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
                f"a label contains {SEPARATOR!r}, which separates labels, or is {NO_LABEL!r}, which means none"
            )
        if self.multi_label and len(SEPARATOR.join(self.labels)) > MAX_TEXT_CHARS:
            raise ValueError(f"labels of a multi-label model may have {MAX_TEXT_CHARS} characters in all; shorten them")
        if self.multi_label and self.activation == "softmax":
            raise ValueError('activation "softmax" gives one label; multi_label goes with "sigmoid" or "none"')
        if self.multi_label and self.isotonic is not None:
            raise ValueError("isotonic needs one label per result; calibrate a multi-label model by temperature")


class FurtherOutput(ModelOutput, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Further model output with a kind of its own; `size`: its values, if they are not one for each label or name.

    `tensor` is by default the name of this output.
    """

    kind: Literal["classify", "regress", "anomaly"]
    size: Annotated[int, msgspec.Meta(ge=0, le=65_536)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "classify" and len(self.labels) < (1 if self.multi_label else 2):
            raise ValueError("outputs: a classifier needs at least two labels")
        if self.kind != "classify" and (self.multi_label or self.labels):
            raise ValueError("outputs: labels and multi_label are for kind classify")
        if self.kind != "regress" and self.names:
            raise ValueError("outputs: names are for kind regress")
        if self.residual_bounds is not None:
            raise ValueError("outputs: residual_bounds are for the first output; remove them here")
        labels, is_one_sigmoid = len(self.labels), self.size == 1 and len(self.labels) == 2 and not self.multi_label
        if self.kind == "classify" and self.size not in (0, labels) and not is_one_sigmoid:
            raise ValueError(f"outputs: size {self.size} for {labels} labels; name each label, or leave size out")
        if self.kind == "regress" and self.names and self.size not in (0, len(self.names)):
            raise ValueError(f"outputs: size {self.size} for {len(self.names)} names; name each value")

    @property
    def values(self) -> int:
        return self.size or max(1, len(self.labels if self.kind == "classify" else self.names))


class ResourceLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of the process that probes the bundle."""

    memory_mib: Annotated[int, msgspec.Meta(ge=64, le=65_536)] = 2048
    cpu_seconds: Annotated[int, msgspec.Meta(ge=1, le=600)] = 30


class DriftSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drift detection of the model. `window` is the number of model windows (of rows without one) per drift window.

    `min_count` is the smallest row count of a bin in a message. `seasonality` says if a site's reference follows the
    hour of day and days of rest. `class_field` is the category field that names classes if the model names none.
    """

    window: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 20
    min_count: Annotated[int, msgspec.Meta(ge=2, le=10_000)] | msgspec.UnsetType = msgspec.UNSET
    seasonality: Literal["auto", "hour", "week", "none"] | msgspec.UnsetType = msgspec.UNSET
    class_field: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | msgspec.UnsetType = msgspec.UNSET


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1]
    name: str
    version: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    created: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Literal["classify", "regress", "anomaly", "embedding"]
    input: ModelInput
    output: ModelOutput
    inputs: Annotated[dict[str, JoinedInput], msgspec.Meta(max_length=8)] | msgspec.UnsetType = msgspec.UNSET
    outputs: Annotated[dict[str, FurtherOutput], msgspec.Meta(max_length=16)] | msgspec.UnsetType = msgspec.UNSET
    drift: DriftSettings = DriftSettings()
    limits: ResourceLimits = ResourceLimits()
    files: dict[str, Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]]

    def __post_init__(self) -> None:
        if self.drift.class_field and self.output.labels:
            raise ValueError("drift.class_field is for a model without labels; this model names classes itself")
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r} must be 1-64 of a-z 0-9 . _ -")
        if self.kind == "classify" and len(self.output.labels) < (1 if self.output.multi_label else 2):
            raise ValueError("a classifier needs at least two output.labels")
        if self.kind != "classify" and self.output.multi_label:
            raise ValueError("multi_label is for kind classify")
        if self.kind == "embedding" and self.output.threshold is not None and not self.output.centroid:
            raise ValueError("output: an embedding with a threshold needs the centroid that distances are from")
        for name in (*self.joined, *self.further):
            if not is_name(name):
                raise ValueError(f"inputs and outputs: name {name!r} must be 1-64 of a-z 0-9 . _ -")
        fields = [*self.input.fields, *(name for spec in self.joined.values() for name in spec.fields)]
        if clashes := [name for name in fields if name.startswith(OUTPUT_PREFIX)]:
            raise ValueError(f"field {clashes[0]!r}: alerts about outputs have names that begin with {OUTPUT_PREFIX!r}")
        names = [column for name, output in self.further.items() for column in output_columns(name, output)]
        names += [f"value_{name}" for name in self.output.names[1:]] + [f"score_{name}" for name in self.output.labels]
        if self.output.residual_bounds is not None:
            names += ["value_low", "value_high"]
        if len(set(names)) != len(names):
            raise ValueError(f"outputs: two results would have one column name, of {sorted(names)[:20]}; rename one")

    @property
    def joined(self) -> dict[str, JoinedInput]:
        """Further inputs by name, in the order of their values."""
        return {} if self.inputs is msgspec.UNSET else dict(sorted(self.inputs.items()))

    @property
    def further(self) -> dict[str, FurtherOutput]:
        """Further outputs by name, in the order of their values."""
        return {} if self.outputs is msgspec.UNSET else dict(sorted(self.outputs.items()))

    @property
    def tensors(self) -> TensorSelection:
        inputs = [name if spec.tensor is None else spec.tensor for name, spec in self.joined.items()]
        outputs = [name if spec.tensor is None else spec.tensor for name, spec in self.further.items()]
        return TensorSelection((self.input.tensor, *inputs), (self.output.tensor, *outputs))

    @property
    def label_kind(self) -> Literal["classify", "several", "regress", "anomaly"]:
        """Type of the ground truth of a result: a class, several of them, a number, or anomaly."""
        if self.kind == "embedding":
            return "anomaly"
        return "several" if self.output.multi_label else self.kind

    @property
    def label_schemas(self) -> dict[str, LabelSchema]:
        """Schema of the ground truth of each output; the first output has the name ""."""
        schemas = {"": LabelSchema(self.label_kind, tuple(self.output.labels))}
        for name, output in self.further.items():
            schemas[name] = LabelSchema("several" if output.multi_label else output.kind, tuple(output.labels))
        return schemas


def output_columns(name: str, output: FurtherOutput) -> list[str]:
    """Return the names of the result columns of a further output."""
    if output.kind != "classify":
        labels = [f"label_{name}"] if output.kind == "anomaly" and output.threshold is not None else []
        return [*labels, f"value_{name}", *(f"value_{name}_{other}" for other in output.names[1:])]
    scores = [f"score_{name}_{label}" for label in output.labels] if output.multi_label else []
    return [f"label_{name}", f"score_{name}", *scores]


def decode(data: bytes) -> Manifest:
    """Decode and validate manifest.json. Raises BadBundle."""
    try:
        manifest_format = decoders.from_json(data, _FormatHeader).format
    except (msgspec.MsgspecError, ValueError, RecursionError):
        manifest_format = FORMAT  # the error is reported below
    if manifest_format > FORMAT:
        raise BadBundle(
            f"manifest.json: the bundle has format {manifest_format}, this agent reads format {FORMAT}; "
            "update the agent"
        )
    try:
        manifest = decoders.from_json(data, Manifest)
        check_strict_json(data)
        return manifest
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadBundle(f"manifest.json: {error}") from None


class _FormatHeader(msgspec.Struct):
    format: int


def encode(manifest: Manifest) -> bytes:
    """Encode a manifest. The same content gives the same bytes: sorted keys, two spaces, a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"

"""`manifest.json`: what a bundle says of itself."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from agent.errors import BadBundle
from agent.jsonkeys import check_keys
from agent.names import is_name

FORMAT = 1
Numbers = list[float]
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Windowing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rows` a window, `step` between starts; a window never spans a time gap above `max_gap_s`, or a step back."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    step: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    max_gap_s: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.step > self.rows:
            raise ValueError(f"step {self.step} above rows {self.rows} would leave rows out; use step <= rows")


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fields in the model's order; each value becomes (x - mean) / std. `window` None: one row an inference."""

    fields: Annotated[list[Label], msgspec.Meta(min_length=1, max_length=4096)]
    units: list[str] = []
    window: Windowing | None = None
    mean: Numbers = []
    std: Numbers = []

    def __post_init__(self) -> None:
        if len(set(self.fields)) != len(self.fields):
            raise ValueError("a field is named twice")
        for name in ("units", "mean", "std"):
            values = getattr(self, name)
            if values and len(values) != len(self.fields):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.fields)} fields")
        if any(not s > 0 for s in self.std):
            raise ValueError("every std must be above 0")


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a tensor becomes labels and scores; `temperature` calibrates: p ∝ p^(1/T) (Guo et al. 2017)."""

    labels: list[Label] = []
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is named twice")


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the probe's child process may use."""

    memory_mib: Annotated[int, msgspec.Meta(ge=64, le=65_536)] = 2048
    seconds: Annotated[int, msgspec.Meta(ge=1, le=600)] = 30


class DriftWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`window`: how many model windows (rows, for a tabular model) make one drift window.

    `min_count`: no bin in a message tells of fewer rows; `strata`: whether a site's reference follows the hour of
    day and the days of rest; `mode`: the category field of a stream that names modes, where the model names no classes.
    """

    window: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 20
    min_count: Annotated[int, msgspec.Meta(ge=2, le=10_000)] | msgspec.UnsetType = msgspec.UNSET
    strata: Literal["auto", "hour", "week", "none"] | msgspec.UnsetType = msgspec.UNSET
    mode: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | msgspec.UnsetType = msgspec.UNSET


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1]
    name: str
    version: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    created: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Literal["classify", "regress", "anomaly"]
    input: Input
    output: Output
    drift: DriftWindow = DriftWindow()
    limits: Limits = Limits()
    files: dict[str, Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]]

    def __post_init__(self) -> None:
        if self.drift.mode and self.output.labels:
            raise ValueError("drift.mode is for a model without labels; this one names classes itself")
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r} must be 1-64 of a-z 0-9 . _ -")
        if self.kind == "classify" and len(self.output.labels) < 2:
            raise ValueError("a classifier needs at least two output.labels")


def decode(data: bytes) -> Manifest:
    """Raises BadBundle."""
    try:
        found = msgspec.json.decode(data, type=Manifest)
        check_keys(data)
        return found
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadBundle(f"manifest.json: {error}") from None


def encode(manifest: Manifest) -> bytes:
    """One spelling for one content: sorted keys, two spaces, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"

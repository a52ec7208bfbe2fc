"""What a `.tflite` file says of itself, and the SPEC to fill in that follows from it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from agent.drift.baseline.reference import FEWEST
from agent.model.bundle.manifest import DriftWindow

if TYPE_CHECKING:
    from agent.model.inference.runtime import Model

_ROWS = 64
_CLOSE = 0.02
# More fields than a person would list.
_LISTED = 64
_SMALLEST_IMAGE = 16
# Model windows of a drift reference: the fewest drift windows, of the usual length.
_REFERENCE = FEWEST * DriftWindow().window


class Tensor(msgspec.Struct, frozen=True):
    """`shape` of one inference; `batch` 0: any; `limits` of the values that a quantized one can hold."""

    name: str
    shape: tuple[int, ...]
    batch: int
    dtype: str
    limits: tuple[float, float] | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def step(self) -> float:
        """Between neighbouring values of a quantized tensor."""
        return (self.limits[1] - self.limits[0]) / (256 if self.dtype.endswith("int8") else 65536) if self.limits else 0

    def __str__(self) -> str:
        batch = "any batch" if self.batch == 0 else f"a batch of {self.batch}"
        held = f", values {self.limits[0]:.4g} to {self.limits[1]:.4g}" if self.limits else ""
        return f"{self.name!r} {self.dtype} {list(self.shape)}, {batch}{held}"


class Answers(msgspec.Struct, frozen=True):
    """What an output gave for noise: its least and largest value, and bounds of sums and lengths over an inference."""

    low: float
    high: float
    sums: tuple[float, float]
    lengths: tuple[float, float]


class Outline(msgspec.Struct, frozen=True):
    """A model's tensors; what each output answered."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    answers: Annotated[list[Answers], msgspec.Meta(min_length=1)]


def of(content: bytes) -> Outline:
    """Runs the model: only in a child process. Raises BadBundle."""
    from agent.model.inference import runtime

    models = [runtime.Model(content, output=0)]
    inputs, outputs = runtime.tensors(content)
    models += [runtime.Model(content, output=i) for i in range(1, len(outputs))]
    return Outline(inputs, outputs, [_answers(model) for model in models])


def _answers(model: Model) -> Answers:
    import numpy as np

    low, high = model.input_range
    noise = np.random.default_rng(0).uniform(low, high, (_ROWS, *model.input_shape)).astype(np.float32)
    found = np.nan_to_num(model.invoke(noise).astype(np.float64), nan=np.inf, posinf=1e300, neginf=-1e300)
    with np.errstate(over="ignore"):
        sums, lengths = found.sum(axis=1), np.sqrt(np.square(found).sum(axis=1))
    bounds = [float(f(x)) for x in (found, sums, lengths) for f in (np.min, np.max)]
    finite = [value if math.isfinite(value) else 1e300 for value in bounds]
    return Answers(finite[0], finite[1], (finite[2], finite[3]), (finite[4], finite[5]))


class Table(msgspec.Struct, frozen=True):
    """Of data beside the model: its columns of numbers, its rows, and the labels in it."""

    path: str
    columns: Sequence[str]
    rows: int
    labels: Sequence[str]


class _Guess(msgspec.Struct, frozen=True):
    kind: str
    why: str
    activation: str = "none"
    labels: int = 0
    several: bool = False


def guess(outline: Outline, at: int = 0) -> _Guess:
    """The kind that a model's tensors and answers speak for."""
    given, made, answers = outline.inputs[0], outline.outputs[at], outline.answers[at]
    unit = answers.low >= -_CLOSE and answers.high <= 1 + _CLOSE
    # What rounding may take from a sum of probabilities, or add to it.
    lost = min(0.9, made.step * made.size / 2)
    if made.size == given.size > 1:
        return _Guess("anomaly", "it gives as many values as it takes: the error of what it gives back is the value")
    if made.size == 1:
        if unit and made.limits and made.limits[1] <= 1:
            return _Guess("classify", "it gives one value from 0 to 1: the probability of the second label", labels=2)
        return _Guess("regress", "it gives one value")
    if unit and all(abs(total - 1) < max(2 * _CLOSE, lost) for total in answers.sums):
        return _Guess("classify", f"its {made.size} values sum to 1: softmax is in the model", labels=made.size)
    if all(abs(length - 1) < _CLOSE for length in answers.lengths):
        return _Guess("embedding", "its values are vectors of length 1")
    if unit:
        why = f"its {made.size} values are from 0 to 1 and do not sum to 1: each label by itself"
        return _Guess("classify", why, labels=made.size, several=True)
    why = f"it gives {made.size} values of any size: taken for the logits of as many labels"
    return _Guess("classify", why, "softmax", made.size)


def spec(outline: Outline, model: str, name: str, table: Table | None = None) -> str:
    """The text of a SPEC for the model at path `model`, relative to the SPEC; `table` is data beside it."""
    made = guess(outline)
    labels = _labels(made, table)
    lines = [
        "# What `outstation model pack` makes a bundle from; paths are relative to this file. Look at every line.",
        *(f"# in:   {one}" for one in outline.inputs),
        *(f"# out:  {one}" for one in outline.outputs),
        f'name = "{_name(name)}"',
        'version = "0.1.0"',
        f'kind = "{made.kind}"  # {made.why}; else classify, regress, anomaly or embedding',
        f"model = {_toml(model)}",
    ]
    if labels:
        lines += ["# In the order of the outputs: as the model was trained, which no file tells.", f"labels = {labels}"]
    data = _toml(table.path) if table else '"readings.csv"'
    off = "" if table else "# "
    lines += [
        _reference(outline.inputs[0], data, table),
        f"{off}golden = {data}  # a few inputs, so that a device can prove that its CPU computes what this one does",
        '# card = { model = "MODEL_CARD.md", data = "DATA_CARD.md" }',
        "",
        *_input(outline.inputs[0], table),
        "",
        *_output(outline, made),
    ]
    return "\n".join(lines) + "\n"


def _reference(given: Tensor, data: str, table: Table | None) -> str:
    told = "readings in which nothing is wrong: what drift, and a threshold, are told from"
    windows = table.rows // shape(given.shape)[0] if table else 0
    if table and windows < _REFERENCE:
        told = f"{windows} windows of readings; from {_REFERENCE} on devices can watch for drift"
        return f"# reference = {data}  # {told}"
    return f"{'' if table else '# '}reference = {data}  # {told}"


def _input(given: Tensor, table: Table | None) -> list[str]:
    if (picture := _image(given)) is not None:
        return ["[input]", picture, "# Where the data are rows instead: fields, and window = { rows, step }."]
    rows, width, why = shape(given.shape)
    columns = list(table.columns) if table and len(table.columns) == width else []
    lines = ["[input]"]
    if columns or width <= _LISTED:
        told = "the columns of the data, in the model's order" if columns else "name them as your stream does"
        lines.append(f"fields = {_toml(columns or [f'x{i}' for i in range(width)])}  # {told}")
    else:
        lines.append(f'fields = {{ prefix = "x", count = {width} }}  # x0, x1, …')
    if table and not columns:
        lines.append(f"# {table.path} has {len(table.columns)} columns of numbers: {_toml(list(table.columns)[:20])}")
    if rows > 1:
        lines.append(f"window = {{ rows = {rows}, step = {rows}, max_gap_s = 1.0 }}  # {why}")
    if given.limits:
        lines.append(f"# The input holds {given.limits[0]:.4g} to {given.limits[1]:.4g}; what is beyond is cut off.")
    lines.append("# mean = […] and std = […], one for each field, where the model was trained on (x - mean) / std.")
    return lines


def _image(given: Tensor) -> str | None:
    """Where the tensor has the shape of one: all 256 values of a pixel over what a quantized one can hold."""
    if len(given.shape) != 3 or given.shape[2] not in (1, 3) or min(given.shape[:2]) < _SMALLEST_IMAGE:
        return None
    height, width, channels = given.shape
    low, high = given.limits or (0.0, 1.0)
    scaled = f"scale = {(high - low) / 255:.10g}, offset = {low:.10g}"
    told = "pixel · scale + offset, as in training"
    return f"image = {{ width = {width}, height = {height}, channels = {channels}, {scaled} }}  # {told}"


def shape(dims: Sequence[int]) -> tuple[int, int, str]:
    """(rows, fields, why) of an input of these dimensions without the batch."""
    told = [size for size in dims if size != 1]
    if len(told) <= 1:
        return 1, math.prod(dims), ""
    return told[0], math.prod(told[1:]), f"{' x '.join(map(str, dims))}: rows of {math.prod(told[1:])} values"


def _output(outline: Outline, made: _Guess) -> list[str]:
    lines = ["[output]"]
    if len(outline.outputs) > 1:
        others = ", ".join(json.dumps(one.name) for one in outline.outputs)
        lines.append(f"tensor = {_toml(outline.outputs[0].name)}  # one of {others}")
    if made.kind == "classify":
        lines.append(f'activation = "{made.activation}"  # what is still to be done: none, softmax or sigmoid')
    if made.several:
        lines.append("multi_label = true  # any number of labels is said, each above its threshold (0.5)")
    if made.kind == "classify":
        lines.append('# calibrate = "heldout.csv"  # with column label, of data the model was not trained on')
    if made.kind == "regress":
        lines.append('# units = ["W"]')
    if made.kind in ("anomaly", "embedding"):
        lines.append("quantile = 0.99  # of the reference's values: what is above is an anomaly; or threshold = …")
    return lines


def _labels(made: _Guess, table: Table | None) -> str:
    if not made.labels:
        return ""
    if table and len(table.labels) == made.labels:
        return _toml(sorted(table.labels))
    return _toml([f"class {i}" for i in range(made.labels)])


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:64] or "model"


def _toml(value: object) -> str:
    """JSON's strings and lists of them are TOML's."""
    return json.dumps(value, ensure_ascii=False)

"""Model inspection: what a `.tflite` file declares, how its outputs behave, and the SPEC that follows from both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from agent.drift.baseline.reference import MIN_WINDOWS
from agent.model.bundle.manifest import DriftSettings
from agent.model.inference.tensors import ModelInspection, OutputStats, Tensor

if TYPE_CHECKING:
    from agent.model.inference.runtime import TfliteModel

_NOISE_ROWS = 64
_TOLERANCE = 0.02
# More fields than a person would list.
_MAX_LISTED_FIELDS = 64
_MIN_IMAGE_SIDE = 16
# Model windows of a drift reference: the fewest drift windows, of the usual length.
_MIN_REFERENCE_WINDOWS = MIN_WINDOWS * DriftSettings().window


def inspect_model(content: bytes) -> ModelInspection:
    """Inspect a model by running it: call this in a child process only. Raises BadBundle."""
    # The parent only renders the result, and needs no runtime.
    from agent.model.inference import runtime

    models = [runtime.TfliteModel(content, output=0)]
    inputs, outputs = runtime.list_tensors(content)
    models += [runtime.TfliteModel(content, output=i) for i in range(1, len(outputs))]
    return ModelInspection(inputs, outputs, [_measure_output(model) for model in models])


def _measure_output(model: TfliteModel) -> OutputStats:
    low, high = model.input_range
    noise = np.random.default_rng(0).uniform(low, high, (_NOISE_ROWS, *model.input_shape)).astype(np.float32)
    found = np.nan_to_num(model.invoke(noise).astype(np.float64), nan=np.inf, posinf=1e300, neginf=-1e300)
    with np.errstate(over="ignore"):
        sums, lengths = found.sum(axis=1), np.sqrt(np.square(found).sum(axis=1))
    bounds = [float(f(x)) for x in (found, sums, lengths) for f in (np.min, np.max)]
    finite = [value if math.isfinite(value) else 1e300 for value in bounds]
    return OutputStats(finite[0], finite[1], (finite[2], finite[3]), (finite[4], finite[5]))


class TableInfo(msgspec.Struct, frozen=True):
    """Of data beside the model: its columns of numbers, its rows, and the labels in it."""

    path: str
    columns: Sequence[str]
    rows: int
    labels: Sequence[str]


class _KindGuess(msgspec.Struct, frozen=True):
    kind: str
    rationale: str
    activation: str = "none"
    label_count: int = 0
    multi_label: bool = False


def guess_kind(inspection: ModelInspection, output_index: int = 0) -> _KindGuess:
    """The kind that a model's tensors and answers speak for."""
    given, made, answers = inspection.inputs[0], inspection.outputs[output_index], inspection.output_stats[output_index]
    unit = answers.low >= -_TOLERANCE and answers.high <= 1 + _TOLERANCE
    # What rounding may take from a sum of probabilities, or add to it.
    lost = min(0.9, made.quantization_step * made.size / 2)
    if made.size == given.size > 1:
        return _KindGuess(
            "anomaly", "it gives as many values as it takes: the error of what it gives back is the value"
        )
    if made.size == 1:
        if unit and made.limits and made.limits[1] <= 1:
            return _KindGuess(
                "classify", "it gives one value from 0 to 1: the probability of the second label", label_count=2
            )
        return _KindGuess("regress", "it gives one value")
    if unit and all(abs(total - 1) < max(2 * _TOLERANCE, lost) for total in answers.sums):
        return _KindGuess(
            "classify", f"its {made.size} values sum to 1: softmax is in the model", label_count=made.size
        )
    if all(abs(length - 1) < _TOLERANCE for length in answers.norms):
        return _KindGuess("embedding", "its values are vectors of length 1")
    if unit:
        why = f"its {made.size} values are from 0 to 1 and do not sum to 1: each label by itself"
        return _KindGuess("classify", why, label_count=made.size, multi_label=True)
    why = f"it gives {made.size} values of any size: taken for the logits of as many labels"
    return _KindGuess("classify", why, "softmax", made.size)


def render_spec(inspection: ModelInspection, model: str, name: str, table: TableInfo | None = None) -> str:
    """The text of a SPEC for the model at path `model`, relative to the SPEC; `table` is data beside it."""
    made = guess_kind(inspection)
    labels = _format_labels(made, table)
    lines = [
        "# What `outstation model pack` makes a bundle from; paths are relative to this file. Look at every line.",
        *(f"# in:   {one}" for one in inspection.inputs),
        *(f"# out:  {one}" for one in inspection.outputs),
        f'name = "{_slugify(name)}"',
        'version = "0.1.0"',
        f'kind = "{made.kind}"  # {made.rationale}; else classify, regress, anomaly or embedding',
        f"model = {_to_toml(model)}",
    ]
    if labels:
        lines += ["# In the order of the outputs: as the model was trained, which no file tells.", f"labels = {labels}"]
    data = _to_toml(table.path) if table else '"readings.csv"'
    off = "" if table else "# "
    lines += [
        _reference_line(inspection.inputs[0], data, table),
        f"{off}golden = {data}  # a few inputs, so that a device can prove that its CPU computes what this one does",
        '# card = { model = "MODEL_CARD.md", data = "DATA_CARD.md" }',
        "",
        *_input_lines(inspection.inputs[0], table),
        "",
        *_output_lines(inspection, made),
    ]
    return "\n".join(lines) + "\n"


def _reference_line(tensor: Tensor, data: str, table: TableInfo | None) -> str:
    told = "readings in which nothing is wrong: what drift, and a threshold, are told from"
    windows = table.rows // infer_window_shape(tensor.shape)[0] if table else 0
    if table and windows < _MIN_REFERENCE_WINDOWS:
        told = f"{windows} windows of readings; from {_MIN_REFERENCE_WINDOWS} on devices can watch for drift"
        return f"# reference = {data}  # {told}"
    return f"{'' if table else '# '}reference = {data}  # {told}"


def _input_lines(tensor: Tensor, table: TableInfo | None) -> list[str]:
    if (picture := _image_line(tensor)) is not None:
        return ["[input]", picture, "# Where the data are rows instead: fields, and window = { rows, step }."]
    rows, width, why = infer_window_shape(tensor.shape)
    columns = list(table.columns) if table and len(table.columns) == width else []
    lines = ["[input]"]
    if columns or width <= _MAX_LISTED_FIELDS:
        told = "the columns of the data, in the model's order" if columns else "name them as your stream does"
        lines.append(f"fields = {_to_toml(columns or [f'x{i}' for i in range(width)])}  # {told}")
    else:
        lines.append(f'fields = {{ prefix = "x", count = {width} }}  # x0, x1, …')
    if table and not columns:
        lines.append(
            f"# {table.path} has {len(table.columns)} columns of numbers: {_to_toml(list(table.columns)[:20])}"
        )
    if rows > 1:
        lines.append(f"window = {{ rows = {rows}, step = {rows}, max_gap_s = 1.0 }}  # {why}")
    if tensor.limits:
        lines.append(f"# The input holds {tensor.limits[0]:.4g} to {tensor.limits[1]:.4g}; what is beyond is cut off.")
    lines.append("# mean = […] and std = […], one for each field, where the model was trained on (x - mean) / std.")
    return lines


def _image_line(tensor: Tensor) -> str | None:
    """Where the tensor has the shape of one: all 256 values of a pixel over what a quantized one can hold."""
    if len(tensor.shape) != 3 or tensor.shape[2] not in (1, 3) or min(tensor.shape[:2]) < _MIN_IMAGE_SIDE:
        return None
    height, width, channels = tensor.shape
    low, high = tensor.limits or (0.0, 1.0)
    scaled = f"scale = {(high - low) / 255:.10g}, offset = {low:.10g}"
    told = "pixel · scale + offset, as in training"
    return f"image = {{ width = {width}, height = {height}, channels = {channels}, {scaled} }}  # {told}"


def infer_window_shape(dims: Sequence[int]) -> tuple[int, int, str]:
    """(rows, fields, why) of an input of these dimensions without the batch."""
    told = [size for size in dims if size != 1]
    if len(told) <= 1:
        return 1, math.prod(dims), ""
    return told[0], math.prod(told[1:]), f"{' x '.join(map(str, dims))}: rows of {math.prod(told[1:])} values"


def _output_lines(inspection: ModelInspection, kind_guess: _KindGuess) -> list[str]:
    lines = ["[output]"]
    if len(inspection.outputs) > 1:
        others = ", ".join(json.dumps(one.name) for one in inspection.outputs)
        lines.append(f"tensor = {_to_toml(inspection.outputs[0].name)}  # one of {others}")
    if kind_guess.kind == "classify":
        lines.append(f'activation = "{kind_guess.activation}"  # what is still to be done: none, softmax or sigmoid')
    if kind_guess.multi_label:
        lines.append("multi_label = true  # any number of labels is said, each above its threshold (0.5)")
    if kind_guess.kind == "classify":
        lines.append('# calibrate = "heldout.csv"  # with column label, of data the model was not trained on')
    if kind_guess.kind == "regress":
        lines.append('# units = ["W"]')
    if kind_guess.kind in ("anomaly", "embedding"):
        lines.append("quantile = 0.99  # of the reference's values: what is above is an anomaly; or threshold = …")
    return lines


def _format_labels(kind_guess: _KindGuess, table: TableInfo | None) -> str:
    if not kind_guess.label_count:
        return ""
    if table and len(table.labels) == kind_guess.label_count:
        return _to_toml(sorted(table.labels))
    return _to_toml([f"class {i}" for i in range(kind_guess.label_count)])


def _slugify(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:64] or "model"


def _to_toml(value: object) -> str:
    """JSON's strings and lists of them are TOML's."""
    return json.dumps(value, ensure_ascii=False)

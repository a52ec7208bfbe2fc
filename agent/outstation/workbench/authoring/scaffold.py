"""Scaffold of a SPEC, from any `.tflite` file and a table of its data, for the author to complete."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from outstation.foundation import input_files
from outstation.foundation.config.toml_files import encode_value
from outstation.foundation.errors import BadBundle, UsageError, explain
from outstation.foundation.text import printable
from outstation.ml.datasets import training_data
from outstation.ml.datasets.training_data import TableSummary
from outstation.ml.drift.baseline.reference import MIN_WINDOWS, RECOMMENDED_WINDOWS
from outstation.ml.model.bundle.manifest import DriftSettings
from outstation.ml.model.inference.tensors import ModelInspection, Tensor
from outstation.ml.model.sandbox import probe

_TOLERANCE = 0.02
# A longer list of fields is written as a prefix and a count.
_MAX_LISTED_FIELDS = 64
_MIN_IMAGE_SIDE = 16
# A window spans two lost rows.
_GAP_INTERVALS = 3
# Drift windows of models that answer each row: single rows tell little.
_ROW_DRIFT_WINDOW = 250


class Scaffold(msgspec.Struct, frozen=True):
    """Text of a SPEC, the guessed kind of model and the reason for it, and warnings of what does not fit."""

    text: str
    kind: str
    rationale: str
    warnings: list[str]


def scaffold_spec(tflite: Path, out: Path | None, table: Path | None) -> Scaffold:
    """Return a SPEC whose paths are relative to the folder of `out`. Raises UsageError, BadBundle."""
    try:
        content = input_files.read_bytes(tflite)
    except OSError as error:
        raise UsageError(f"{tflite}: cannot be read: {error.strerror}; give the .tflite file") from None
    try:
        model = probe.inspect_model(content)
    except BadBundle as problem:
        raise BadBundle(f"{tflite}: is no TFLite model that runs here: {problem}") from None
    folder = out.resolve().parent if out else Path.cwd()
    summary = None
    if table is not None:
        summary = training_data.summarize_table(table)
        summary = replace(summary, path=os.path.relpath(table.resolve(), folder))
    guess = guess_kind(model)
    text = render_spec(model, os.path.relpath(tflite.resolve(), folder), tflite.stem, summary)
    return Scaffold(
        text, guess.kind, guess.rationale, _list_warnings(model.inputs[_choose_input(model, summary)], summary)
    )


def _choose_input(inspection: ModelInspection, table: TableSummary | None) -> int:
    """Return the input that drives the task: the first with as many fields as the data, else the longest one."""
    if table is None:
        return 0
    shapes = [infer_window_shape(tensor.shape) for tensor in inspection.inputs]
    return max(range(len(shapes)), key=lambda i: (shapes[i][1] == len(table.columns), shapes[i][0], -i))


def _list_warnings(tensor: Tensor, table: TableSummary | None) -> list[str]:
    if table is None or _image_line(tensor) is not None:
        return []
    warnings = [f"{table.path}: {_describe_left_out(table)}"] if table.output_labels else []
    _, width, _ = infer_window_shape(tensor.shape)
    if len(table.columns) != width:
        problem = f"{len(table.columns)} numeric columns, the model's input takes {width}: complete fields"
        return [*warnings, f"{table.path} has {problem}"]
    scaling = propose_scaling(tensor, table)
    return [*warnings, scaling.warning] if scaling and scaling.warning else warnings


def _describe_left_out(table: TableSummary) -> str:
    names = ", ".join(table.output_labels[:8]) + (" …" if len(table.output_labels) > 8 else "")
    return f"left out of the fields as labels of further outputs: {names}; rename what the model reads"


def write_spec(scaffold: Scaffold, out: Path) -> None:
    """Write a new file. Raises UsageError, also if it exists, because a person may have written it."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(scaffold.text)
    except FileExistsError:
        raise UsageError(f"{out}: exists already; name another file with -o") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {explain(error)}") from None


class _KindGuess(msgspec.Struct, frozen=True):
    kind: str
    rationale: str
    activation: str = "none"
    label_count: int = 0
    multi_label: bool = False


def guess_kind(inspection: ModelInspection) -> _KindGuess:
    """Guess from the first output, as long as the SPEC names none."""
    model_input, output, stats = inspection.inputs[0], inspection.outputs[0], inspection.output_stats[0]
    is_unit = stats.low >= -_TOLERANCE and stats.high <= 1 + _TOLERANCE
    # Rounding error of a sum of quantized probabilities.
    rounding = min(0.9, output.quantization_step * output.size / 2)
    if output.size == model_input.size > 1:
        return _KindGuess("anomaly", "it has as many outputs as inputs: an autoencoder, its error is the value")
    if output.size == 1:
        if is_unit and output.limits and output.limits[1] <= 1:
            rationale = "it has one output from 0 to 1: the probability of the second label"
            return _KindGuess("classify", rationale, label_count=2)
        return _KindGuess("regress", "it has one output")
    if is_unit and all(abs(total - 1) < max(2 * _TOLERANCE, rounding) for total in stats.sums):
        rationale = f"its {output.size} outputs sum to 1: softmax is in the model"
        return _KindGuess("classify", rationale, label_count=output.size)
    if all(abs(norm - 1) < _TOLERANCE for norm in stats.norms):
        return _KindGuess("embedding", "its outputs are vectors of length 1")
    if is_unit:
        rationale = f"its {output.size} outputs are from 0 to 1 and do not sum to 1: independent labels"
        return _KindGuess("classify", rationale, label_count=output.size, multi_label=True)
    rationale = f"it has {output.size} outputs of any size: probably logits of as many labels"
    return _KindGuess("classify", rationale, "softmax", output.size)


def render_spec(inspection: ModelInspection, model: str, name: str, table: TableSummary | None = None) -> str:
    """Return the text of a SPEC for the model at path `model`, relative to the SPEC; `table` is data for it."""
    guess, driving = guess_kind(inspection), _choose_input(inspection, table)
    tensor = inspection.inputs[driving]
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:64]
    lines = [
        "# Input of `outstation model pack`; paths are relative to this file. Check every line.",
        *(f"# in:   {each}" for each in inspection.inputs),
        *(f"# out:  {each}" for each in inspection.outputs),
        f'name = "{slug or "model"}"',
        'version = "0.1.0"',
        f'kind = "{guess.kind}"  # {guess.rationale}; else classify, regress, anomaly or embedding',
        f"model = {encode_value(model)}",
    ]
    if guess.label_count:
        known = table is not None and len(table.labels) == guess.label_count
        labels = (
            sorted(table.labels, key=_natural_key)
            if table and known
            else [f"class {i}" for i in range(guess.label_count)]
        )
        lines.append("# In the order of the outputs, as in training; the model file does not say.")
        lines.append(f"labels = {encode_value(labels)}")
    data, prefix = (encode_value(table.path), "") if table else ('"readings.csv"', "# ")
    windows = table.rows // infer_window_shape(tensor.shape)[0] if table else 0
    drift_window = _suggest_drift_window(tensor, windows)
    if table and windows < MIN_WINDOWS * drift_window:
        comment = f"drift detection needs {MIN_WINDOWS * drift_window} windows of readings; these are {windows}"
        lines.append(f"# reference = {data}  # {comment}")
    else:
        comment = "readings of normal operation, for the drift reference and a threshold"
        lines.append(f"{prefix}reference = {data}  # {comment}")
    lines += [
        f"{prefix}golden = {data}  # a few inputs, with which a device verifies that its CPU computes the same",
        '# card = { model = "MODEL_CARD.md", data = "DATA_CARD.md" }',
        "",
        *_input_lines(tensor, table),
        *([f"tensor = {driving}  # {tensor.name}"] if len(inspection.inputs) > 1 else []),
        "",
        *_output_lines(inspection, guess),
        "",
        *_further_lines(inspection, driving),
        "[drift]",
        f"window = {drift_window}  # model windows (rows, of a model that answers each row) that are tested together",
    ]
    return "\n".join(lines) + "\n"


def _natural_key(label: str) -> list[str | int]:
    """Return a key that sorts "2" before "10"."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", label))]


class ScalingProposal(msgspec.Struct, frozen=True):
    """Scaling (x - mean) / std proposed from data; `warning` says that the data do not fit the input without it."""

    mean: list[float]
    std: list[float]
    warning: str


def propose_scaling(tensor: Tensor, table: TableSummary | None) -> ScalingProposal | None:
    """Propose the scaling that the model was probably trained with; None without data of the input's columns.

    A quantized input holds the values of its training. Data far outside were scaled there: to mean 0 and deviation 1 if
    the input can hold that, else from their own range to that of the input.
    """
    _, width, _ = infer_window_shape(tensor.shape)
    if table is None or len(table.columns) != width or _image_line(tensor) is not None:
        return None
    standard = [(scale.mean, scale.std or 1.0) for scale in table.scales]
    if tensor.limits is None or all(_is_inside(scale.usual, tensor.limits) for scale in table.scales):
        return ScalingProposal(*_transpose(standard), warning="")
    low, high = tensor.limits
    outside = [
        f"{name} has {scale.low:.4g} to {scale.high:.4g}"
        for name, scale in zip(table.columns, table.scales, strict=True)
        if not _is_inside(scale.usual, tensor.limits)
    ]
    scaled = [tuple((edge - scale.mean) / (scale.std or 1.0) for edge in scale.usual) for scale in table.scales]
    if not all(_is_inside((first, last), tensor.limits) for first, last in scaled):
        spans = [(scale.high - scale.low) / (high - low) or 1.0 for scale in table.scales]
        standard = [(scale.low - low * span, span) for scale, span in zip(table.scales, spans, strict=True)]
    warning = (
        f"the model's input holds {low:.4g} to {high:.4g} and clips other values, but {'; '.join(outside[:8])}: it was "
        "trained on scaled values. mean and std are proposed from these data; those of the training are better"
    )
    return ScalingProposal(*_transpose(standard), warning=warning)


def _is_inside(span: tuple[float, float], limits: tuple[float, float]) -> bool:
    return limits[0] <= span[0] and span[1] <= limits[1]


def _transpose(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [_round(mean) for mean, _ in pairs], [_round(std) for _, std in pairs]


def _input_lines(tensor: Tensor, table: TableSummary | None) -> list[str]:
    if (image := _image_line(tensor)) is not None:
        return ["[input]", image, "# If the data are rows instead: fields, and window = { rows, step }."]
    rows, width, rationale = infer_window_shape(tensor.shape)
    columns = list(table.columns) if table and len(table.columns) == width else []
    lines = ["[input]"]
    if columns or width <= _MAX_LISTED_FIELDS:
        comment = "the columns of the data, in the model's order" if columns else "use the names of your stream"
        lines.append(f"fields = {encode_value(columns or [f'x{i}' for i in range(width)])}  # {comment}")
    else:
        lines.append(f'fields = {{ prefix = "x", count = {width} }}  # x0, x1, …')
    if table and not columns:
        lines.append(
            f"# {table.path} has {len(table.columns)} numeric columns: {encode_value(list(table.columns)[:20])}"
        )
    if table and table.output_labels:
        lines.append(f"# {printable(_describe_left_out(table))}.")
    if rows > 1:
        gap = _round(_GAP_INTERVALS * table.interval_s) if table and table.interval_s else 1.0
        lines.append(f"window = {{ rows = {rows}, step = {rows}, max_gap_s = {gap} }}  # {rationale}")
        lines.append("# No window spans a longer gap than max_gap_s, so it is longer than the time between two rows.")
    if tensor.limits:
        low, high = tensor.limits
        lines.append(f"# The input can hold {low:.4g} to {high:.4g}; other values are clipped.")
    if (scaling := propose_scaling(tensor, table)) is None:
        lines.append("# mean = […] and std = […], one for each field, if the model was trained on (x - mean) / std.")
        return lines
    if scaling.warning:
        lines.append("# These data do not fit without scaling. Replace mean and std by those of the training if known.")
    else:
        lines.append("# Of these data, if the model was trained on (x - mean) / std; better those of its training:")
    prefix = "" if scaling.warning else "# "
    lines += [f"{prefix}mean = {encode_value(scaling.mean)}", f"{prefix}std = {encode_value(scaling.std)}"]
    return lines


def _further_lines(inspection: ModelInspection, driving: int) -> list[str]:
    """Return a section for each input but the one that drives the task, and a hint at further outputs."""
    lines = []
    joined = [(index, tensor) for index, tensor in enumerate(inspection.inputs) if index != driving]
    for number, (index, tensor) in enumerate(joined, 1):
        rows, width, _ = infer_window_shape(tensor.shape)
        lines += [
            f"[inputs.input-{number}]  # joined to each window by time; rename it",
            f"tensor = {index}  # {tensor.name}",
            f"fields = {encode_value([f'in{number}_{i}' for i in range(width)])}  # use the names of its stream",
            f"rows = {rows}",
            "max_age_s = 3600.0  # older values are missing",
            "",
        ]
    for index, tensor in enumerate(inspection.outputs[1:], 1):
        lines.append(f"# [outputs.output-{index}]  # to report it, too: kind, and names or labels")
        lines.append(f"# tensor = {index}  # {tensor.name}")
    return [*lines, ""] if inspection.outputs[1:] else lines


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _suggest_drift_window(tensor: Tensor, windows: int) -> int:
    """Return a length of which `windows` of data, if there are any, give enough drift windows to learn from."""
    if _image_line(tensor) is not None or infer_window_shape(tensor.shape)[0] > 1:
        return DriftSettings().window
    enough = windows // RECOMMENDED_WINDOWS if windows else _ROW_DRIFT_WINDOW
    return max(DriftSettings().window, min(_ROW_DRIFT_WINDOW, enough))


def _image_line(tensor: Tensor) -> str | None:
    """Return the image line if the tensor has the shape of an image; pixels are scaled to the tensor's range."""
    if len(tensor.shape) != 3 or tensor.shape[2] not in (1, 3) or min(tensor.shape[:2]) < _MIN_IMAGE_SIDE:
        return None
    height, width, channels = tensor.shape
    low, high = tensor.limits or (0.0, 1.0)
    scaled = f"scale = {(high - low) / 255:.10g}, offset = {low:.10g}"
    size = f"width = {width}, height = {height}, channels = {channels}"
    return f"image = {{ {size}, {scaled} }}  # pixel · scale + offset, as in training"


def infer_window_shape(dims: Sequence[int]) -> tuple[int, int, str]:
    """Return (rows, fields, rationale) for an input with these dimensions, without the batch."""
    sizes = [size for size in dims if size != 1]
    if len(sizes) <= 1:
        return 1, math.prod(dims), ""
    width = math.prod(sizes[1:])
    return sizes[0], width, f"{' x '.join(map(str, dims))}: rows of {width} values"


def _output_lines(inspection: ModelInspection, guess: _KindGuess) -> list[str]:
    lines = ["[output]"]
    if len(inspection.outputs) > 1:
        names = ", ".join(json.dumps(tensor.name) for tensor in inspection.outputs)
        lines.append(f"tensor = {encode_value(inspection.outputs[0].name)}  # one of {names}")
    if guess.kind == "classify":
        lines.append(f'activation = "{guess.activation}"  # to apply to the outputs: none, softmax or sigmoid')
    if guess.multi_label:
        lines.append("multi_label = true  # every label above its threshold (0.5) is predicted")
    if guess.kind == "classify":
        lines.append('# held_out = "heldout.csv"  # with column label, data that the model was not trained on')
        lines.append('# calibration_data = "heldout.csv"  # the same, to calibrate the scores')
    if guess.kind == "regress":
        lines.append('# units = ["W"]')
        lines.append(
            '# held_out = "heldout.csv"  # with column label, for bounds of the values and their expected error'
        )
    if guess.kind in ("anomaly", "embedding"):
        lines.append("quantile = 0.99  # of the reference's values; higher values are anomalies; or threshold = …")
    return lines

"""This model beside the float one it was quantized from: on the same windows, so that differences are paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from agent.errors import BadBundle, UsageError
from agent.evaluation import metrics, predictions
from agent.evaluation.bootstrap import BootstrapUnits, percentile_interval, proportion_interval
from agent.evaluation.document import FloatComparison, IntervalEstimate
from agent.evaluation.examples import LabelledWindows, predict
from agent.model.bundle import manifest
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.manifest import Manifest
from agent.model.inference import inference, runtime
from agent.model.inference.inference import Inference, InferenceResult
from agent.model.sandbox import probe
from agent.performance.metrics import LabelledPredictions, round_or_none


def load_float_bundle(file: Path, bundle: Bundle) -> Bundle:
    """`bundle` with the model in `file`, which was proved to run. Raises UsageError, BadBundle."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--float {file}: cannot be read: {error.strerror}") from None
    try:
        meant = _manifest_for_float(bundle, content)
        found = Bundle(meant, "", {"manifest.json": manifest.encode(meant), "model.tflite": content}, "")
        probe.probe(found).raise_for_failure()
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    return found


def compare(
    file: Path,
    float_bundle: Bundle,
    examples: LabelledWindows,
    own: InferenceResult,
    pairs: LabelledPredictions,
    units: BootstrapUnits,
) -> FloatComparison:
    """Of `beside`, the `float_bundle` of `file`. Raises BadBundle."""
    try:
        float_model = Inference(
            float_bundle.manifest, inference.load_model(float_bundle.manifest, float_bundle.model_bytes)
        )
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    theirs = predict(float_model, examples.dataset, examples.starts)
    other = predictions.pair_with_truth(float_bundle.manifest, theirs, examples.truth, examples.label_sets)
    kind = predictions.evaluation_kind(float_bundle.manifest)
    assert own.outputs is not None
    assert theirs.outputs is not None
    off = np.abs(own.outputs.astype(np.float64) - theirs.outputs)
    figures = metrics.primary_metric(kind, other, units)
    return FloatComparison(
        file=file.name,
        bytes=len(float_bundle.model_bytes),
        agreement=_agreement(own, theirs, units),
        largest=round_or_none(float(off.max())) or 0.0,
        mean=round_or_none(float(off.mean())) or 0.0,
        value=proportion_interval(figures, len(examples), units)
        if kind == "classify"
        else percentile_interval(figures),
        change=percentile_interval(metrics.primary_metric(kind, pairs, units) - figures),
    )


def _manifest_for_float(bundle: Bundle, content: bytes) -> Manifest:
    """The manifest for the other model, whose outputs a converter may have named otherwise. Raises BadBundle."""
    wanted = bundle.manifest.output.tensor
    if not isinstance(wanted, str) or wanted in [one.name for one in probe.inspect_model(content).outputs]:
        return bundle.manifest
    own = [one.name for one in runtime.list_tensors(bundle.model_bytes)[1]]
    return replace(bundle.manifest, output=replace(bundle.manifest.output, tensor=own.index(wanted)))


def _agreement(own: InferenceResult, theirs: InferenceResult, units: BootstrapUnits) -> IntervalEstimate | None:
    """How often both say the same, where they name something."""
    for name in ("predicted", "label", "anomaly"):
        a, b = getattr(own.scores, name), getattr(theirs.scores, name)
        if a is not None:
            same = (a == b).reshape(len(a), -1).all(axis=1)
            n = units.weighted_sums(np.ones(len(same)))[:, 0]
            return proportion_interval(units.weighted_sums(same)[:, 0] / n, len(same), units)
    return None

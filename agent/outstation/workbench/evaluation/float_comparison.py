"""Comparison with the float model that a model was quantized from, paired on the same windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from outstation.foundation import input_files
from outstation.foundation.errors import BadBundle
from outstation.ml.model import activation
from outstation.ml.model.bundle import manifest
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.sandbox import probe
from outstation.ml.performance.estimates import round_or_none
from outstation.workbench.evaluation import evaluation_metrics, predictions
from outstation.workbench.evaluation.bootstrap import BootstrapUnits, percentile_interval, proportion_interval
from outstation.workbench.evaluation.context import EvaluationContext
from outstation.workbench.evaluation.document import FloatComparison, IntervalEstimate
from outstation.workbench.evaluation.examples import predict


def load_float_bundle(file: Path, bundle: Bundle) -> Bundle:
    """Return the bundle with the model in `file`. Raises UsageError, BadBundle."""
    content = input_files.read_input(file)
    try:
        changed = _manifest_for_float(bundle, content)
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    return Bundle(changed, "", {"manifest.json": manifest.encode(changed), "model.tflite": content}, "")


def compare(context: EvaluationContext, file: Path, float_bundle: Bundle) -> FloatComparison:
    """Compare results with those of the float model in `file`. Raises BadBundle."""
    float_manifest, windows, own, units = float_bundle.manifest, context.windows, context.result, context.units
    try:
        float_model = activation.open_for_files(float_bundle)
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    other = predict(float_model, windows.dataset, windows.starts)
    other_predictions = predictions.pair_with_truth(float_manifest, other, windows.truth, windows.label_sets)
    kind = predictions.evaluation_kind(float_manifest)
    assert own.outputs is not None
    assert other.outputs is not None
    differences = np.abs(own.outputs.astype(np.float64) - other.outputs)
    metric = evaluation_metrics.primary_metric(kind, other_predictions, units)
    return FloatComparison(
        file=file.name,
        bytes=len(float_bundle.model_bytes),
        agreement=_agreement(own, other, units),
        max_output_difference=round_or_none(float(differences.max())) or 0.0,
        mean_output_difference=round_or_none(float(differences.mean())) or 0.0,
        float_metric=evaluation_metrics.primary_interval(kind, metric, windows.truth, units),
        metric_difference=percentile_interval(
            evaluation_metrics.primary_metric(kind, context.predictions, units) - metric
        ),
    )


def _manifest_for_float(bundle: Bundle, content: bytes) -> Manifest:
    """Return the manifest for the other model, whose outputs a converter may have renamed. Raises BadBundle."""
    wanted = bundle.manifest.output.tensor
    if not isinstance(wanted, str) or wanted in [tensor.name for tensor in probe.inspect_model(content).outputs]:
        return bundle.manifest
    own = [tensor.name for tensor in probe.inspect_model(bundle.model_bytes).outputs]
    # Names of the signature are no names of tensors, and a converter keeps them.
    if wanted not in own:
        return bundle.manifest
    return replace(bundle.manifest, output=replace(bundle.manifest.output, tensor=own.index(wanted)))


def _agreement(own: InferenceResult, other: InferenceResult, units: BootstrapUnits) -> IntervalEstimate | None:
    """Return how often both predict the same labels, if they predict labels."""
    for name in ("predicted", "label", "anomaly"):
        a, b = getattr(own.scores, name), getattr(other.scores, name)
        if a is not None:
            same = (a == b).reshape(len(a), -1).all(axis=1)
            return proportion_interval(units.sums(same)[:, 0] / units.total, len(same), units)
    return None

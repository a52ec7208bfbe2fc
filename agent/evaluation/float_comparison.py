"""This model beside the float one it was quantized from: on the same windows, so that differences are paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from agent.errors import BadBundle, UsageError
from agent.evaluation import metrics, predictions
from agent.evaluation.bootstrap import Units, share, span
from agent.evaluation.document import Against, Span
from agent.evaluation.examples import Examples, answered
from agent.model.bundle import manifest
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.manifest import Manifest
from agent.model.inference import inference, runtime
from agent.model.inference.inference import Answers, Inference
from agent.model.sandbox import probe
from agent.performance.metrics import Pairs, rounded


def float_bundle(file: Path, bundle: Bundle) -> Bundle:
    """`bundle` with the model in `file`, which was proved to run. Raises UsageError, BadBundle."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--float {file}: cannot be read: {error.strerror}") from None
    try:
        meant = _of_same_output(bundle, content)
        found = Bundle(meant, "", {"manifest.json": manifest.encode(meant), "model.tflite": content}, "")
        probe.probe(found).require()
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    return found


def measure(file: Path, beside: Bundle, examples: Examples, own: Answers, pairs: Pairs, units: Units) -> Against:
    """Of `beside`, the `float_bundle` of `file`. Raises BadBundle."""
    try:
        float_model = Inference(beside.manifest, inference.load(beside.manifest, beside.model))
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    theirs = answered(float_model, examples.source, examples.starts)
    other = predictions.pairs(beside.manifest, theirs, examples.truth, examples.sets)
    kind = predictions.kind_of(beside.manifest)
    assert own.outputs is not None
    assert theirs.outputs is not None
    off = np.abs(own.outputs.astype(np.float64) - theirs.outputs)
    figures = metrics.main(kind, other, units)
    return Against(
        file=file.name,
        bytes=len(beside.model),
        agreement=_agreement(own, theirs, units),
        largest=rounded(float(off.max())) or 0.0,
        mean=rounded(float(off.mean())) or 0.0,
        value=share(figures, len(examples), units) if kind == "classify" else span(figures),
        change=span(metrics.main(kind, pairs, units) - figures),
    )


def _of_same_output(bundle: Bundle, content: bytes) -> Manifest:
    """The manifest for the other model, whose outputs a converter may have named otherwise. Raises BadBundle."""
    wanted = bundle.manifest.output.tensor
    if not isinstance(wanted, str) or wanted in [one.name for one in probe.look(content).outputs]:
        return bundle.manifest
    own = [one.name for one in runtime.tensors(bundle.model)[1]]
    return replace(bundle.manifest, output=replace(bundle.manifest.output, tensor=own.index(wanted)))


def _agreement(own: Answers, theirs: Answers, units: Units) -> Span | None:
    """How often both say the same, where they name something."""
    for name in ("said", "label", "anomaly"):
        a, b = getattr(own.scores, name), getattr(theirs.scores, name)
        if a is not None:
            same = (a == b).reshape(len(a), -1).all(axis=1)
            n = units.sums(np.ones(len(same)))[:, 0]
            return share(units.sums(same)[:, 0] / n, len(same), units)
    return None

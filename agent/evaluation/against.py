"""This model beside the float one it was quantized from: on the same windows, so that differences are paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agent.drift.quality import Pairs, rounded
from agent.errors import BadBundle, UsageError
from agent.evaluation import answers, metrics
from agent.evaluation.document import Against, Span
from agent.evaluation.examples import Examples, answered
from agent.evaluation.resampling import Units, share, span
from agent.model import inference, probe
from agent.model.bundle import Bundle
from agent.model.inference import Answers, Inference


def measure(file: Path, bundle: Bundle, examples: Examples, own: Answers, pairs: Pairs, units: Units) -> Against:
    """Raises UsageError, BadBundle."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--float {file}: cannot be read: {error.strerror}") from None
    head = bundle.files["manifest.json"]
    try:
        probe.probe(Bundle(bundle.manifest, "", {"manifest.json": head, "model.tflite": content}, "")).require()
        float_model = Inference(bundle.manifest, inference.load(bundle.manifest, content))
    except BadBundle as problem:
        raise BadBundle(f"--float {file}: {problem}") from None
    theirs = answered(float_model, examples.source, examples.starts)
    other = answers.pairs(bundle.manifest, theirs, examples.truth, examples.sets)
    kind = answers.kind_of(bundle.manifest)
    assert own.outputs is not None
    assert theirs.outputs is not None
    off = np.abs(own.outputs.astype(np.float64) - theirs.outputs)
    figures = metrics.main(kind, other, units)
    return Against(
        file=file.name,
        bytes=len(content),
        agreement=_agreement(own, theirs, units),
        largest=rounded(float(off.max())) or 0.0,
        mean=rounded(float(off.mean())) or 0.0,
        value=share(figures, len(examples), units) if kind == "classify" else span(figures),
        change=span(metrics.main(kind, pairs, units) - figures),
    )


def _agreement(own: Answers, theirs: Answers, units: Units) -> Span | None:
    """How often both say the same, where they name something."""
    for name in ("said", "label", "anomaly"):
        a, b = getattr(own.scores, name), getattr(theirs.scores, name)
        if a is not None:
            same = (a == b).reshape(len(a), -1).all(axis=1)
            n = units.sums(np.ones(len(same)))[:, 0]
            return share(units.sums(same)[:, 0] / n, len(same), units)
    return None

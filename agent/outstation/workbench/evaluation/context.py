"""Context of an evaluation: its request, the bundle, the labelled windows and the predictions for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from outstation.foundation import clock
from outstation.foundation.indices import bincount
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.performance.metrics import LabelledPredictions
from outstation.workbench.evaluation import document, examples, predictions
from outstation.workbench.evaluation.adversarial.attack import MAX_INVOCATIONS
from outstation.workbench.evaluation.bootstrap import BootstrapUnits
from outstation.workbench.evaluation.examples import Dataset, LabelledWindows

# 2000-01-01: before it, t only counts.
_EARLIEST_US = 946_684_800_000_000


class EvaluationRequest(msgspec.Struct, frozen=True):
    """Request to evaluate; columns by name. `min_count`: least windows behind a number; 0 shows all.

    `output` names the further output that the bundle is reduced to; "" for the main one.
    """

    data: Path
    label: str = "label"
    output: str = ""
    group: str | None = None
    split: str | None = None
    slices: tuple[str, ...] = ()
    train: Path | None = None
    float_model: Path | None = None
    ablate: bool = False
    robustness: bool = False
    adversarial: bool = False
    max_invocations: int = MAX_INVOCATIONS
    latency: bool = True
    seed: int = 0
    min_count: int = 0
    joined: Mapping[str, Path] = examples.NO_FILES

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(c for c in (self.label, self.group, self.split, *self.slices) if c))


class EvaluationContext(msgspec.Struct, frozen=True, eq=False):
    bundle: Bundle
    inference: Inference
    request: EvaluationRequest
    dataset: Dataset
    windows: LabelledWindows
    result: InferenceResult
    predictions: LabelledPredictions
    units: BootstrapUnits
    on_step: Callable[[str], None]

    @property
    def kind(self) -> str:
        return predictions.evaluation_kind(self.bundle.manifest)


def count_classes(labels: list[str], windows: LabelledWindows, kind: str) -> dict[str, int]:
    if kind == "regress":
        return {}
    if windows.label_sets is not None:
        counts = windows.label_sets[windows.truth.astype(np.int64)].sum(axis=0)
        return dict(zip(labels, counts.tolist(), strict=True))
    names = labels if kind == "classify" else ["normal", "anomaly"]
    counts = bincount(windows.truth.astype(np.int64), minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def describe_model(bundle: Bundle, signature: str, output: str = "") -> document.EvaluatedModel:
    manifest = bundle.manifest
    window = manifest.input.window
    return document.EvaluatedModel(
        name=manifest.name,
        output=output,
        version=manifest.version,
        digest=bundle.digest,
        kind=manifest.kind,
        runtime=runtime_name(),
        signature=signature,
        fields=manifest.input.fields,
        units=manifest.input.units,
        inputs={name: document.name_fields(spec.fields, spec.units) for name, spec in manifest.joined.items()},
        labels=manifest.output.labels,
        outputs={name: spec.kind for name, spec in manifest.further.items()},
        window=(window.rows, window.step) if window else None,
        threshold=manifest.output.threshold,
        temperature=manifest.output.temperature,
        bytes=len(bundle.model_bytes),
        sha256=manifest.files["model.tflite"],
    )


def describe_data(context: EvaluationContext, counts: dict[str, int]) -> document.EvaluationData:
    dataset, windows, request = context.dataset, context.windows, context.request
    sizes = bincount(dataset.file_index, minlength=len(dataset.files))
    files = [document.SourceFile(file=f.name, rows=int(n)) for f, n in zip(dataset.files, sizes, strict=True)]
    splits, split_counts = np.unique(windows.columns[request.split] if request.split else [], return_counts=True)
    t = dataset.t[windows.last]
    has_dates = dataset.has_time and int(t.min()) >= _EARLIEST_US
    return document.EvaluationData(
        files=files,
        rows=len(dataset.values),
        rejected=dataset.rejected_count,
        windows=len(windows),
        unlabelled=windows.unlabelled,
        mixed=windows.mixed,
        label=request.label,
        counts=counts,
        group=request.group,
        groups=context.units.group_count,
        split=request.split,
        splits={str(name): int(n) for name, n in zip(splits, split_counts, strict=True)},
        begin=clock.to_rfc3339(int(t.min())) if has_dates else None,
        end=clock.to_rfc3339(int(t.max())) if has_dates else None,
    )

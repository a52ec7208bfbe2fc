"""Check of a SPEC's labelled data for poisoning: those that a bundle is calibrated with, and those of its training."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from outstation.foundation.errors import ConfigError, UsageError
from outstation.ml.datasets import training_data
from outstation.ml.datasets.training_data import LabelParser
from outstation.ml.model.bundle.manifest import Manifest
from outstation.ml.poisoning import findings
from outstation.ml.poisoning.inspect import PoisoningReport, inspect, not_checked
from outstation.ml.poisoning.labelled_windows import LabelledWindows
from outstation.workbench.authoring.calibration import PackJob

_CLASS_KINDS = ("classify", "anomaly")


class CheckedData(msgspec.Struct, frozen=True):
    """Report about a file; its rows are numbered from 1."""

    file: str
    report: PoisoningReport


def check(job: PackJob, train: Path | None) -> list[CheckedData]:
    """Inspect each labelled file once, training data first. Raises UsageError, ConfigError."""
    if train is not None and not _has_one_class(job.draft):
        raise UsageError("--train is for models that give one class; the checks do not know this model's labels")
    checked = [] if train is None else [CheckedData(train.name, _inspect_file(job, train))]
    output = job.spec.output
    keys = {
        "output.held_out": output.held_out,
        "output.calibration_data": output.calibration_data,
        "reference": job.spec.reference,
    }
    seen = {train.resolve()} if train is not None else set()
    for key, name in keys.items():
        if name is None or (path := job.path(name)).resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            if training_data.has_labels(path, job.draft.input):
                checked.append(CheckedData(name, _inspect_file(job, path)))
        except UsageError as problem:
            if key != "reference":
                raise ConfigError(str(job.file), key, str(problem)) from None
            # Column `label` of a reference may hold something else.
            checked.append(CheckedData(name, not_checked(0, 0, str(problem).removeprefix(f"{path}: "))))
    return checked


def _has_one_class(draft: Manifest) -> bool:
    return draft.label_kind in _CLASS_KINDS and not draft.output.multi_label


def _inspect_file(job: PackJob, path: Path) -> PoisoningReport:
    draft = job.draft
    if not _has_one_class(draft):
        return not_checked(0, 0, "the checks take models that give one class, and this one does not")
    data = training_data.read(path, draft.input, LabelParser.from_manifest(draft))
    if data.label is None:
        raise training_data.missing_labels(path, draft.input, "a check of training data")
    last = training_data.find_window_starts(path, data, draft.input) + draft.input.rows - 1
    labels = draft.output.labels or ["normal", "anomaly"]
    known = (data.label[last] >= 0) & (data.label[last] < len(labels))
    last = last[known]
    return inspect(
        LabelledWindows(
            rows=data.features,
            last=last,
            window_rows=draft.input.rows,
            fields=draft.input.fields,
            label=data.label[last].astype(np.int64),
            labels=labels,
            names=(last + 1).tolist(),
            providers={name: values[last] for name, values in data.providers.items()},
        )
    )


def card_section(training: list[CheckedData], draft: Manifest) -> str:
    """Return the findings as a section of the data card, without rows and small counts; "" without findings."""
    least = draft.drift.min_count
    least = findings.MIN_COUNT if least is msgspec.UNSET else max(least, findings.MIN_COUNT)
    lines = [
        f"- {each.file}: {line}"
        for each in training
        if each.report.findings
        for line in each.report.without_small(least).describe(max_rows=0)
    ]
    if not lines:
        return ""
    text = "\n".join(lines).replace("<", "&lt;").replace(">", "&gt;")
    return f"\n## Poisoning checks\n\n{text}\n"

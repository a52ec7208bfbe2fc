"""`model evaluate`: everything that is asked of a model, in one document."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from agent import __version__, clock
from agent.errors import UsageError
from agent.evaluation import (
    bench,
    bootstrap,
    document,
    examples,
    float_comparison,
    giveaway,
    label_quality,
    latency,
    leakage,
    metrics,
    robustness,
    sensitivity,
    several,
    slicing,
)
from agent.evaluation import predictions as answers
from agent.evaluation.bootstrap import Units
from agent.evaluation.document import Evaluation
from agent.evaluation.examples import Examples, Rows
from agent.evaluation.predictions import Judge
from agent.model.bundle.bundle import Bundle
from agent.model.inference import runtime, tuning
from agent.model.inference.features import Ints
from agent.model.inference.inference import Answers, Inference
from agent.performance import slices
from agent.performance.metrics import Pairs
from agent.text import figure, metric_name

_EARLIEST_US = 946_684_800_000_000  # 2000-01-01: before it, t only counts
_MOST_CONFUSED = 1000  # classes of which the confusion is told
_LATENCY_ROWS = 20_000


class Request(msgspec.Struct, frozen=True):
    """What is asked; columns by name."""

    data: Path
    label: str = "label"
    group: str | None = None
    split: str | None = None
    slices: tuple[str, ...] = ()
    train: Path | None = None
    float_model: Path | None = None
    ablate: bool = False
    robustness: bool = False
    latency: bool = True
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """What is read beside the fields."""
        return list(dict.fromkeys(c for c in (self.label, self.group, self.split, *self.slices) if c))


class _Work(msgspec.Struct, frozen=True, eq=False):
    bundle: Bundle
    inference: Inference
    request: Request
    source: Rows
    examples: Examples
    answers: Answers
    pairs: Pairs
    units: Units


def evaluate(
    bundle: Bundle,
    inference: Inference,
    signature: str,
    request: Request,
    step: Callable[[str], None],
    answered: Callable[[Inference, Rows, Ints], Answers] = examples.answered,
) -> Evaluation:
    """`step` is told what is done next; `answered` runs the model over the data. Raises UsageError, BadBundle."""
    begun = time.monotonic()
    step("reading the data")
    source = examples.read(request.data, inference, request.columns)
    found = examples.labelled(source, inference, request.label, request.columns, request.split)
    step(f"answering {len(found):,} windows")
    told = answered(inference, source, found.starts)
    pairs = answers.pairs(bundle.manifest, told, found.truth, found.sets)
    _require_finite(pairs, request)
    units = _units(bundle, pairs, found, request)
    work = _Work(bundle, inference, request, source, found, told, pairs, units)
    return _document(work, signature, step, begun)


def _require_finite(pairs: Pairs, request: Request) -> None:
    if pairs.value is not None and not np.isfinite(pairs.value).all():
        n = int((~np.isfinite(pairs.value)).sum())
        raise UsageError(f"{request.data}: the model answers {n} windows with no finite number; look at its inputs")


def _units(bundle: Bundle, pairs: Pairs, found: Examples, request: Request) -> Units:
    off = pairs.off(answers.kind_of(bundle.manifest))
    if off is None:
        assert pairs.value is not None
        off = pairs.value
    group = found.columns[request.group] if request.group else None
    return bootstrap.units(off, group, request.group, request.seed)


def _document(work: _Work, signature: str, step: Callable[[str], None], begun: float) -> Evaluation:
    manifest, request, found = work.bundle.manifest, work.request, work.examples
    kind, labels = answers.kind_of(manifest), manifest.output.labels
    measured = (
        several.measure(labels, work.answers, found, work.pairs, work.units)
        if found.sets is not None
        else metrics.measure(kind, labels, work.pairs, work.units)
    )
    sliced = {name: found.columns[name] for name in request.slices}
    table = bench.make(Judge(work.inference), found, work.units)
    step("looking for leaks")
    leaks = _leaks(work, table)
    suspicions, suspects = label_quality.noise(labels, work.pairs, found)
    drops: list[document.Drop] = []
    faults: list[document.Fault] = []
    if request.ablate:
        step("replacing fields")
        drops = sensitivity.measure(table, request.seed)
    if request.robustness:
        step("making faults")
        faults = robustness.measure(table, request.seed)
    paces: list[document.Pace] = []
    if request.latency:
        step("measuring how long answers take")
        paces = _paces(work, work.bundle)
    other = _beside(work, request.float_model, step) if request.float_model is not None else None
    counts = _counts(labels, found, kind)
    accuracy = next((m.value for m in measured.metrics if m.metric == "accuracy"), None)
    result = Evaluation(
        made=clock.rfc3339(time.time_ns() // 1000),
        agent=__version__,
        seconds=0.0,
        model=_model(work.bundle, signature),
        data=_data(work, counts),
        intervals=work.units.told,
        metric=metrics.MAIN[kind],
        better="down" if kind == "regress" else "up",
        metrics=measured.metrics,
        classes=measured.classes,
        confusion=measured.confusion if len(labels) <= _MOST_CONFUSED else [],
        reliability=measured.reliability,
        slices=slicing.measure(kind, work.pairs, sliced, work.units),
        ablation=drops,
        robustness=faults,
        leakage=leaks,
        hints=[*label_quality.imbalance(counts, accuracy), *suspicions],
        suspects=suspects,
        against=other,
        machine=tuning.machine() if paces else "",
        latency=paces,
    )
    return _finished(result, _notes(work, table, result), begun)


def _beside(work: _Work, file: Path, step: Callable[[str], None]) -> document.Against:
    step("answering with the float model")
    bundle = float_comparison.float_bundle(file, work.bundle)
    found = float_comparison.measure(file, bundle, work.examples, work.answers, work.pairs, work.units)
    if not work.request.latency:
        return found
    step("measuring how long the float model takes")
    return msgspec.structs.replace(found, latency=_paces(work, bundle))


def _paces(work: _Work, bundle: Bundle) -> list[document.Pace]:
    some = min(len(work.source.rows), _LATENCY_ROWS)
    return latency.measure(bundle, work.source.rows[:some], work.source.t[:some])


def _leaks(work: _Work, table: bench.Bench) -> list[document.Finding]:
    request, found = work.request, work.examples
    train = None
    if request.train is not None:
        train = _training_rows(request.train, work.inference, request.group)
    seen = leakage.learned(work.source, request.split, train)
    checked = leakage.measure(found, work.inference.rows, request.group, seen)
    return checked if found.sets is not None else [*checked, giveaway.measure(table)]


def _training_rows(path: Path, inference: Inference, group: str | None) -> Rows:
    """With the groups, where the training data name them."""
    try:
        return examples.read(path, inference, [group] if group else [])
    except UsageError:
        if group is None:
            raise
        return examples.read(path, inference, [])


def _finished(result: Evaluation, notes: list[str], begun: float) -> Evaluation:
    """With what a reader must not miss."""
    warnings = [one.summary for one in (*result.leakage, *result.hints) if one.state == "warning"]
    warnings += [
        f"{one.slice}: {metric_name(one.metric)} {figure(one.value)} of {one.n} windows is worse than the rest, beyond "
        "chance over all slices (Holm)."
        for one in result.slices
        if one.state == slices.WORSE
    ]
    seconds = round(time.monotonic() - begun, 2)
    return msgspec.structs.replace(result, warnings=warnings, notes=notes, seconds=seconds)


def _notes(work: _Work, table: bench.Bench, result: Evaluation) -> list[str]:
    """What was left out, and what small numbers do not allow to say."""
    found, notes = work.examples, []
    if work.source.rejected:
        notes.append(f"{work.source.rejected} rows could not be read and were left out.")
    if found.unlabelled:
        notes.append(f"{found.unlabelled} windows have no label and were left out.")
    if found.mixed:
        notes.append(f"{found.mixed} windows hold rows of two labels; that of the last row counts.")
    missing = float(work.answers.missing.mean())
    if missing > 0:
        notes.append(f"{missing:.1%} of the values are missing.")
    small = [one.slice for one in result.slices if one.state == slices.SMALL]
    if small:
        notes.append(f"Too small to tell: {', '.join(small[:8])}{' and more' if len(small) > 8 else ''}.")
    if work.request.slices and not result.slices:
        notes.append("Slices need answers that are right or wrong: the bundle has no threshold ([output] threshold).")
    if (work.request.ablate or work.request.robustness) and len(table.examples) < len(found):
        notes.append(f"Ablation and robustness look at {len(table.examples)} windows, evenly from all.")
    return notes


def _counts(labels: list[str], found: Examples, kind: str) -> dict[str, int]:
    """Windows of each class that the model knows."""
    if kind == "regress":
        return {}
    if found.sets is not None:
        sums = found.sets[found.truth.astype(np.int64)].sum(axis=0)
        return {label: int(n) for label, n in zip(labels, sums, strict=True)}
    names = labels if kind == "classify" else ["normal", "anomaly"]
    counts = np.bincount(found.truth.astype(np.int64), minlength=len(names))
    return {name: int(n) for name, n in zip(names, counts, strict=True)}


def _model(bundle: Bundle, signature: str) -> document.Model:
    manifest = bundle.manifest
    window = manifest.input.window
    return document.Model(
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest,
        kind=manifest.kind,
        runtime=runtime.NAME,
        signature=signature,
        fields=manifest.input.fields,
        units=manifest.input.units,
        labels=manifest.output.labels,
        window=(window.rows, window.step) if window else None,
        threshold=manifest.output.threshold,
        temperature=manifest.output.temperature,
        bytes=len(bundle.model),
        sha256=manifest.files["model.tflite"],
    )


def _data(work: _Work, counts: dict[str, int]) -> document.Data:
    source, found, request = work.source, work.examples, work.request
    sizes = np.bincount(source.part, minlength=len(source.files))
    files = [document.Source(file=f.name, rows=int(n)) for f, n in zip(source.files, sizes, strict=True)]
    names, counted = np.unique(found.columns[request.split] if request.split else [], return_counts=True)
    t = source.t[found.last]
    dated = source.timed and int(t.min()) >= _EARLIEST_US
    return document.Data(
        files=files,
        rows=len(source.rows),
        rejected=source.rejected,
        windows=len(found),
        unlabelled=found.unlabelled,
        mixed=found.mixed,
        label=request.label,
        counts=counts,
        group=request.group,
        groups=work.units.groups,
        split=request.split,
        splits={str(name): int(n) for name, n in zip(names, counted, strict=True)},
        begin=clock.rfc3339(int(t.min())) if dated else None,
        end=clock.rfc3339(int(t.max())) if dated else None,
    )

"""What an evaluation found, as one document: `model evaluate --json`, and what reports and cards are written from.

Every `low` and `high` is the end of a 95 % interval, None where there is none.
"""

from __future__ import annotations

import msgspec

from agent.performance.metrics import MetricEstimate


class IntervalEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with its interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


class EvaluatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle; `window` is (rows, step), `bytes` and `sha256` of the model in it."""

    name: str
    version: str
    digest: str
    kind: str
    runtime: str
    signature: str
    fields: list[str]
    units: list[str]
    labels: list[str]
    window: tuple[int, int] | None
    threshold: float | None
    temperature: float
    bytes: int
    sha256: str


class SourceFile(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    rows: int


class EvaluationData(msgspec.Struct, frozen=True, kw_only=True):
    """`windows` with a label; `counts` of them by class; `group`, `split`: the columns named, with their values."""

    files: list[SourceFile]
    rows: int
    rejected: int
    windows: int
    unlabelled: int
    mixed: int
    label: str
    counts: dict[str, int]
    group: str | None = None
    groups: int | None = None
    split: str | None = None
    splits: dict[str, int] = {}
    begin: str | None = None
    end: str | None = None


class ClassMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """`n` windows of it, `named` so many times."""

    label: str
    n: int
    named: int
    precision: IntervalEstimate
    recall: IntervalEstimate
    f1: IntervalEstimate


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True):
    """Of n answers with scores about `score`, the share that was right."""

    n: int
    score: float
    right: IntervalEstimate


class FieldImportance(msgspec.Struct, frozen=True, kw_only=True):
    """How much worse the answers are where `fields` are those of other windows; `share` of the metric."""

    fields: list[str]
    drop: IntervalEstimate


class RobustnessPoint(msgspec.Struct, frozen=True, kw_only=True):
    strength: str
    value: IntervalEstimate


class RobustnessCurve(msgspec.Struct, frozen=True, kw_only=True):
    """The metric under a fault of growing strength."""

    fault: str
    meaning: str
    points: list[RobustnessPoint]


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: ok, warning, or not checked."""

    check: str
    state: str
    summary: str


class SuspectLabel(msgspec.Struct, frozen=True, kw_only=True):
    """A label that the model contradicts with certainty."""

    row: int
    file: str
    label: str
    said: str
    score: float


class FloatComparison(msgspec.Struct, frozen=True, kw_only=True):
    """This model beside the float one: `agreement` of labels, differences of outputs, `change` of the metric.

    `latency` is the float model's.
    """

    file: str
    bytes: int
    agreement: IntervalEstimate | None
    largest: float
    mean: float
    value: IntervalEstimate
    change: IntervalEstimate
    latency: list[BatchLatency] = []


class BatchLatency(msgspec.Struct, frozen=True, kw_only=True):
    """`batch` rows or windows at once: milliseconds a batch, results a second, peak memory of the process."""

    batch: int
    p50_ms: float
    p95_ms: float
    per_second: float
    memory_mib: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """`metric` is what ablation, robustness and comparisons look at; `better` is up or down.

    `machine` is what `latency` was measured on.
    """

    v: int = 1
    made: str
    agent: str
    seconds: float
    model: EvaluatedModel
    data: EvaluationData
    intervals: str
    metric: str
    better: str
    metrics: list[MetricEstimate]
    classes: list[ClassMetrics] = []
    confusion: list[list[int]] = []
    reliability: list[ReliabilityBin] = []
    slices: list[MetricEstimate] = []
    ablation: list[FieldImportance] = []
    robustness: list[RobustnessCurve] = []
    leakage: list[CheckResult] = []
    hints: list[CheckResult] = []
    suspects: list[SuspectLabel] = []
    against: FloatComparison | None = None
    machine: str = ""
    latency: list[BatchLatency] = []
    warnings: list[str] = []
    notes: list[str] = []

"""Document of an evaluation: `model evaluate --json`, which reports and cards are rendered from.

Every `low` and `high` is an end of a 95 % interval, None if there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import msgspec

from outstation.ml.comparison.rules import RuleResult
from outstation.ml.performance.estimates import MetricEstimate
from outstation.workbench.evaluation.adversarial.results import AdversarialResult


class IntervalEstimate(msgspec.Struct, frozen=True, kw_only=True):
    value: float | None
    low: float | None = None
    high: float | None = None


def name_fields(fields: Sequence[str], units: Sequence[str]) -> list[str]:
    """Return each field, with its unit in brackets; fewer `units` than fields: the rest have none."""
    return [f"{name} ({unit})" if unit else name for name, unit in itertools.zip_longest(fields, units)]


class EvaluatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """Bundle; `window` is (rows, step), `bytes` and `sha256` are of the model in it. `output`: a further one.

    `inputs`: fields of each joined input, with their units in brackets. `outputs`: kind of each further output.
    """

    name: str
    output: str = ""
    version: str
    digest: str
    kind: str
    runtime: str
    signature: str
    fields: list[str]
    units: list[str]
    inputs: dict[str, list[str]] = {}
    labels: list[str]
    outputs: dict[str, str] = {}
    window: tuple[int, int] | None
    threshold: float | None
    temperature: float
    bytes: int
    sha256: str

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}" + (f", output {self.output}" if self.output else "")


class SourceFile(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    rows: int


class EvaluationData(msgspec.Struct, frozen=True, kw_only=True):
    """`windows` have a label, `counts` of them each class; `group` and `split` name columns, with their values."""

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
    """`n` windows are of the class, `predicted` are predicted as it."""

    label: str
    n: int
    predicted: int
    precision: IntervalEstimate
    recall: IntervalEstimate
    f1: IntervalEstimate


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy of n answers whose mean score is `score`."""

    n: int
    score: float
    accuracy: IntervalEstimate


class FieldImportance(msgspec.Struct, frozen=True, kw_only=True):
    """Permutation importance: how much worse the primary metric is with `fields` of other windows."""

    fields: list[str]
    metric_drop: IntervalEstimate


class RobustnessPoint(msgspec.Struct, frozen=True, kw_only=True):
    strength: str
    value: IntervalEstimate


class RobustnessCurve(msgspec.Struct, frozen=True, kw_only=True):
    fault: str
    meaning: str
    points: list[RobustnessPoint]


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: ok, warning, or not checked."""

    check: str
    state: str
    summary: str


def passed(check: str, summary: str) -> CheckResult:
    return CheckResult(check=check, state="ok", summary=summary)


def warning(check: str, summary: str) -> CheckResult:
    return CheckResult(check=check, state="warning", summary=summary)


def not_checked(check: str, reason: str) -> CheckResult:
    return CheckResult(check=check, state="not checked", summary=reason)


class SuspectLabel(msgspec.Struct, frozen=True, kw_only=True):
    row: int
    file: str
    label: str
    predicted: str
    score: float


class FloatComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Comparison with the float model that this one was quantized from.

    `agreement` of labels, differences of outputs, the float model's primary metric, this model's less that (paired),
    and the float model's `latency`.
    """

    file: str
    bytes: int
    agreement: IntervalEstimate | None
    max_output_difference: float
    mean_output_difference: float
    float_metric: IntervalEstimate
    metric_difference: IntervalEstimate
    latency: list[BatchLatency] = []


class BatchLatency(msgspec.Struct, frozen=True, kw_only=True):
    """`batch` rows or windows at once: milliseconds a batch, results a second, peak memory of the process."""

    batch: int
    p50_ms: float
    p95_ms: float
    per_second: float
    memory_mib: float


class BundleComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Comparison with another bundle, paired on `windows` in `blocks`, by the rules of a roll-out."""

    name: str
    version: str
    digest: str
    windows: int
    blocks: int
    rules: list[RuleResult]


class RequirementResult(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a requirement for one quantity, or of one rule of a comparison."""

    requirement: str
    subject: str
    state: Literal["passed", "failed", "undecided"]
    summary: str


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """`metric` is the primary one, better in its `direction`; `machine` is where `latency` was measured."""

    v: int = 1
    evaluated_at: str
    agent: str
    seconds: float
    model: EvaluatedModel
    data: EvaluationData
    intervals: str
    metric: str
    direction: str
    metrics: list[MetricEstimate]
    classes: list[ClassMetrics] = []
    confusion: list[list[int]] = []
    reliability: list[ReliabilityBin] = []
    slices: list[MetricEstimate] = []
    field_importance: list[FieldImportance] = []
    robustness: list[RobustnessCurve] = []
    adversarial: AdversarialResult | None = None
    leakage: list[CheckResult] = []
    label_checks: list[CheckResult] = []
    suspects: list[SuspectLabel] = []
    float_comparison: FloatComparison | None = None
    machine: str = ""
    latency: list[BatchLatency] = []
    against: BundleComparison | None = None
    requirements: list[RequirementResult] = []
    warnings: list[str] = []
    notes: list[str] = []

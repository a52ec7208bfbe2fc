"""What an evaluation found, as one document: `model evaluate --json`, and what reports and cards are written from.

Every `low` and `high` is the end of a 95 % interval, None where there is none.
"""

from __future__ import annotations

import msgspec

from agent.performance.metrics import Metric


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with its interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
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


class Source(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    rows: int


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """`windows` with a label; `counts` of them by class; `group`, `split`: the columns named, with their values."""

    files: list[Source]
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


class Class(msgspec.Struct, frozen=True, kw_only=True):
    """`n` windows of it, `named` so many times."""

    label: str
    n: int
    named: int
    precision: Span
    recall: Span
    f1: Span


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """Of n answers with scores about `score`, the share that was right."""

    n: int
    score: float
    right: Span


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """How much worse the answers are where `fields` are those of other windows; `share` of the metric."""

    fields: list[str]
    drop: Span


class Point(msgspec.Struct, frozen=True, kw_only=True):
    strength: str
    value: Span


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """The metric under a fault of growing strength."""

    fault: str
    meaning: str
    points: list[Point]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: ok, warning, or not checked."""

    check: str
    state: str
    summary: str


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A label that the model contradicts with certainty."""

    row: int
    file: str
    label: str
    said: str
    score: float


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """This model beside the float one: `agreement` of labels, differences of outputs, `change` of the metric.

    `latency` is the float model's.
    """

    file: str
    bytes: int
    agreement: Span | None
    largest: float
    mean: float
    value: Span
    change: Span
    latency: list[Pace] = []


class Pace(msgspec.Struct, frozen=True, kw_only=True):
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
    model: Model
    data: Data
    intervals: str
    metric: str
    better: str
    metrics: list[Metric]
    classes: list[Class] = []
    confusion: list[list[int]] = []
    reliability: list[Bin] = []
    slices: list[Metric] = []
    ablation: list[Drop] = []
    robustness: list[Fault] = []
    leakage: list[Finding] = []
    hints: list[Finding] = []
    suspects: list[Suspect] = []
    against: Against | None = None
    machine: str = ""
    latency: list[Pace] = []
    warnings: list[str] = []
    notes: list[str] = []

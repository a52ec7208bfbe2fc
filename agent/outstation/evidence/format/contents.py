"""Records of an evidence folder: one struct per JSON document or line, and the folder's limits. Times are RFC 3339."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from outstation.protocol.wire.jws import MAX_PAYLOAD
from outstation.protocol.wire.messages import Metric, Natural, Positive, ShortText

LongText = Annotated[str, msgspec.Meta(max_length=4000)]
Payload = Annotated[str, msgspec.Meta(max_length=MAX_PAYLOAD)]
JwsToken = Annotated[str, msgspec.Meta(max_length=2048)]


class MessageRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """Reference to a signed message in messages/."""

    device: ShortText
    log: ShortText
    seq: Positive


class SignedMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Line of messages/*.jsonl: a message with the exact bytes that its device signed; by device, log and seq."""

    topic: Annotated[str, msgspec.Meta(max_length=400)]
    payload: Payload
    jws: JwsToken


class AuditVerdict(msgspec.Struct, frozen=True):
    """The verdict of audit.json, and the counts that it follows from."""

    passed: bool
    invalid_count: Natural
    undeclared_gaps: Natural
    duplicates: Natural
    invalid_decisions_count: Natural


# Files of witnesses: heads that devices signed, and time stamps.
WITNESS_FOLDER = "witnesses/"
HEAD_PREFIX, STAMP_PREFIX = f"{WITNESS_FOLDER}head-", f"{WITNESS_FOLDER}stamp-"
# Names in the manifest's `omitted`.
OMITTED_LINKS, OMITTED_DECLARATIONS = "links of hash chains", "declarations of missing messages"


class ChainRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Line of chains/*.jsonl: consecutive messages of a log, without their content; by device, log and seq.

    `prev` is the digest before message `first`. With kind and body hash of each message follow its digest and the next
    `prev` (see `outstation.protocol.wire.log_chain`).
    """

    device: ShortText
    log: ShortText
    first: Positive
    prev: ShortText
    kinds: Annotated[list[ShortText], msgspec.Meta(min_length=1, max_length=1000)]
    body_hashes: Annotated[list[ShortText], msgspec.Meta(min_length=1, max_length=1000)]

    def __post_init__(self) -> None:
        if len(self.kinds) != len(self.body_hashes):
            raise ValueError(f"{len(self.kinds)} kinds, but {len(self.body_hashes)} body_hashes")


class IncidentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Alert from the message that raised it to the message that cleared it. `device` is "" for a fleet-wide alert.

    `state` is "unknown" if the device's log ended while the alert was open. A device signs `raised` and `cleared`; the
    collector signs nothing. `clock` is the worse clock state of the two messages.
    """

    device: ShortText
    task: ShortText | None
    alert: ShortText
    subject: ShortText
    severity: Literal["info", "warning", "critical"]
    summary: LongText
    state: Literal["open", "closed", "unknown"]
    started: ShortText
    ended: ShortText | None
    seconds: float | None
    clock: Literal["synced", "restored", "unsynced"]
    source: Literal["device", "collector"]
    raised: MessageRef | None = None
    cleared: MessageRef | None = None


RETENTION_FILE = "retention.jsonl"


class RetentionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Line of retention.jsonl: the newest statement of what `fleet db prune` removed of a device, as it was signed."""

    payload: str
    jws: LongText


class DecisionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Line of decisions.jsonl: one change and the actor who decided it.

    `phase` is a device's phase in a roll-out. A device's decision refers to its signed `message`; an operator's
    decision carries `payload` and `jws`.
    """

    time: ShortText
    event: ShortText
    decided_by: LongText
    summary: LongText
    device: ShortText = ""
    task: ShortText = ""
    rollout: ShortText = ""
    phase: ShortText = ""
    message: MessageRef | None = None
    payload: Payload | None = None
    jws: JwsToken | None = None


class ModelRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    name: ShortText
    version: ShortText
    digest: ShortText

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class BundleUsage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Activations of a bundle over the fleet's history. `running_tasks` is the number of tasks that run it now."""

    model: ModelRef
    first: ShortText
    last: ShortText
    activations: Natural
    devices: Natural
    running_tasks: Natural = 0


class RunningTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bundle that a device's task runs, from its newest `health` message and the `activated` message before it."""

    device: ShortText
    task: ShortText
    model: ModelRef | None
    agent: ShortText
    reported_at: ShortText
    since: ShortText | None
    decided_by: LongText
    health: MessageRef
    activated: MessageRef | None
    rollout: dict[str, Any] | None = None


class AccuracyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Metrics of labelled results: a device's newest `message`, or the collector's metrics of labels sent to it.

    `output` names a further output of the model; it is empty for the first one.
    `labels` counts labels by source. `label_coverage` holds their delay and the share of results they cover. `low` and
    `high` of a metric bound its 95 % interval.
    """

    device: ShortText
    task: ShortText
    time: ShortText
    source: Literal["device", "collector"]
    model: ModelRef | None
    labels: dict[str, int]
    metrics: list[Metric]
    label_coverage: dict[str, Any] = {}
    estimate: dict[str, Any] | None = None
    message: MessageRef | None = None
    output: ShortText = ""


class ComparisonMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Statistic with its 95 % interval over `n` windows; null if there are too few messages.

    agreement: share of windows with the same prediction. latency_ratio: model time per window, new over old.
    accuracy_gain, estimated_accuracy_gain: new minus old. error_ratio, estimated_error_ratio: mean absolute error, new
    over old. Those of a further output begin with its name: `wear/error_ratio`.
    """

    name: ShortText
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: Natural = 0


class BundleComparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Comparison of two bundles on the same windows of one device, computed from its signed `shadow` messages.

    `new_is_shadow`: the new bundle ran in shadow, so its predictions were not results. `omitted` counts older messages.
    """

    rollout: ShortText
    device: ShortText
    task: ShortText
    new: ModelRef
    old: ModelRef
    new_is_shadow: bool
    batches: Natural
    errors: Natural
    windows: Natural
    agreeing: Natural | None
    labelled: Natural
    metrics: list[ComparisonMetric]
    messages: Annotated[list[MessageRef], msgspec.Meta(min_length=1, max_length=1000)]
    omitted: Natural = 0


class BundleCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Document bundles/NAME/VERSION-DIGEST/about.json: a bundle's content, its documents and its signer.

    `signature_verified` is False if the manifest lists no key of the signer. `summary` is the first paragraph of the
    model card.
    """

    name: ShortText
    version: ShortText
    digest: ShortText
    kind: ShortText
    created: ShortText
    summary: LongText
    fields: list[str]
    labels: list[str]
    signer: ShortText
    signature_verified: bool
    folder: ShortText
    files: list[ShortText]
    running_tasks: Natural = 0
    model_sha256: ShortText = ""
    # From the evaluation, if one was given.
    evaluated_at: ShortText = ""
    metrics: list[Metric] = []
    warnings: list[LongText] = []


class WriteLimits(msgspec.Struct, frozen=True):
    """Maximum of each kind of entry in a folder. The worst or the newest entries stay; omissions are counted."""

    incidents: int = 2000
    decisions: int = 5000
    messages: int = 60_000
    declarations: int = 10_000
    # Links of the hash chains in chains/, about 60 bytes each.
    chained_messages: int = 2_000_000
    # In one line of a file, and lines in one file.
    run_messages: int = 1000
    part_runs: int = 500
    message_bytes: int = 256 << 20
    running_tasks: int = 20_000
    accuracy_entries: int = 5000
    models: int = 1000
    # Device tasks tracked while gathering, and event names counted separately.
    tasks: int = 100_000
    event_names: int = 200
    drift_onsets: int = 500
    bundles: int = 200
    # As many as the device itself evaluates its rules on.
    messages_per_comparison: int = 64
    comparisons: int = 1000
    # Alerts of one log that are open at once; an honest device has few.
    open_alerts: int = 1000
    # Size of one file in messages/.
    part_messages: int = 2000
    part_bytes: int = 32 << 20


class ReadLimits(msgspec.Struct, frozen=True):
    """Maximum that `verify` reads from an untrusted folder. Sizes are in bytes."""

    files: int = 4096
    messages: int = 200_000
    manifest_bytes: int = 16 << 20
    token_bytes: int = 4096
    # One line of a JSON Lines file: an escaped payload of 1 MiB fits.
    line_bytes: int = 8 << 20
    file_bytes: int = 1 << 30
    total_bytes: int = 4 << 30
    # A file that is read into memory as a whole.
    document_bytes: int = 32 << 20
    # Logs in all time stamps together: an operator can let an authority stamp any list.
    stamped_logs: int = 1_000_000
    problems: int = 500
    metadata_bytes: int = 4 << 20


WRITE_LIMITS = WriteLimits()
READ_LIMITS = ReadLimits()

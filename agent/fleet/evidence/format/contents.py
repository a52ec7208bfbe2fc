"""The files of an evidence folder that programs read: a struct for a member or line of each. Times are RFC 3339."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from agent.wire.messages import MAX_PAYLOAD, Metric, Natural, Positive, ShortText

LongText = Annotated[str, msgspec.Meta(max_length=4000)]
Payload = Annotated[str, msgspec.Meta(max_length=MAX_PAYLOAD)]
JwsToken = Annotated[str, msgspec.Meta(max_length=2048)]


class MessageRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A signed message, which lies in messages/."""

    device: ShortText
    log: ShortText
    seq: Positive


class SignedMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of messages/*.jsonl: a message exactly as the device signed it; by device, log and seq."""

    topic: Annotated[str, msgspec.Meta(max_length=400)]
    payload: Payload
    jws: JwsToken


class Incident(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An alert from its raising to its end. `device` "" for one of the whole fleet.

    `state`: open; over; or unknown, where the device's log ended while it was open. `source`: a device, whose signed
    messages `raised` and `cleared` are, or the collector, which signs nothing. `clock`: of the device, of both.
    """

    device: ShortText
    task: ShortText | None
    alert: ShortText
    subject: ShortText
    severity: Literal["info", "warning", "critical"]
    summary: LongText
    state: Literal["open", "over", "unknown"]
    began: ShortText
    ended: ShortText | None
    seconds: float | None
    clock: Literal["synced", "restored", "unsynced"]
    source: Literal["device", "collector"]
    raised: MessageRef | None = None
    cleared: MessageRef | None = None


class DecisionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of decisions.jsonl: what changed, and by whom.

    `phase`: what a device came to in a roll-out. Told by a device in message `place`, or signed by an operator: then
    `payload` and `jws` are here.
    """

    time: ShortText
    event: ShortText
    who: LongText
    summary: LongText
    device: ShortText = ""
    task: ShortText = ""
    rollout: ShortText = ""
    phase: ShortText = ""
    place: MessageRef | None = None
    payload: Payload | None = None
    jws: JwsToken | None = None


class ModelRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    name: ShortText
    version: ShortText
    digest: ShortText

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class BundleUsage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A bundle that devices began to run at some time: `activations` of them on so many `devices`."""

    model: ModelRef
    first: ShortText
    last: ShortText
    activations: Natural
    devices: Natural
    running: Natural = 0


class RunningTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device's task runs by its newest health message, since when and who decided it, where that is known."""

    device: ShortText
    task: ShortText
    model: ModelRef | None
    agent: ShortText
    told: ShortText
    since: ShortText | None
    who: LongText
    health: MessageRef
    activated: MessageRef | None
    rollout: dict[str, Any] | None = None


class AccuracyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Metrics of labelled results: a device's newest (`place`), or of labels that came to the collector.

    `labels`: how many came from whom; `labelling`: how late, how much of the results they cover. `low` and `high` of a
    metric are the ends of a 95 % interval.
    """

    device: ShortText
    task: ShortText
    time: ShortText
    source: Literal["device", "collector"]
    model: ModelRef | None
    labels: dict[str, int]
    metrics: list[Metric]
    labelling: dict[str, Any] = {}
    estimate: dict[str, Any] | None = None
    place: MessageRef | None = None


class ComparisonMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With its 95 % interval, of `n` windows; nulls where too few messages tell of it.

    agreement: share of windows answered alike. time: in the model a window, as a multiple of the old bundle's. accuracy
    by labels, expected accuracy: less the old one's. error by labels: mean absolute one, as a multiple.
    """

    name: ShortText
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: Natural = 0


class BundleComparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device's signed messages at `places` say of two bundles on the same windows, in a roll-out.

    `new_is_beside`: the new one answered beside, and its answers were no results. `left_out`: older messages.
    """

    rollout: ShortText
    device: ShortText
    task: ShortText
    new: ModelRef
    old: ModelRef
    new_is_beside: bool
    batches: Natural
    errors: Natural
    windows: Natural
    same: Natural | None
    labelled: Natural
    figures: list[ComparisonMetric]
    places: Annotated[list[MessageRef], msgspec.Meta(min_length=1, max_length=1000)]
    left_out: Natural = 0


class BundleCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """bundles/NAME/VERSION-DIGEST/about.json: what a bundle is, in which folder its papers lie, who signed it.

    `checked`: the signature fits the key `signer`, which is listed; else nobody's key was known here.
    """

    name: ShortText
    version: ShortText
    digest: ShortText
    kind: ShortText
    created: ShortText
    about: LongText
    fields: list[str]
    labels: list[str]
    signer: ShortText
    checked: bool
    folder: ShortText
    files: list[ShortText]
    devices: Natural = 0
    model_sha256: ShortText = ""
    # Of an evaluation that was given: metrics, and what it warns of.
    evaluated: ShortText = ""
    metrics: list[Metric] = []
    warnings: list[LongText] = []


class WriteLimits(msgspec.Struct, frozen=True):
    """Of each that goes into a folder; the worst or the newest stay."""

    incidents: int = 2000
    decisions: int = 5000
    messages: int = 60_000
    message_bytes: int = 256 << 20
    running_tasks: int = 20_000
    accuracy_entries: int = 5000
    models: int = 1000
    # Tasks of devices that are remembered on the way, and names of events that are counted each.
    tasks: int = 100_000
    event_names: int = 200
    drift_onsets: int = 500
    bundles: int = 200
    # Of one device, roll-out and pair of bundles as many as a device itself judges by; and how many of these.
    messages_per_comparison: int = 64
    comparisons: int = 1000
    # Alerts of one log that are open at once; an honest device has a few.
    open_alerts: int = 1000
    # Of one part of messages/.
    part_messages: int = 2000
    part_bytes: int = 32 << 20


class ReadLimits(msgspec.Struct, frozen=True):
    """Of a folder that somebody else made. Sizes in bytes."""

    files: int = 4096
    messages: int = 200_000
    manifest_bytes: int = 16 << 20
    token_bytes: int = 4096
    # A file that is parsed line by line, and one line of it: a payload of a megabyte, escaped.
    line_bytes: int = 8 << 20
    file_bytes: int = 1 << 30
    total_bytes: int = 4 << 30
    # What is read whole.
    document_bytes: int = 32 << 20
    problems: int = 500
    metadata_bytes: int = 4 << 20


WRITE_LIMITS = WriteLimits()
READ_LIMITS = ReadLimits()

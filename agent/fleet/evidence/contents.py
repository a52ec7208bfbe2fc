"""The files of an evidence folder that programs read: a struct for a member or line of each. Times are RFC 3339."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from agent.wire.messages import MAX_PAYLOAD, Metric, Natural, Positive, Text

Word = Annotated[str, msgspec.Meta(max_length=4000)]
Payload = Annotated[str, msgspec.Meta(max_length=MAX_PAYLOAD)]
Token = Annotated[str, msgspec.Meta(max_length=2048)]


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """A signed message, which lies in messages/."""

    device: Text
    log: Text
    seq: Positive


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of messages/*.jsonl: a message exactly as the device signed it; by device, log and seq."""

    topic: Annotated[str, msgspec.Meta(max_length=400)]
    payload: Payload
    jws: Token


class Incident(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An alert from its raising to its end. `device` "" for one of the whole fleet.

    `state`: open; over; or unknown, where the device's log ended while it was open. `source`: a device, whose signed
    messages `raised` and `cleared` are, or the collector, which signs nothing. `clock`: of the device, of both.
    """

    device: Text
    task: Text | None
    alert: Text
    subject: Text
    severity: Literal["info", "warning", "critical"]
    summary: Word
    state: Literal["open", "over", "unknown"]
    began: Text
    ended: Text | None
    seconds: float | None
    clock: Literal["synced", "restored", "unsynced"]
    source: Literal["device", "collector"]
    raised: Place | None = None
    cleared: Place | None = None


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of decisions.jsonl: what changed, and by whom.

    `phase`: what a device came to in a roll-out. Told by a device in message `place`, or signed by an operator: then
    `payload` and `jws` are here.
    """

    time: Text
    event: Text
    who: Word
    summary: Word
    device: Text = ""
    task: Text = ""
    rollout: Text = ""
    phase: Text = ""
    place: Place | None = None
    payload: Payload | None = None
    jws: Token | None = None


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    name: Text
    version: Text
    digest: Text

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Ran(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A bundle that devices began to run at some time: `activations` of them on so many `devices`."""

    model: Model
    first: Text
    last: Text
    activations: Natural
    devices: Natural
    running: Natural = 0


class Running(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device's task runs by its newest health message, since when and who decided it, where that is known."""

    device: Text
    task: Text
    model: Model | None
    agent: Text
    told: Text
    since: Text | None
    who: Word
    health: Place
    activated: Place | None
    rollout: dict[str, Any] | None = None


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Metrics of labelled results: a device's newest (`place`), or of labels that came to the collector.

    `labels`: how many came from whom; `labelling`: how late, how much of the results they cover. `low` and `high` of a
    metric are the ends of a 95 % interval.
    """

    device: Text
    task: Text
    time: Text
    source: Literal["device", "collector"]
    model: Model | None
    labels: dict[str, int]
    metrics: list[Metric]
    labelling: dict[str, Any] = {}
    estimate: dict[str, Any] | None = None
    place: Place | None = None


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With its 95 % interval, of `n` windows; nulls where too few messages tell of it.

    agreement: share of windows answered alike. time: in the model a window, as a multiple of the old bundle's. accuracy
    by labels, expected accuracy: less the old one's. error by labels: mean absolute one, as a multiple.
    """

    name: Text
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: Natural = 0


class Compared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device's signed messages at `places` say of two bundles on the same windows, in a roll-out.

    `new_is_beside`: the new one answered beside, and its answers were no results. `left_out`: older messages.
    """

    rollout: Text
    device: Text
    task: Text
    new: Model
    old: Model
    new_is_beside: bool
    batches: Natural
    errors: Natural
    windows: Natural
    same: Natural | None
    labelled: Natural
    figures: list[Figure]
    places: Annotated[list[Place], msgspec.Meta(min_length=1, max_length=1000)]
    left_out: Natural = 0


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """bundles/NAME/VERSION-DIGEST/about.json: what a bundle is, in which folder its papers lie, who signed it.

    `checked`: the signature fits the key `signer`, which is listed; else nobody's key was known here.
    """

    name: Text
    version: Text
    digest: Text
    kind: Text
    created: Text
    about: Word
    fields: list[str]
    labels: list[str]
    signer: Text
    checked: bool
    folder: Text
    files: list[Text]
    devices: Natural = 0
    model_sha256: Text = ""
    # Of an evaluation that was given: metrics, and what it warns of.
    evaluated: Text = ""
    metrics: list[Metric] = []
    warnings: list[Word] = []

"""Message payloads: one struct per kind. `docs/reference/wire-format.md` is the published contract."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from outstation.foundation import clock
from outstation.foundation.costs.usage import Usage
from outstation.protocol.wire import runs
from outstation.protocol.wire.commands import MAX_ARGUMENT_LENGTH
from outstation.protocol.wire.desired_state import DesiredBundle, Name
from outstation.protocol.wire.jws import MAX_PAYLOAD
from outstation.protocol.wire.keys import parse_encryption_key
from outstation.protocol.wire.runs import Magnitude, QuietWindows
from outstation.protocol.wire.runs import ResultColumns as ResultColumns
from outstation.protocol.wire.times import Rfc3339

# Further outputs in a `shadow` message.
MAX_OUTPUTS = 32
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
ShortText = Annotated[str, msgspec.Meta(max_length=256)]
# Base64url of sealed content.
Sealed = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]*\Z", max_length=MAX_PAYLOAD)]
Uuid = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
SquareSum = Annotated[float, msgspec.Meta(ge=0, le=1e200)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e100)]
Severity = Literal["info", "warning", "critical"]


class Payload(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True):
    v: Literal[1]
    device: ShortText


class Origin(msgspec.Struct, frozen=True):
    """The place of the original in an old log; `first`: the log of the first one, if it was reissued before."""

    log: Uuid
    seq: Positive
    first: Uuid | None = None

    @property
    def first_log(self) -> str:
        """The log in which the message was written: commitments of rows belong to it."""
        return self.first or self.log


class LoggedPayload(Payload, frozen=True, kw_only=True):
    log: Uuid
    seq: Positive
    prev: Annotated[str, msgspec.Meta(max_length=64)]
    boot: Natural
    time: Rfc3339
    clock: Literal["synced", "restored", "unsynced"]
    # Where a new log repeats a message of an old one.
    reissued: Origin | None = None


class ModelRef(msgspec.Struct, frozen=True):
    name: ShortText
    version: ShortText
    digest: ShortText


class ResultMaker(msgspec.Struct, frozen=True):
    """Producer of results: versions of the agent and the runtime, and the digest of the task's config."""

    agent: ShortText | None = None
    runtime: ShortText | None = None
    config: ShortText | None = None


class JoinedRange(msgspec.Struct, frozen=True):
    """Rows of the stream that a further input of the model was joined from, by time, and the commitment to them."""

    stream: ShortText
    rows: tuple[Positive, Positive]
    input: ShortText = ""

    def __post_init__(self) -> None:
        if self.rows[0] > self.rows[1]:
            raise ValueError(f"joined rows [{self.rows[0]},{self.rows[1]}] run backwards")


class ResultsPayload(LoggedPayload, frozen=True, kw_only=True, tag="results"):
    task: ShortText
    model: ModelRef
    stream: ShortText
    rows: tuple[Positive, Positive]
    n: Natural
    input: ShortText
    columns: ResultColumns
    # Results whose missing share exceeds the bundle's limit.
    incomplete: Natural = 0
    # Fields with a sensor fault while these results were computed.
    faults: Annotated[list[ShortText], msgspec.Meta(max_length=64)] = []
    # Further inputs by name.
    joined: Annotated[dict[ShortText, JoinedRange], msgspec.Meta(max_length=8)] = {}
    # Runs of rows stamped by one clock: first row, boot, clock segment (0: the producer's clock), and quality
    # (0 synced, 1 restored, 2 unsynced).
    clocks: list[tuple[Positive, Natural, Natural, Annotated[int, msgspec.Meta(ge=0, le=2)]]] | None = None
    made: ResultMaker | None = None

    def __post_init__(self) -> None:
        first, last = self.rows
        if first > last:
            raise ValueError(f"rows [{first},{last}] run backwards")
        if len(self.columns) > self.n:
            raise ValueError(f"{len(self.columns)} results listed, n says {self.n}")
        smallest = runs.smallest_row(self.columns.row)
        if smallest is not None and smallest < first:
            raise ValueError("a result's row lies before the rows of its message")
        if self.clocks is not None:
            begins = [clock[0] for clock in self.clocks]
            if begins[:1] != [first] or begins != sorted(set(begins)):
                raise ValueError("clocks must begin with the first row of the message and ascend")


class WindowRange(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    index: Natural
    rows: tuple[Positive, Positive]
    from_: Rfc3339
    to: Rfc3339
    n: Natural


class DriftPayload(LoggedPayload, frozen=True, kw_only=True, tag="drift"):
    """A closed drift window, or with `windows` a run of quiet ones: sums over all, states after the last."""

    task: ShortText
    model: ModelRef
    reference: dict[str, str | None]
    window: WindowRange
    features: dict[ShortText, dict[str, Any]]
    output: dict[str, Any]
    state: Literal["ok", "drift", "fault", "insufficient"]
    estimate: dict[str, Any] | None = None
    joint: dict[str, Any] | None = None
    rate: dict[str, Any] | None = None
    windows: QuietWindows | None = None

    def __post_init__(self) -> None:
        if self.windows is not None:
            self._check_run(self.windows)

    def _check_run(self, windows: QuietWindows) -> None:
        """Check that the message agrees with its windows. Raises ValueError."""
        rows, times, span = windows.expand_rows(), windows.expand_times(), self.window
        if self.state != "ok":
            raise ValueError(f"{len(windows)} windows in state {self.state!r}; only quiet ones share a message")
        if span.rows != (rows[0][0], rows[-1][1]):
            raise ValueError(f"rows {list(span.rows)}, but its windows have rows [{rows[0][0]},{rows[-1][1]}]")
        for text, us in ((span.from_, times[0][0]), (span.to, times[-1][1])):
            # Both as text and back, as a time beyond the calendar has no text of its own.
            if clock.parse_rfc3339(text) != clock.parse_rfc3339(clock.to_rfc3339(us)):
                raise ValueError(f"time {text}, but its windows have {clock.to_rfc3339(us)}")
        if span.n != (rows_counted := sum(runs.expand_integers(windows.n))):
            raise ValueError(f"n is {span.n}, but its windows have {rows_counted} rows")
        for name, field in self.features.items():
            try:
                counted = sum(field["counts"]) + field["below"] + field["above"] + field["missing"]
                counted += field.get("withheld", 0)
            except (KeyError, TypeError):
                raise ValueError(f"field {name} of a run has no counts") from None
            if counted != span.n:
                raise ValueError(f"counts of field {name} add up to {counted} rows, n is {span.n}")


class AlertPayload(LoggedPayload, frozen=True, kw_only=True, tag="alerts"):
    alert: Literal["drift", "fault", "result", "model", "quality", "storage", "clock", "security", "notify"]
    subject: ShortText
    state: Literal["raised", "cleared"]
    severity: Severity
    summary: Annotated[str, msgspec.Meta(max_length=2000)]
    id: ShortText
    evidence: dict[str, Any] = {}
    task: ShortText | None = None
    revision: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class Metric(msgspec.Struct, frozen=True):
    """Metric with its confidence interval. `slice` is empty for all results; `state` of a slice: ok, worse, small."""

    metric: ShortText
    value: Magnitude | None
    low: Magnitude | None
    high: Magnitude | None
    n: Natural
    slice: Annotated[str, msgspec.Meta(max_length=600)] = ""
    state: ShortText | None = None


class QualityPayload(LoggedPayload, frozen=True, kw_only=True, tag="quality"):
    """Metrics of one output of a model by labels; `output` is empty for the first one."""

    task: ShortText
    model: ModelRef | None = None
    output: Annotated[str, msgspec.Meta(max_length=64)] = ""
    window: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    estimate: dict[str, Any] | None = None
    metrics: list[Metric] = []
    # Metrics of too few labels, or too few new ones.
    withheld: Natural = 0


class Moments(msgspec.Struct, frozen=True):
    """Count, mean and sum of squared deviations of a sample. They merge by Chan et al. (1979)."""

    n: Natural = 0
    mean: Magnitude = 0.0
    m2: SquareSum = 0.0


class BundleStats(msgspec.Struct, frozen=True):
    """Statistics of one bundle over the compared windows.

    `seconds`: inference time. `scores`: its scores, or its values. `expected`: accuracy estimated from its scores.
    `right`: labelled windows predicted correctly. `abs_error`: absolute error of its values on labelled windows.
    `expected_error`: absolute error to expect of its values by its inputs (DLE).
    """

    windows: Natural
    seconds: Seconds
    scores: Moments = Moments()
    expected_accuracy: Moments = Moments()
    correct: Natural = 0
    abs_error: Moments = Moments()
    expected_error: Moments = Moments()


class ComparedOutput(msgspec.Struct, frozen=True):
    """Comparison of a further output, as in `ShadowPayload`, without times; a bundle without it has no windows."""

    n: Natural
    agreeing: Natural | None = None
    difference: Moments = Moments()
    stats: BundleStats = BundleStats(0, 0.0)
    other_stats: BundleStats = BundleStats(0, 0.0)
    labelled: tuple[Natural, Natural, Natural, Natural] = (0, 0, 0, 0)
    error: Annotated[str, msgspec.Meta(max_length=500)] = ""


class ShadowPayload(LoggedPayload, frozen=True, kw_only=True, tag="shadow"):
    """Comparison of two bundles over the same rows: `model` is active, `other` is evaluated. Adds up over messages.

    `agreeing`: windows of `n` with equal predictions. `difference`: other minus model, of values or scores. `labelled`:
    labelled windows that were right in [both, model only, other only, neither]. `errors`: batches in which `other`
    failed; `error`: the last reason. `outputs`: further outputs of the models by name; those that do not fit follow in
    messages without batches, of the same rows and time.
    """

    task: ShortText
    rollout: Name
    model: ModelRef
    other: ModelRef
    rows: tuple[Positive, Positive]
    batches: Natural
    n: Natural
    agreeing: Natural | None = None
    difference: Moments = Moments()
    stats: BundleStats
    other_stats: BundleStats
    labelled: tuple[Natural, Natural, Natural, Natural] = (0, 0, 0, 0)
    errors: Natural = 0
    error: Annotated[str, msgspec.Meta(max_length=500)] = ""
    outputs: Annotated[dict[Name, ComparedOutput], msgspec.Meta(max_length=MAX_OUTPUTS)] = {}

    def __post_init__(self) -> None:
        if self.rows[0] > self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} run backwards")
        for agreeing, n in [(self.agreeing, self.n), *((part.agreeing, part.n) for part in self.outputs.values())]:
            if agreeing is not None and agreeing > n:
                raise ValueError(f"{agreeing} windows agree, n says {n}")


class JoinedSample(msgspec.Struct, frozen=True):
    """Readings that a further input of the model was joined from: `n` rows of `stream`, within `rows`."""

    stream: ShortText
    rows: tuple[Positive, Positive]
    n: Positive
    # Sealed `SampleContent` with row numbers, as in `SamplesPayload`.
    sealed: Sealed

    def __post_init__(self) -> None:
        first, last = self.rows
        if not self.n <= last - first + 1:
            raise ValueError(f"joined rows [{first},{last}] are not {self.n}")
        if len(self.sealed) % 4 == 1:
            raise ValueError("sealed is not base64url")


class SamplesPayload(LoggedPayload, frozen=True, kw_only=True, tag="samples"):
    """Readings around one result, with the consent of the device's owner, sealed to the collectors.

    `rows`: first and last row of the stream, `n` of them. `row`: the result. `subject`: id of the alert, else "".
    `digits`: significant digits of the values. `joined`: readings of further inputs by name.
    """

    task: ShortText
    model: ModelRef
    stream: ShortText
    reason: Literal["alert", "uncertain", "requested"]
    subject: ShortText = ""
    row: Positive
    rows: tuple[Positive, Positive]
    n: Positive
    digits: Annotated[int, msgspec.Meta(ge=1, le=9)]
    # Sealed `SampleContent`, base64url; empty where the least count withholds it.
    sealed: Sealed
    joined: Annotated[dict[ShortText, JoinedSample], msgspec.Meta(max_length=8)] = {}

    def __post_init__(self) -> None:
        first, last = self.rows
        if not first <= self.row <= last:
            raise ValueError(f"row {self.row} is none of the rows [{first},{last}]")
        if self.n != last - first + 1:
            raise ValueError(f"rows [{first},{last}] are not {self.n}")
        if len(self.sealed) % 4 == 1:
            raise ValueError("sealed is not base64url")


class AcknowledgementRef(msgspec.Struct, frozen=True):
    """The newest acknowledgement that the device verified: the collector's key, and what it signed.

    Quoted in the device's own signed messages, it bounds their time from below, and the collector cannot deny it.
    """

    kid: ShortText
    log: Uuid
    through: Natural
    time: Rfc3339
    digest: Annotated[str, msgspec.Meta(max_length=64)] | None = None


class HealthPayload(LoggedPayload, frozen=True, kw_only=True, tag="health"):
    streams: dict[ShortText, dict[str, Any]] = {}
    tasks: dict[ShortText, dict[str, Any]] = {}
    wall_clock: dict[ShortText, Any] = {}
    acknowledged: AcknowledgementRef | None = None
    # About once an hour.
    usage: Usage | None = None
    # The device promises the next health message after this many seconds.
    interval_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] | None = None
    # [device] groups
    groups: Annotated[list[ShortText], msgspec.Meta(max_length=8)] = []


class AuditPayload(LoggedPayload, frozen=True, kw_only=True, tag="audit"):
    event: ShortText
    summary: Annotated[str, msgspec.Meta(max_length=2000)] = ""
    evidence: dict[str, Any] = {}


class StatePayload(Payload, frozen=True, kw_only=True, tag="state"):
    state: Literal["online", "offline", "stopped"]
    boot: Natural
    time: Rfc3339


class KeysPayload(Payload, frozen=True, kw_only=True, tag="keys"):
    keys: list[dict[str, str]]
    time: Rfc3339


class ReplyPayload(Payload, frozen=True, kw_only=True, tag="reply"):
    id: ShortText
    name: ShortText
    ok: bool
    summary: Annotated[str, msgspec.Meta(max_length=2000)]
    data: dict[str, Any] = {}
    time: Rfc3339


class AckPayload(Payload, frozen=True, kw_only=True, tag="ack"):
    log: Uuid
    through: Natural
    missing: list[tuple[Positive, Positive]]
    time: Rfc3339
    # Digest of the payload of message `through`, as in the next message's `prev`; None where it is not stored.
    digest: Annotated[str, msgspec.Meta(max_length=64)] | None = None

    def __post_init__(self) -> None:
        ends = [end for pair in self.missing for end in pair]
        if ends != sorted(ends) or (ends and ends[-1] > self.through):
            raise ValueError("missing ranges must ascend and end at or before through")


class CommandPayload(Payload, frozen=True, kw_only=True, tag="cmd", forbid_unknown_fields=True):
    """A command. An unknown member could be a condition, so a device refuses the whole command."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    name: Annotated[str, msgspec.Meta(max_length=64)]
    args: Annotated[
        dict[ShortText, Annotated[str, msgspec.Meta(max_length=MAX_ARGUMENT_LENGTH)]], msgspec.Meta(max_length=16)
    ] = {}
    counter: Positive
    issued: Rfc3339
    expires: Rfc3339
    # Encryption key of the sender, to which a device with [privacy] encrypt seals the reply.
    reply_key: Annotated[str, msgspec.Meta(max_length=64)] | None = None

    def __post_init__(self) -> None:
        if self.reply_key is not None:
            parse_encryption_key(self.reply_key)


class DesiredPayload(Payload, frozen=True, kw_only=True, tag="desired", forbid_unknown_fields=True):
    """Desired state of a device, of the fleet (`_all`) or of a `group` (`_group`). Refused if a member is unknown.

    `counter` strictly grows per topic and operator key. `tasks` replaces everything this topic desired before.
    """

    group: Name | None = None
    counter: Positive
    issued: Rfc3339
    tasks: Annotated[dict[Name, DesiredBundle], msgspec.Meta(max_length=64)] = {}


Body = (
    ResultsPayload
    | DriftPayload
    | AlertPayload
    | QualityPayload
    | ShadowPayload
    | SamplesPayload
    | HealthPayload
    | AuditPayload
    | StatePayload
    | KeysPayload
    | ReplyPayload
    | AckPayload
    | CommandPayload
    | DesiredPayload
)

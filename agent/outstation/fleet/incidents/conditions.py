"""Conditions that the collector raises an alert for: silent, backlog, clock, storage, and certificates that end.

Only `list_certificates` reads anything. Each check of a device is pure: it decides from what is stored whether its
condition holds, or still holds while its alert is open. An alert clears later than it is raised, so that a value at the
limit does not raise it again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec

from outstation.fleet.database.incidents.device_status import DeviceStatus
from outstation.foundation import clock, decoders, input_files
from outstation.foundation.text import format_duration
from outstation.protocol.alerts.alert import AlertKind, Severity
from outstation.protocol.alerts.kinds import (
    BACKLOG_GROWS,
    CERTIFICATE_ENDS,
    CLOCK_AT_COLLECTOR,
    DEVICE_SILENT,
    STORAGE_ENDS,
)

# A device is silent after this many of its health intervals, and a little for the way of the last one.
SILENT_INTERVALS, SILENT_GRACE_S = 3, 30.0
# A device that never sent anything is silent after this time: it is installed after its enrolment.
UNSEEN_LIMIT_S = 86_400.0
# Health messages that a backlog is judged by; so few waiting messages are no backlog.
BACKLOG_MESSAGES, MIN_BACKLOG = 10, 100
# Share of their intervals in which health messages must have arrived to show a backlog that grows.
_LIVE_SHARE = 0.5
MAX_AHEAD_S, MAX_LATE_S, LATE_SPREAD_S, LATE_MESSAGES = 60.0, 600.0, 30.0, 3
STORAGE_WARNING_H, STORAGE_CRITICAL_H, STORAGE_CLEAR_H = 24.0, 6.0, 36.0
CERTIFICATE_WARNING_S, CERTIFICATE_CRITICAL_S = 30 * 86_400.0, 7 * 86_400.0
_MAX_INTERVAL_S = 86_400.0


class StoreReport(msgspec.Struct, frozen=True):
    hours: Annotated[float, msgspec.Meta(ge=0)] | None = None


class HealthReport(msgspec.Struct, frozen=True):
    """The members of a health message that conditions depend on; `received` is the collector's time, epoch µs."""

    time: str
    interval_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    outbox: Annotated[int, msgspec.Meta(ge=0)] = 0
    clock: str = ""
    store: StoreReport = StoreReport()
    received: int = 0

    @property
    def delay_s(self) -> float:
        """Return its delay: arrival minus its own time; negative if that time was still to come."""
        return (self.received - clock.parse_rfc3339(self.time)) / 1e6


class Condition(msgspec.Struct, frozen=True):
    """Cause of an alert of the collector; `names` fill in the id of its kind."""

    kind: AlertKind
    device: str
    summary: str
    severity: Severity
    names: dict[str, str] = {}
    task: str | None = None


class DeviceView(msgspec.Struct, frozen=True):
    """A device at one moment.

    `silence_s`: time since its last message, or since its enrolment; None if a wrong clock stored that moment.
    `watched_s`: how long a collector has watched. `health`: its newest health message first; only the newest, unless
    its backlog or its clock needs more.
    """

    status: DeviceStatus
    health: Sequence[HealthReport]
    silence_s: float | None
    watched_s: float

    @property
    def device(self) -> str:
        return self.status.device

    @property
    def newest(self) -> HealthReport | None:
        return self.health[0] if self.health else None

    def is_silent(self, limit_s: float, watch_s: float, *, is_open: bool) -> bool:
        """Return True after `limit_s` of silence, of which `watch_s` were watched.

        While no collector watched nothing could arrive; but what was silent before has not spoken.
        """
        if self.silence_s is None:
            return is_open or self.watched_s > limit_s
        return self.silence_s > limit_s and (is_open or self.watched_s > watch_s)


def parse_health(payload: bytes, received: str) -> HealthReport | None:
    """Return the report; None if a member that the schema leaves free is of another type."""
    try:
        report = decoders.from_json(payload, HealthReport)
        clock.parse_rfc3339(report.time)
        return msgspec.structs.replace(report, received=clock.parse_rfc3339(received))
    except (msgspec.MsgspecError, ValueError):
        return None


def needs_history(newest: HealthReport) -> bool:
    """Return True if the conditions depend on earlier health messages, too."""
    return newest.outbox >= MIN_BACKLOG or newest.delay_s > MAX_LATE_S


def silence_limit_s(interval_s: float) -> float:
    """Return the time without a message after which a device with this health interval is silent."""
    return SILENT_INTERVALS * min(interval_s, _MAX_INTERVAL_S) + SILENT_GRACE_S


def check_silent(view: DeviceView, *, is_open: bool) -> Condition | None:
    status = view.status
    if status.state == "stopped":
        return None
    if status.last_seen is None:
        return _check_unseen(view, is_open=is_open)
    interval_s = min(view.newest.interval_s, _MAX_INTERVAL_S) if view.newest else HealthReport("").interval_s
    limit_s = silence_limit_s(interval_s)
    if not view.is_silent(limit_s, limit_s, is_open=is_open):
        return None
    how = "; the broker reports that its connection broke" if status.state == "offline" else ""
    summary = (
        f"Nothing has arrived from {view.device} since {_format_moment(view, status.last_seen)}, although its health "
        f"messages promise one each {format_duration(interval_s * 1e6)}{how}. Look at its power and network first."
    )
    return Condition(DEVICE_SILENT, view.device, summary, "critical")


def _format_moment(view: DeviceView, stored: str) -> str:
    return f"{stored[:10]} {stored[11:19]} UTC" if view.silence_s is not None else "a day that a wrong clock gave"


def _check_unseen(view: DeviceView, *, is_open: bool) -> Condition | None:
    if not view.is_silent(UNSEEN_LIMIT_S, silence_limit_s(HealthReport("").interval_s), is_open=is_open):
        return None
    moment = _format_moment(view, view.status.enrolled)
    summary = (
        f"No valid message has arrived from {view.device} since it was enrolled on {moment}. Run `outstation check` "
        "there, or `outstation fleet devices remove` if it is not to come."
    )
    return Condition(DEVICE_SILENT, view.device, summary, "warning")


def check_backlog(view: DeviceView, *, is_open: bool) -> Condition | None:
    counts = [report.outbox for report in view.health]
    if not counts or counts[0] < MIN_BACKLOG or len(counts) < BACKLOG_MESSAGES:
        return None
    grows = all(later >= earlier for later, earlier in pairwise(counts))
    if not (grows and counts[0] >= counts[-1] + MIN_BACKLOG) and not (is_open and counts[0] >= counts[-1]):
        return None
    span_us = view.health[0].received - view.health[-1].received
    if not is_open and span_us < _LIVE_SHARE * 1e6 * min(report.interval_s for report in view.health) * (
        len(counts) - 1
    ):
        # They were written while the device could not send, and arrive together: the backlog is being delivered.
        return None
    summary = (
        f"{counts[0]} messages wait on {view.device}, {counts[-1]} did {format_duration(span_us)} before: it sends "
        "more than its connection or its quota lets through."
    )
    return Condition(BACKLOG_GROWS, view.device, summary, "warning")


def check_clock(view: DeviceView, *, is_open: bool) -> Condition | None:
    if (newest := view.newest) is None:
        return None
    limit = 0.5 if is_open else 1.0
    if -newest.delay_s > MAX_AHEAD_S * limit:
        ahead = format_duration(-newest.delay_s * 1e6)
        summary = f"The clock of {view.device} is {ahead} ahead of the collector's (it calls itself {newest.clock})."
        return Condition(CLOCK_AT_COLLECTOR, view.device, summary, "warning")
    # Messages of a backlog arrive late, too, but ever sooner; and then others still wait.
    delays = [report.delay_s for report in view.health[:LATE_MESSAGES] if report.outbox < MIN_BACKLOG]
    spacing = view.health[0].received - view.health[min(len(view.health), LATE_MESSAGES) - 1].received
    is_constant = len(delays) == LATE_MESSAGES and max(delays) - min(delays) < LATE_SPREAD_S
    if is_constant and min(delays) > MAX_LATE_S * limit and spacing > newest.interval_s * 1e6:
        late = format_duration(min(delays) * 1e6)
        summary = (
            f"The clock of {view.device} is {late} behind the collector's: each of its messages is that late, although "
            "none waits."
        )
        return Condition(CLOCK_AT_COLLECTOR, view.device, summary, "warning")
    return None


def check_storage(view: DeviceView, *, is_open: bool) -> Condition | None:
    hours = view.newest.store.hours if view.newest else None
    if hours is None or hours >= (STORAGE_CLEAR_H if is_open else STORAGE_WARNING_H):
        return None
    summary = (
        f"At the present rate the store of {view.device} is full in {hours:.0f} h: then undelivered data is evicted, "
        "or readings are refused."
    )
    return Condition(STORAGE_ENDS, view.device, summary, "critical" if hours < STORAGE_CRITICAL_H else "warning")


Check = Callable[..., Condition | None]
# The kind of each check names its alerts.
CHECKS: tuple[tuple[AlertKind, Check], ...] = (
    (DEVICE_SILENT, check_silent),
    (BACKLOG_GROWS, check_backlog),
    (CLOCK_AT_COLLECTOR, check_clock),
    (STORAGE_ENDS, check_storage),
)


class Certificate(msgspec.Struct, frozen=True):
    """A certificate in use; `device` is empty for one of the fleet's own, `end_us` epoch µs."""

    device: str
    name: str
    path: Path
    end_us: int


def list_certificates(home: Path, own: Iterable[Path], devices: Iterable[str]) -> Iterator[Certificate]:
    """Yield the fleet's `own` certificates and the newest one of each device; skip files that hold none."""
    for path in (*own, home / "broker" / "server.crt"):
        if (end_us := _read_end(path)) is not None:
            yield Certificate("", path.name, path, end_us)
    for device in devices:
        # The device has not confirmed a certificate that was issued later than this.
        path = home / "devices" / device / "device.crt"
        if (end_us := _read_end(path)) is not None:
            yield Certificate(device, "device", path, end_us)


def find_ending(certificates: Iterable[Certificate], now_us: int) -> list[Condition]:
    """Return a condition for each certificate that ends soon or has ended."""
    findings = []
    for certificate in certificates:
        left_s = (certificate.end_us - now_us) / 1e6
        if left_s >= CERTIFICATE_WARNING_S:
            continue
        end = clock.to_rfc3339(certificate.end_us)[:10]
        verb = "ended" if left_s < 0 else "ends"
        owner = certificate.device or "the fleet"
        summary = f"The TLS certificate {certificate.path} of {owner} {verb} on {end}; the broker refuses it then."
        severity = "critical" if left_s < CERTIFICATE_CRITICAL_S else "warning"
        findings.append(
            Condition(CERTIFICATE_ENDS, certificate.device, summary, severity, {"name": certificate.name})  # type: ignore[arg-type]
        )
    return findings


def _read_end(path: Path) -> int | None:
    # No other module of the collector reads certificates.
    from cryptography import x509

    try:
        end = x509.load_pem_x509_certificate(input_files.read_bytes(path)).not_valid_after_utc
    except (OSError, ValueError):
        return None
    return round(end.timestamp() * 1e6)

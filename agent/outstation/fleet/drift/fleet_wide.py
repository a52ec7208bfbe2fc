"""Fleet-wide drift: a field that drifts on more devices at once than single sensors explain.

How many devices are too many follows from the fleet itself: the share of its devices that usually raise an alarm of
that field within the same span.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from outstation.foundation import clock

MIN_DEVICES = 4  # Fewer devices are no fleet.
# Below these, a significant coincidence can still be two people who changed something at once.
MIN_DRIFTING, MIN_SHARE = 3, 1 / 3
SIGNIFICANCE_LEVEL = 1e-3  # Over all fields and all observed time.
# Devices detect the same change within this many of their drift windows, and never less than an hour.
SPAN_WINDOWS, MIN_SPAN_US = 12, 3_600_000_000


class ObservationPeriod(msgspec.Struct, frozen=True):
    """When a device's fields were first and last tested, epoch µs, and in how many drift windows."""

    first: int
    last: int
    windows: int = 1

    def merge(self, other: ObservationPeriod) -> ObservationPeriod:
        first, last = min(self.first, other.first), max(self.last, other.last)
        return ObservationPeriod(first, last, self.windows + other.windows)


class Onset(msgspec.Struct, frozen=True):
    """The last alarm of a field at a device: its time (epoch µs), whether it is open, and earlier alarms."""

    device: str
    subject: str
    alarmed: int
    is_open: bool
    earlier_alarms: int = 0


class FleetWideDrift(msgspec.Struct, frozen=True):
    """`devices` of `device_count` have an open alarm of `subject`, raised from `since` to `until` (epoch µs).

    `usual_count`: devices that usually raise one within `span_us`; None if the observed time is too short. `p_value`:
    probability of at least this number by chance, corrected for the number of fields and spans.
    """

    subject: str
    devices: tuple[str, ...]
    device_count: int
    since: int
    until: int
    span_us: int
    usual_count: float | None
    p_value: float

    @property
    def summary(self) -> str:
        since = f"{clock.to_datetime(self.since):%Y-%m-%d %H:%M} UTC"
        usual = "the usual number is not known yet"
        if self.usual_count is not None:
            usual = f"usually {self.usual_count:.0f} of {self.device_count}"
        share = f"{len(self.devices)} of {self.device_count} devices"
        return (
            f"{self.subject} has drifted on {share} since {since} ({usual}): "
            "the cause is in the fleet's environment or its models, not in single sensors"
        )


def coincidence_span_us(observed: Mapping[str, ObservationPeriod]) -> int:
    """Return the span within which devices detect the same change, µs."""
    intervals = [(period.last - period.first) / period.windows for period in observed.values()]
    return max(MIN_SPAN_US, int(SPAN_WINDOWS * median(intervals))) if intervals else MIN_SPAN_US


def detect(observed: Mapping[str, ObservationPeriod], onsets: Sequence[Onset]) -> list[FleetWideDrift]:
    """Return the significant fields, each in the span with most open alarms; most significant first."""
    span = coincidence_span_us(observed)
    fields: dict[str, list[Onset]] = {}
    for onset in onsets:
        if onset.device in observed:
            fields.setdefault(onset.subject, []).append(onset)
    exposure = sum(period.last - period.first for period in observed.values()) / span
    # Chance may produce a coincidence in any field and any span.
    trials = len(fields) * max(1.0, exposure / max(1, len(observed)))
    results = [_detect_field(name, alarms, observed, span, exposure, trials) for name, alarms in fields.items()]
    return sorted((drift for drift in results if drift is not None), key=lambda drift: (drift.p_value, drift.subject))


def is_still_drifting(subject: str, observed: Mapping[str, ObservationPeriod], onsets: Sequence[Onset]) -> bool:
    """Return True while more than half of the necessary share still drifts: the hysteresis of the alert."""
    drifting = {onset.device for onset in onsets if onset.subject == subject and onset.is_open} & observed.keys()
    observable = _observed_devices(observed, _observation_end(observed), coincidence_span_us(observed))
    return 2 * len(drifting) > MIN_SHARE * len(observable)


def _detect_field(
    subject: str,
    onsets: list[Onset],
    observed: Mapping[str, ObservationPeriod],
    span: int,
    exposure: float,
    trials: float,
) -> FleetWideDrift | None:
    open_onsets = sorted((o for o in onsets if o.is_open), key=lambda o: (o.alarmed, o.device))
    if len(open_onsets) < MIN_DRIFTING:
        return None
    times = [onset.alarmed for onset in open_onsets]
    begin, end = max(
        ((i, bisect.bisect_right(times, time + span)) for i, time in enumerate(times)), key=lambda cut: cut[1] - cut[0]
    )
    coincident = open_onsets[begin:end]
    names = tuple(onset.device for onset in coincident)
    device_count = len(_observed_devices(observed, coincident[-1].alarmed, span) | set(names))
    if device_count < MIN_DEVICES or len(names) < max(MIN_DRIFTING, MIN_SHARE * device_count):
        return None
    quiet = max(0.0, exposure - device_count)
    others = sum(1 + onset.earlier_alarms for onset in onsets) - len(names)
    rate = min(1.0, (others + 0.5) / (quiet + 1.0))
    p_value = min(1.0, trials * binomial_tail(len(names), device_count, rate))
    if p_value > SIGNIFICANCE_LEVEL:
        return None
    usual_count = min(1.0, others / quiet) * device_count if quiet >= device_count else None
    since, until = coincident[0].alarmed, coincident[-1].alarmed
    return FleetWideDrift(subject, names, device_count, since, until, span, usual_count, p_value)


def _observation_end(observed: Mapping[str, ObservationPeriod]) -> int:
    """Return the median end of observation: a single wrong clock must not decide it."""
    return int(median(period.last for period in observed.values())) if observed else 0


def _observed_devices(observed: Mapping[str, ObservationPeriod], time_us: int, span: int) -> set[str]:
    return {device for device, p in observed.items() if p.first <= time_us and p.last >= time_us - span}


def binomial_tail(k: int, n: int, p: float) -> float:
    """Return the probability of k or more successes in n trials with probability p."""
    if k <= 0 or k > n:
        return float(k <= 0)
    if p <= 0 or p >= 1:
        return float(p >= 1)
    log_factorial = math.lgamma(n + 1)
    terms = (
        log_factorial - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k, n + 1)
    )
    return min(1.0, sum(map(math.exp, terms)))

"""Fleet-wide drift: a field that moved on so many devices within a while that single sensors are not the reason.

How many is judged by the fleet itself: what share of its devices raises an alarm of that field within such a while.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median

import msgspec

MIN_DEVICES = 4  # fewer are no fleet
MIN_DRIFTING, MIN_SHARE = 3, 1 / 3  # what chance alone forbids may still be two people who changed at once
SIGNIFICANCE_LEVEL = 1e-3  # of chance, over all fields and all the time that is known
# The same change is found by different devices within so many of their windows; never less than an hour.
SPAN_WINDOWS, MIN_SPAN_US = 12, 3_600_000_000


class ObservationPeriod(msgspec.Struct, frozen=True):
    """Since when and until when a device's fields were tested, epoch µs, in how many drift windows."""

    first: int
    last: int
    windows: int = 1

    def with_window(self, t: tuple[int, int]) -> ObservationPeriod:
        return ObservationPeriod(min(self.first, t[0]), max(self.last, t[1]), self.windows + 1)


class Onset(msgspec.Struct, frozen=True):
    """The last alarm of a field at a device: when (epoch µs), whether it goes on, and how many came before it."""

    device: str
    subject: str
    alarmed: int
    is_open: bool
    earlier_alarms: int = 0


class FleetWideDrift(msgspec.Struct, frozen=True):
    """`devices` of `of` raised an alarm of `subject` since `since` (epoch µs), which goes on.

    `usually`: how many of them do within `span_us`, or None where too little time is known. `chance`: the probability
    of so many.
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
        at = datetime.fromtimestamp(self.since / 1e6, UTC)
        known = self.usual_count is not None
        usual = f"usually {self.usual_count:.0f} of {self.device_count}" if known else "what is usual is not known yet"
        moved = (
            f"{self.subject} moved on {len(self.devices)} of {self.device_count} devices since {at:%Y-%m-%d %H:%M} UTC"
        )
        return f"{moved} ({usual}): the fleet's surroundings or its models, not single sensors"


def coincidence_span_us(observed: Mapping[str, ObservationPeriod]) -> int:
    """The while in which devices find the same change."""
    between = [(one.last - one.first) / one.windows for one in observed.values()]
    return max(MIN_SPAN_US, int(SPAN_WINDOWS * median(between))) if between else MIN_SPAN_US


def detect(observed: Mapping[str, ObservationPeriod], onsets: Sequence[Onset]) -> list[FleetWideDrift]:
    """Of each field the span with most alarms that go on, where these are too many for chance; the most first."""
    span = coincidence_span_us(observed)
    fields: dict[str, list[Onset]] = {}
    for onset in onsets:
        if onset.device in observed:
            fields.setdefault(onset.subject, []).append(onset)
    exposure = sum(one.last - one.first for one in observed.values()) / span
    # Chance may strike in any field and at any time.
    places = len(fields) * max(1.0, exposure / max(1, len(observed)))
    found = [_detect_field(subject, of, observed, span, exposure, places) for subject, of in fields.items()]
    return sorted((one for one in found if one is not None), key=lambda one: (one.p_value, one.subject))


def is_still_drifting(subject: str, observed: Mapping[str, ObservationPeriod], onsets: Sequence[Onset]) -> bool:
    """Whether half of what it takes still moves: until then, what was fleet-wide has not ended."""
    moving = {one.device for one in onsets if one.subject == subject and one.is_open and one.device in observed}
    return 2 * len(moving) > MIN_SHARE * len(
        _observed_devices(observed, _observation_end(observed), coincidence_span_us(observed))
    )


def _detect_field(
    subject: str,
    onsets: list[Onset],
    observed: Mapping[str, ObservationPeriod],
    span: int,
    exposure: float,
    places: float,
) -> FleetWideDrift | None:
    going_on = sorted((one for one in onsets if one.is_open), key=lambda one: (one.alarmed, one.device))
    if len(going_on) < MIN_DRIFTING:
        return None
    times = [one.alarmed for one in going_on]
    begin, end = max(
        ((i, bisect.bisect_right(times, at + span)) for i, at in enumerate(times)), key=lambda cut: cut[1] - cut[0]
    )
    moved = going_on[begin:end]
    of = _observed_devices(observed, moved[-1].alarmed, span) | {one.device for one in moved}
    if len(of) < MIN_DEVICES or len(moved) < max(MIN_DRIFTING, MIN_SHARE * len(of)):
        return None
    quiet = max(0.0, exposure - len(of))
    others = sum(1 + one.earlier_alarms for one in onsets) - len(moved)
    chance = min(1.0, places * binomial_tail(len(moved), len(of), min(1.0, (others + 0.5) / (quiet + 1.0))))
    if chance > SIGNIFICANCE_LEVEL:
        return None
    usually = min(1.0, others / quiet) * len(of) if quiet >= len(of) else None
    names = tuple(one.device for one in moved)
    return FleetWideDrift(subject, names, len(of), moved[0].alarmed, moved[-1].alarmed, span, usually, chance)


def _observation_end(observed: Mapping[str, ObservationPeriod]) -> int:
    """Until when the fleet was watched; one wrong clock does not tell."""
    return int(median(one.last for one in observed.values())) if observed else 0


def _observed_devices(observed: Mapping[str, ObservationPeriod], time_us: int, span: int) -> set[str]:
    return {device for device, one in observed.items() if one.first <= time_us and one.last >= time_us - span}


def binomial_tail(k: int, n: int, p: float) -> float:
    """Probability of k or more of n, each with probability p: the binomial's tail."""
    if k <= 0 or k > n:
        return float(k <= 0)
    if p <= 0 or p >= 1:
        return float(p >= 1)
    whole = math.lgamma(n + 1)
    terms = (
        whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k, n + 1)
    )
    return min(1.0, sum(map(math.exp, terms)))

"""What a fleet's tallies say of a new bundle against the old one, each rule as an interval. Pure.

A device is one cluster: its windows are alike, whatever their number, so that each device counts the same and none can
outvote the others by saying more. Of one device its messages are what is compared. Intervals are 95 % of Student's t
over clusters, for shares no narrower than Wilson's (1927) over what may count as independent: what never varied here
may vary yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agent.drift.intervals import wilson
from agent.fleet.rollout.plan import Promotion
from agent.wire.messages import Answered, Moments, Shadow

State = Literal["good", "bad", "open"]
Blocks = Mapping[str, Sequence[Shadow]]
# Fewer messages of one device than this say nothing of how much they vary.
FEWEST_BLOCKS = 5
# So many neighbouring windows count as one: as of an AR(1) process with correlation 0.9, the most that is usual.
ALIKE = 19
# Labels of fewer windows leave the estimate in its place.
FEWEST_LABELLED = 30
# Student's t, 97.5 %, for 1 to 30 degrees of freedom; above, the normal distribution's is near enough.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule: its number with its interval, None where there is too little to say it."""

    rule: str
    state: State
    limit: float
    value: float | None
    low: float | None
    high: float | None
    blocks: int
    devices: int
    words: str

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Sums:
    """Both sides of one device or message, new and old."""

    n: int
    same: int | None
    new: Answered
    old: Answered
    labelled: int
    right: tuple[int, int]
    blocks: int


def compare(blocks: Blocks, promote: Promotion, *, beside: bool) -> list[Finding]:
    """Every rule that is asked. `beside`: the new bundle is the one beside, else the one whose results count."""
    clusters = [[_sums([one], beside) for one in of_device] for of_device in blocks.values()]
    found = []
    if promote.agreement is not None:
        found.append(_finding("agreement", promote.agreement, clusters, _agreement, least=True, share=True))
    if promote.slower is not None:
        found.append(_finding("slower", promote.slower, clusters, _slower, back=math.exp))
    if promote.accuracy_drop is not None:
        labelled = sum(one.labelled for of_device in clusters for one in of_device) >= FEWEST_LABELLED
        rule = "accuracy drop by labels" if labelled else "estimated accuracy drop"
        found.append(_finding(rule, promote.accuracy_drop, clusters, _dropped if labelled else _estimated))
    if promote.error_growth is not None:
        found.append(_finding("error growth", promote.error_growth, clusters, _growth, back=lambda x: math.exp(x) - 1))
    return found


def _finding(
    rule: str,
    limit: float,
    clusters: Sequence[Sequence[_Sums]],
    value: Callable[[_Sums], float | None],
    *,
    least: bool = False,
    share: bool = False,
    back: Callable[[float], float] = lambda x: x,
) -> Finding:
    """`value` of a cluster is on the scale where means are taken, `back` gives it as people say it."""
    merged = [_merged(of_device) for of_device in clusters]
    units = merged if len(merged) != 1 else list(clusters[0])
    known = [(one, said) for one in units if (said := value(one)) is not None]
    devices = sum(value(one) is not None for one in merged)
    blocks = sum(one.blocks for one, _ in known)
    alone = max(blocks, sum(one.n for one, _ in known) / ALIKE) if share else 0.0
    interval = _interval([said for _, said in known], FEWEST_BLOCKS if len(merged) == 1 else 2, alone)
    if interval is None:
        words = f"{rule} not known yet over {blocks} blocks of {devices} devices"
        return Finding(rule, "open", limit, None, None, None, blocks, devices, words)
    mean, low, high = (back(one) for one in interval)
    good, bad = (low >= limit, high < limit) if least else (high <= limit, low > limit)
    asked = f"at least {limit:g}" if least else f"at most {limit:g}"
    state: State = "good" if good else "bad" if bad else "open"
    words = f"{rule} {mean:.3f} [{low:.3f}, {high:.3f}] over {blocks} blocks of {devices} devices ({asked}: {state})"
    return Finding(rule, state, limit, round(mean, 6), round(low, 6), round(high, 6), blocks, devices, words)


def _interval(values: Sequence[float], fewest: int, share_of: float) -> tuple[float, float, float] | None:
    """Mean, low and high of the mean of clusters; None of too few. `share_of`: how many things it is a share of."""
    n = len(values)
    if n < fewest:
        return None
    found = np.array(values, np.float64)
    mean = float(found.mean())
    half = _t(n - 1) * float(found.std(ddof=1)) / math.sqrt(n)
    low, high = mean - half, mean + half
    if share_of:
        least, most = wilson(mean, share_of)
        low, high = max(0.0, min(low, least)), min(1.0, max(high, most))
    return mean, low, high


def _t(freedom: int) -> float:
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom


def _agreement(sums: _Sums) -> float | None:
    return sums.same / sums.n if sums.same is not None and sums.n else None


def _slower(sums: _Sums) -> float | None:
    """Logarithm of the ratio."""
    if not (sums.new.windows and sums.old.windows and sums.new.seconds > 0 and sums.old.seconds > 0):
        return None
    return math.log((sums.new.seconds / sums.new.windows) / (sums.old.seconds / sums.old.windows))


def _dropped(sums: _Sums) -> float | None:
    return (sums.right[1] - sums.right[0]) / sums.labelled if sums.labelled else None


def _estimated(sums: _Sums) -> float | None:
    return sums.old.expected.mean - sums.new.expected.mean if sums.new.expected.n and sums.old.expected.n else None


def _growth(sums: _Sums) -> float | None:
    """Logarithm of the ratio of mean absolute errors."""
    new, old = sums.new.off, sums.old.off
    return math.log(new.mean / old.mean) if new.n and old.n and new.mean > 0 and old.mean > 0 else None


def _sums(blocks: Iterable[Shadow], beside: bool) -> _Sums:
    [one] = blocks
    both, model_only, beside_only, _ = one.labelled
    right = (both + beside_only, both + model_only)
    new, old = one.answered_beside, one.answered
    if not beside:
        new, old, right = old, new, right[::-1]
    return _Sums(one.n, one.same, new, old, sum(one.labelled), right, 1)


def _merged(parts: Sequence[_Sums]) -> _Sums:
    known = [one for one in parts if one.same is not None]
    return _Sums(
        sum(one.n for one in (known or parts)),
        sum(one.same or 0 for one in known) if known else None,
        _answered([one.new for one in parts]),
        _answered([one.old for one in parts]),
        sum(one.labelled for one in parts),
        (sum(one.right[0] for one in parts), sum(one.right[1] for one in parts)),
        len(parts),
    )


def _answered(parts: Sequence[Answered]) -> Answered:
    return Answered(
        sum(one.windows for one in parts),
        sum(one.seconds for one in parts),
        expected=_mean([one.expected for one in parts]),
        off=_mean([one.off for one in parts]),
    )


def _mean(parts: Sequence[Moments]) -> Moments:
    n = sum(one.n for one in parts)
    return Moments(n, sum(one.n * one.mean for one in parts) / n) if n else Moments()

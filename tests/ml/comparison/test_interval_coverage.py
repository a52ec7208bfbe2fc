"""Coverage of the 95 % intervals of bundle comparison, on blocks whose truth is known.

Each window has a strain in [0, 1] that affects both bundles and harms the candidate: in bursts, in slow drift, or by
device. All estimates are linear in the strain, so its mean gives every true value. The bounds are the figures of
docs/internals/comparing.md, widened for the small number of repetitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.device.rollout.shadow import batches_per_message, merge_neighbours
from outstation.ml.comparison import paired_intervals, tally
from outstation.ml.comparison.paired_intervals import ComparisonBlock, ComparisonEstimate
from outstation.ml.comparison.tally import ComparisonStats
from outstation.protocol.wire.messages import BundleStats

Floats = NDArray[np.float64]
# Blocks, and the mean strain that their intervals should contain.
Blocks = Callable[[np.random.Generator], tuple[list[ComparisonBlock], float]]
REPEATS = 100
# Windows of a batch; the mean strain over all time and devices.
WINDOWS, STRAIN = 20, 0.15
CALM_LABELS, STRAINED_LABELS = np.array([0.9, 0.03, 0.03, 0.04]), np.array([0.3, 0.5, 0.1, 0.1])
TRUTHS: dict[str, Callable[[float], float]] = {
    "agreement": lambda strain: 0.96 - 0.56 * strain,
    "slowness": lambda strain: 2 + strain,
    "labelled gain": lambda strain: -0.4 * strain,
    "expected gain": lambda strain: -0.3 * strain,
    "error growth": lambda strain: 1 + strain,
}
ESTIMATES: dict[str, Callable[[Sequence[ComparisonBlock]], ComparisonEstimate | None]] = {
    "agreement": paired_intervals.agreement,
    "slowness": lambda blocks: paired_intervals.latency_ratio(blocks, new_is_other=True),
    "labelled gain": lambda blocks: paired_intervals.labelled_accuracy_gain(blocks, new_is_other=True),
    "expected gain": lambda blocks: paired_intervals.expected_accuracy_gain(blocks, new_is_other=True),
    "error growth": lambda blocks: paired_intervals.error_ratio(blocks, new_is_other=True),
}
REPEATED = ("agreement", "labelled gain", "expected gain")


def draw_bursts(random: np.random.Generator, length: float, share: float, windows: int) -> Floats:
    """Return strain (windows,) that is 1 in bursts of mean length `length`, with the required share of time."""
    length = max(length, 1.0, share / (1 - share))
    means = (max(1.0, length * (1 - share) / share), length)
    state, flags, filled = bool(random.random() < share), [], 0
    while filled < windows:
        stays = int(random.geometric(1 / means[state]))
        flags.append(np.full(stays, float(state)))
        filled, state = filled + stays, not state
    return np.concatenate(flags)[:windows]


def draw_drift(random: np.random.Generator, step: float, windows: int) -> Floats:
    """Return strain (windows,) as a random walk between 0 and twice the mean; `step` is per WINDOWS windows."""
    width = 2 * STRAIN
    walk = np.mod(
        random.uniform(0, 2 * width) + np.cumsum(random.normal(0, step / np.sqrt(WINDOWS), windows)), 2 * width
    )
    return np.minimum(walk, 2 * width - walk)


def draw_batches(random: np.random.Generator, strain: Floats) -> list[ComparisonStats]:
    """Return the statistics of each WINDOWS windows."""
    return [draw_batch(random, strain[i : i + WINDOWS]) for i in range(0, len(strain), WINDOWS)]


def draw_batch(random: np.random.Generator, strain: Floats) -> ComparisonStats:
    n = len(strain)
    agreeing = int((random.random(n) < 0.96 - 0.56 * strain).sum())
    # A busy processor slows a batch down.
    slowness, other_slowness = np.exp(random.normal(-0.02, 0.2, 2))
    labelled_part = strain[::2]
    shares = CALM_LABELS + np.outer(labelled_part, STRAINED_LABELS - CALM_LABELS)
    both, model_only, other_only, neither = random.multinomial(1, shares).sum(axis=0).tolist()
    errors = random.exponential(1, (2, len(labelled_part)))
    expected = np.clip(random.normal(0, 0.05, (2, n)), -0.1, 0.1) + 0.9
    model = BundleStats(
        n,
        0.001 * n * float(slowness),
        expected_accuracy=tally.compute_moments(expected[0]),
        abs_error=tally.compute_moments(errors[0]),
    )
    other = BundleStats(
        n,
        0.001 * float((2 + strain).sum() * other_slowness),
        expected_accuracy=tally.compute_moments(expected[1] - 0.3 * strain),
        abs_error=tally.compute_moments(errors[1] * (1 + labelled_part)),
    )
    return ComparisonStats(1, n, agreeing, tally.EMPTY_MOMENTS, model, other, (both, model_only, other_only, neither))


def to_blocks(batches: Sequence[ComparisonStats], device: str = "") -> list[ComparisonBlock]:
    return [ComparisonBlock(batch, device) for batch in batches]


def bursts(length: float, messages: int) -> Blocks:
    def make(random: np.random.Generator) -> tuple[list[ComparisonBlock], float]:
        strain = draw_bursts(random, length * WINDOWS, STRAIN, messages * WINDOWS)
        return to_blocks(draw_batches(random, strain)), STRAIN

    return make


def drift(random: np.random.Generator) -> tuple[list[ComparisonBlock], float]:
    """Return 60 blocks; the truth is the strain of the compared time, not of the long run."""
    strain = draw_drift(random, 0.04, 60 * WINDOWS)
    return to_blocks(draw_batches(random, strain)), float(strain.mean())


def devices(count: int) -> Blocks:
    """Return ten blocks of each device with a strain of its own.

    From MIN_DEVICES devices on, the truth is that of all devices.
    """

    def make(random: np.random.Generator) -> tuple[list[ComparisonBlock], float]:
        levels = random.beta(3.0, 3.0 / STRAIN - 3.0, count)
        blocks = [
            block
            for i, level in enumerate(levels.tolist())
            for block in to_blocks(
                draw_batches(random, draw_bursts(random, WINDOWS, level, 10 * WINDOWS)), device=f"pi-{i}"
            )
        ]
        return blocks, STRAIN if count >= paired_intervals.MIN_DEVICES else float(levels.mean())

    return make


def coverage(draw: Blocks) -> dict[str, tuple[float, float]]:
    """Return, per estimate, the shares of intervals that contain the truth, and that lie on its bad side."""
    inside, bad = dict.fromkeys(TRUTHS, 0), dict.fromkeys(TRUTHS, 0)
    for i in range(REPEATS):
        blocks, strain = draw(np.random.default_rng([11, i]))
        for name, truth in TRUTHS.items():
            estimate, expected = ESTIMATES[name](blocks), truth(strain)
            assert estimate is not None, name
            inside[name] += estimate.low <= expected <= estimate.high
            bad[name] += estimate.low > expected if name in ("slowness", "error growth") else estimate.high < expected
    return {name: (inside[name] / REPEATS, bad[name] / REPEATS) for name in TRUTHS}


def highest_bounds(random: np.random.Generator, batches: int) -> dict[str, list[float]]:
    """Return the upper bounds at each of 100 messages of a device; a bound below a limit rejects the bundle."""
    ends = list(accumulate(batches_per_message(i, batches) for i in range(100)))
    stats = draw_batches(random, draw_bursts(random, 2 * WINDOWS, STRAIN, ends[-1] * WINDOWS))
    bounds: dict[str, list[float]] = {name: [] for name in REPEATED}
    for blocks in device_states(stats, ends, batches):
        for name in REPEATED:
            if (estimate := ESTIMATES[name](blocks)) is not None:
                bounds[name].append(estimate.high)
    return bounds


def device_states(stats: list[ComparisonStats], ends: list[int], batches: int) -> Iterator[list[ComparisonBlock]]:
    """Return the blocks of a device after each of its messages, from the minimum number of batches on."""
    retained: list[ComparisonStats] = []
    for begin, end in pairwise([0, *ends]):
        retained = merge_neighbours([*retained, sum(stats[begin:end], ComparisonStats())])
        if end >= batches:
            yield to_blocks(retained)


def test_the_truth_is_what_the_blocks_show_in_the_long_run() -> None:
    random = np.random.default_rng(3)
    blocks = to_blocks(draw_batches(random, draw_bursts(random, 2.0, STRAIN, 40_000)))
    for name, compute in ESTIMATES.items():
        estimate = compute(blocks)
        assert estimate is not None
        assert estimate.low <= TRUTHS[name](STRAIN) <= estimate.high, name
        assert estimate.high - estimate.low < 0.1, name


@pytest.mark.parametrize(
    ("draw", "least"),
    [
        pytest.param(bursts(0.2, 20), 0.95, id="short bursts"),
        pytest.param(bursts(1.0, 20), 0.85, id="bursts one message long"),
        pytest.param(drift, 0.95, id="drift"),
        pytest.param(devices(2), 0.82, id="2 devices"),
        pytest.param(devices(5), 0.87, id="5 devices"),
    ],
)
def test_intervals_contain_the_truth_as_often_as_documented(draw: Blocks, least: float) -> None:
    shares = coverage(draw)
    assert {name for name, (inside, _) in shares.items() if inside < least} == set()
    assert max(bad for _, bad in shares.values()) <= 0.06


def test_bursts_longer_than_the_comparison_are_missed_as_documented() -> None:
    assert coverage(bursts(8.0, 12))["agreement"][0] < 0.7


def test_a_bundle_five_points_above_its_limit_is_rejected_by_no_evaluation() -> None:
    for i in range(6):
        for name, bounds in highest_bounds(np.random.default_rng([5, i]), 20).items():
            assert min(bounds) >= TRUTHS[name](STRAIN) - 0.05, name
    # A clearly bad bundle is rejected.
    assert all(
        min(bounds) < TRUTHS[name](STRAIN) + 0.1
        for name, bounds in highest_bounds(np.random.default_rng(1), 20).items()
    )

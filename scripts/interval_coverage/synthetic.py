"""Synthetic blocks of two bundles with known truth: disagreement in bursts, in slow drift, or by device.

Each window has a strain in [0, 1] that affects both bundles and harms the candidate. All estimates are linear in the
strain, so its mean gives every true value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.comparison import paired_intervals, tally
from agent.comparison.paired_intervals import ComparisonBlock, ComparisonEstimate
from agent.comparison.tally import ComparisonStats
from agent.wire.messages import BundleStats

Floats = NDArray[np.float64]
# Windows of a batch; the mean strain over all time and devices.
WINDOWS, STRAIN = 20, 0.15
_LABELLED_CALM, _LABELLED_HURT = np.array([0.9, 0.03, 0.03, 0.04]), np.array([0.3, 0.5, 0.1, 0.1])
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


@dataclass(frozen=True)
class Case:
    """Generator of blocks; `make` returns the blocks and the mean strain that their intervals should contain."""

    name: str
    make: Callable[[np.random.Generator], tuple[list[ComparisonBlock], float]]


def cases() -> Iterator[Case]:
    for length in (0.2, 1.0, 3.0, 8.0):
        for count in (12, 20, 60, 150)[: 4 if length >= 3 else 3]:
            yield Case(f"bursts {length:g} messages long, {count} messages", _bursts(length, count))
    for step in (0.01, 0.04):
        for count in (20, 60):
            yield Case(f"drift of {step:g} a message, {count} messages", _drift(step, count))
        name = f"drift of {step:g} a message, 60 messages, for the time compared"
        yield Case(name, _drift(step, 60, now=True))
    for devices in (2, 5, 10):
        for count in (10, 40):
            yield Case(f"{devices} devices, {count} messages each", _devices(devices, count))


def bursts(random: np.random.Generator, length: float, share: float, windows: int) -> Floats:
    """Return strain (windows,) that is 1 in bursts of mean length `length`, with the required share of time."""
    length = max(length, 1.0, share / (1 - share))
    means = (max(1.0, length * (1 - share) / share), length)
    state, flags, filled = bool(random.random() < share), [], 0
    while filled < windows:
        stays = int(random.geometric(1 / means[state]))
        flags.append(np.full(stays, float(state)))
        filled, state = filled + stays, not state
    return np.concatenate(flags)[:windows]


def drift(random: np.random.Generator, step: float, windows: int) -> Floats:
    """Return strain (windows,) as a random walk between 0 and twice the mean; `step` is per WINDOWS windows."""
    width = 2 * STRAIN
    steps = random.normal(0, step / np.sqrt(WINDOWS), windows)
    walk = np.mod(random.uniform(0, 2 * width) + np.cumsum(steps), 2 * width)
    return np.minimum(walk, 2 * width - walk)


def comparison_blocks(random: np.random.Generator, strain: Floats, device: str = "") -> list[ComparisonBlock]:
    """Return one block per WINDOWS windows."""
    return [ComparisonBlock(batch, device) for batch in batches(random, strain)]


def batches(random: np.random.Generator, strain: Floats) -> list[ComparisonStats]:
    return [_batch(random, strain[i : i + WINDOWS]) for i in range(0, len(strain), WINDOWS)]


def _batch(random: np.random.Generator, strain: Floats) -> ComparisonStats:
    n = len(strain)
    same = int((random.random(n) < 0.96 - 0.56 * strain).sum())
    # A busy processor slows a batch down.
    ours, theirs = np.exp(random.normal(-0.02, 0.2, 2))
    labelled_part = strain[::2]
    labelled = random.multinomial(1, _mixed(labelled_part)).sum(axis=0)
    off = random.exponential(1, (2, len(labelled_part)))
    expected = np.clip(random.normal(0, 0.05, (2, n)), -0.1, 0.1) + 0.9
    model = BundleStats(
        n,
        0.001 * n * float(ours),
        expected_accuracy=tally.compute_moments(expected[0]),
        abs_error=tally.compute_moments(off[0]),
    )
    other_stats = BundleStats(
        n,
        0.001 * float((2 + strain).sum() * theirs),
        expected_accuracy=tally.compute_moments(expected[1] - 0.3 * strain),
        abs_error=tally.compute_moments(off[1] * (1 + labelled_part)),
    )
    both, model_only, other_only, neither = (int(count) for count in labelled)
    return ComparisonStats(1, n, same, tally.EMPTY_MOMENTS, model, other_stats, (both, model_only, other_only, neither))


def _mixed(strain: Floats) -> Floats:
    mixed: Floats = _LABELLED_CALM + np.outer(strain, _LABELLED_HURT - _LABELLED_CALM)
    return mixed


def _bursts(length: float, count: int) -> Callable[[np.random.Generator], tuple[list[ComparisonBlock], float]]:
    def make(random: np.random.Generator) -> tuple[list[ComparisonBlock], float]:
        return comparison_blocks(random, bursts(random, length * WINDOWS, STRAIN, count * WINDOWS)), STRAIN

    return make


def _drift(
    step: float, count: int, *, now: bool = False
) -> Callable[[np.random.Generator], tuple[list[ComparisonBlock], float]]:
    """Return blocks whose truth is the strain of the observed time (`now`), not of the long run."""

    def make(random: np.random.Generator) -> tuple[list[ComparisonBlock], float]:
        strain = drift(random, step, count * WINDOWS)
        return comparison_blocks(random, strain), float(strain.mean()) if now else STRAIN

    return make


def _devices(devices: int, count: int) -> Callable[[np.random.Generator], tuple[list[ComparisonBlock], float]]:
    """Return blocks of devices with individual strain; at FEWEST or more the truth is that of all devices."""

    def make(random: np.random.Generator) -> tuple[list[ComparisonBlock], float]:
        levels = random.beta(3.0, 3.0 / STRAIN - 3.0, devices)
        blocks = [
            block
            for i, level in enumerate(levels.tolist())
            for block in comparison_blocks(random, bursts(random, WINDOWS, level, count * WINDOWS), f"pi-{i}")
        ]
        return blocks, STRAIN if devices >= paired_intervals.MIN_DEVICES else float(levels.mean())

    return make

"""Interval coverage and verdicts on bundles with known truth: a part of `scripts/coverage`.

Bounds are those of docs/comparing.md, widened for the small number of repetitions.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from agent.comparison.paired_intervals import ComparisonBlock
from scripts.interval_coverage import looks, recorded, synthetic
from scripts.interval_coverage.__main__ import interval_coverage
from scripts.interval_coverage.synthetic import ESTIMATES, STRAIN, TRUTHS

CASES = {case.name: case for case in synthetic.cases()}
REPEATS = 100


def counted(name: str, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    def drawn(random: np.random.Generator) -> tuple[list[ComparisonBlock], dict[str, float]]:
        blocks, strain = CASES[name].make(random)
        return blocks, {estimate: truth(strain) for estimate, truth in TRUTHS.items()}

    return interval_coverage(drawn, 11, repeats)


def test_what_is_said_of_the_strain_is_what_the_blocks_show_in_the_long_run() -> None:
    random = np.random.default_rng(3)
    blocks = synthetic.comparison_blocks(random, synthetic.bursts(random, 2.0, STRAIN, 40_000))
    for name, estimate in ESTIMATES.items():
        found = estimate(blocks)
        assert found is not None
        assert found.low <= TRUTHS[name](STRAIN) <= found.high, name
        assert found.high - found.low < 0.1, name


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("bursts 0.2 messages long, 20 messages", 0.95),
        ("bursts 1 messages long, 20 messages", 0.85),
        ("drift of 0.04 a message, 60 messages, for the time compared", 0.95),
        ("2 devices, 10 messages each", 0.82),
        ("5 devices, 10 messages each", 0.87),
    ],
)
def test_intervals_hold_the_truth_as_often_as_the_documentation_says(name: str, least: float) -> None:
    coverage = counted(name)
    assert set(coverage) == set(TRUTHS)
    assert {estimate for estimate, shares in coverage.items() if shares["held"] < least} == set()
    assert max(shares["bad"] for shares in coverage.values()) <= 0.06


def test_bursts_longer_than_what_was_compared_are_not_seen_and_the_documentation_does_not_hide_it() -> None:
    assert counted("bursts 8 messages long, 12 messages")["agreement"]["held"] < 0.7


def test_a_bundle_five_points_better_than_its_limit_is_seldom_called_bad_at_any_look() -> None:
    found = looks.measured("bursts 2 batches long", 5, 6, 20)
    assert {name: shares[-1][-1] == 0 for name, shares in found.items()} == dict.fromkeys(looks.LOOKED_AT, True)
    # A clearly bad bundle is detected each time.
    lowest = looks.lowest_high(np.random.default_rng(1), "bursts 2 batches long", 20)
    assert all(high < TRUTHS[name](STRAIN) + 0.1 for name, (_, high) in lowest.items())


@pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="models are rigged with the schema of ai-edge-litert"
)
def test_over_the_recordings_agreement_is_held_as_often_as_the_documentation_says() -> None:
    drawn, truths = recorded.cases()["recordings, scaled, 24 windows a message, 20 messages"]
    assert 0.5 < truths["agreement"] < 0.99
    found = interval_coverage(lambda random: (drawn(random), truths), 11, REPEATS)
    assert found["agreement"]["held"] >= 0.88


def test_the_script_says_what_it_counted_and_the_same_seed_says_the_same() -> None:
    name = "5 devices, 10 messages each"
    command = [
        sys.executable,
        "-m",
        "scripts.interval_coverage",
        "--repeats",
        "3",
        "--seed",
        "11",
        "--only",
        name,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    [case] = json.loads(done.stdout)["covered"]
    assert case == {"case": name, **counted(name, 3)}

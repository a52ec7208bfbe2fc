"""Command `scripts/coverage`: recompute the coverage figures of docs/comparing.md."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import numpy as np

from agent.comparison.paired_intervals import ComparisonBlock
from scripts.interval_coverage import looks, recorded, synthetic
from scripts.interval_coverage.synthetic import ESTIMATES, TRUTHS, Case

Drawn = Callable[[np.random.Generator], tuple[list[ComparisonBlock], dict[str, float]]]


@click.command()
@click.option(
    "--repeats", default=400, show_default=True, help="Repetitions per case; a quarter of them for repeated looks."
)
@click.option("--seed", default=1, show_default=True, help="Seed; equal seeds yield equal figures.")
@click.option("--only", default="", help="Run only cases whose name contains this text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(repeats: int, seed: int, only: str, as_json: bool) -> None:
    """Count how often 95 % intervals contain the truth. Example: scripts/coverage --repeats 100 --only recordings."""
    announce = (lambda line: None) if as_json else click.echo
    announce("held / called bad at its limit / without interval, of all; mean width")
    covered = []
    for name, drawn in _cases():
        if only in name:
            covered.append({"case": name, **interval_coverage(drawn, seed, repeats)})
            announce(f"{name}\n" + "\n".join(_line(*item) for item in covered[-1].items() if item[0] != "case"))
    announce(
        f"called bad at the first and any look at {looks.MESSAGES} messages, better than the limit by {looks.MARGINS}"
    )
    looked = []
    for strain, batches in itertools.product(looks.STRAINS, looks.BATCHES):
        name = f"{strain}, judged from {batches} batches on"
        if only in name:
            looked.append({"case": name, **looks.measured(strain, seed, max(1, repeats // 4), batches)})
            announce(
                f"{name}\n" + "\n".join(f"    {key:15}{value}" for key, value in looked[-1].items() if key != "case")
            )
    if as_json:
        document = {"seed": seed, "repeats": repeats, "margins": looks.MARGINS, "covered": covered, "looked": looked}
        click.echo(json.dumps(document, indent=2))


def interval_coverage(drawn: Drawn, seed: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return, per estimate, the shares of intervals with the truth inside, below it, or not given, and the mean width.

    An interval below the truth rejects a bundle for a metric with a lower limit. For a metric with an upper limit,
    intervals above the truth count.
    """
    intervals: dict[str, list[tuple[float, float, float]]] = {}
    nothing: dict[str, int] = {}
    for i in range(repeats):
        blocks, truths = drawn(np.random.default_rng([seed, i]))
        for name, truth in truths.items():
            estimate = ESTIMATES[name](blocks)
            if estimate is None:
                nothing[name] = nothing.get(name, 0) + 1
            else:
                intervals.setdefault(name, []).append((estimate.low - truth, estimate.high - truth, _worse(name)))
    return {name: _shares(bounds, nothing.get(name, 0) / repeats) for name, bounds in intervals.items()}


def _worse(name: str) -> float:
    return 1.0 if name in ("slowness", "error growth") else -1.0


def _shares(bounds: Sequence[tuple[float, float, float]], without: float) -> dict[str, float]:
    low, high, worse = np.array(bounds).T
    bad = np.where(worse > 0, low > 0, high < 0)
    figures = {"held": np.mean((low <= 0) & (high >= 0)), "bad": np.mean(bad), "width": np.mean(high - low)}
    return {**{name: round(float(value), 3) for name, value in figures.items()}, "without": round(without, 3)}


def _line(name: str, result: Any) -> str:
    return f"    {name:15}{result['held']:6.3f}{result['bad']:7.3f}{result['without']:7.3f}   {result['width']:.3f}"


def _cases() -> Iterator[tuple[str, Drawn]]:
    for case in synthetic.cases():
        yield case.name, _drawn(case)
    for name, (drawn, truths) in recorded.cases().items():
        yield name, _of_recordings(drawn, truths)


def _of_recordings(drawn: Callable[[np.random.Generator], list[ComparisonBlock]], truths: dict[str, float]) -> Drawn:
    return lambda random: (drawn(random), truths)


def _drawn(case: Case) -> Drawn:
    def drawn(random: np.random.Generator) -> tuple[list[ComparisonBlock], dict[str, float]]:
        blocks, strain = case.make(random)
        return blocks, {name: truth(strain) for name, truth in TRUTHS.items()}

    return drawn


if __name__ == "__main__":
    main()

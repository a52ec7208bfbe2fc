"""Trials: share of detected poisonings, of their windows that findings name, and of clean sets that are accused."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.ml.poisoning.inspect import inspect
from outstation.ml.poisoning.labelled_windows import LabelledWindows
from scripts.poisoning import attacks
from scripts.poisoning.attacks import Attack

HONEST_NOISE = 0.05
_SAMPLED_SHARE = 0.8


class TrialResult(msgspec.Struct, frozen=True):
    """`hits` of `trials` sets have a finding of the attack's checks; `precision` is the poisoned share of its rows.

    `recall` is the share of the poisoned windows that findings name, both means over the hits.
    """

    trials: int
    hits: int
    precision: float
    recall: float


def try_attack(windows: LabelledWindows, attack: Attack, seeds: range) -> TrialResult:
    hits, precision, recall = 0, [], []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        poisoned, mask = attack.poison(subsample(windows, draw), draw)
        truth = {poisoned.names[i] for i in np.flatnonzero(mask).tolist()}
        named = {row for each in inspect(poisoned).findings if each.check in attack.checks for row in each.rows}
        if named & truth:
            hits += 1
            precision.append(len(named & truth) / len(named))
            recall.append(len(named & truth) / len(truth))
    return TrialResult(len(seeds), hits, *(float(np.mean(each)) if each else 0.0 for each in (precision, recall)))


def accuse_clean(windows: LabelledWindows, seeds: range) -> Iterator[tuple[int, str]]:
    """Yield (seed, finding) of sets without poison: the first of each pair as it is, the second with honest noise."""
    for seed in seeds:
        draw = np.random.default_rng(seed)
        chosen = subsample(windows, draw)
        noisy, _ = attacks.flip_any(HONEST_NOISE).poison(chosen, draw)
        labeller = np.char.add("labeller-", draw.integers(0, attacks.LABELLERS, len(chosen)).astype(np.str_))
        for each in (chosen, noisy):
            report = inspect(replace(each, providers={**each.providers, "labeller": labeller}))
            yield seed, "; ".join(f"{each.check} {each.subject}" for each in report.findings)


def subsample(windows: LabelledWindows, draw: np.random.Generator) -> LabelledWindows:
    """Return four fifths of the windows, so that seeds are different sets."""
    return windows.select(np.sort(draw.choice(len(windows), round(_SAMPLED_SHARE * len(windows)), replace=False)))

"""Devices and labellers whose labels contradict those of the others more than chance and the others' spread explain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.poisoning import neighbours
from outstation.ml.poisoning.findings import MIN_COUNT, Check, Finding, bound_share, name_rows
from outstation.ml.poisoning.labelled_windows import LabelledWindows
from outstation.ml.poisoning.neighbours import Candidates

# With fewer, nobody can tell which of them is wrong.
MIN_PROVIDERS = 4
MIN_WINDOWS = 20
_MIN_EXCESS = 0.10
# Robust deviations (1.4826 · MAD) of the others' shares.
_MAX_DEVIATIONS = 4.0
_DEPTH = 0.25
_MAX_PROVIDERS = 1000


class Provider(msgspec.Struct, frozen=True):
    """Share of `n` labels of a device or labeller that contradict the others' labels of such windows, with bounds."""

    kind: str
    name: str
    n: int
    share: float
    low: float
    high: float


def measure(
    kind: str, windows: LabelledWindows, features: Float32s, candidates: Candidates
) -> tuple[list[Provider], list[Finding]]:
    """Compare each provider's labels with the surroundings that all others' labels give."""
    names, code = np.unique(windows.providers[kind], return_inverse=True)
    counts = bincount(code, minlength=len(names))
    if (counts >= MIN_WINDOWS).sum() < MIN_PROVIDERS or len(names) > _MAX_PROVIDERS:
        return [], []
    code = code.astype(np.int64)
    shares = neighbours.estimate_shares(features, windows.label, code, candidates, len(windows.labels))
    best, confident = neighbours.confident_classes(shares, windows.label, _DEPTH)
    contradicts = best != windows.label
    judged = []
    for i, name in enumerate(names.tolist()):
        own = np.flatnonzero(confident & (code == i))
        if len(own) >= MIN_WINDOWS:
            judged.append((Provider(kind, str(name), len(own), *bound_share(contradicts[own], len(names))), own))
    measured = [provider for provider, _ in judged]
    return measured, list(_find_departures(kind, windows, measured, [own[contradicts[own]] for _, own in judged]))


def explain_omission(kind: str, windows: LabelledWindows, measured: list[Provider]) -> str:
    """Return why the providers were not compared, "" if they were."""
    if (count := len(np.unique(windows.providers[kind]))) > _MAX_PROVIDERS:
        return f"{kind}s are not compared: there are {count}, a comparison takes at most {_MAX_PROVIDERS}"
    if len(measured) < MIN_PROVIDERS:
        return f"{kind}s are not compared: a comparison takes {MIN_PROVIDERS} with {MIN_WINDOWS} labels each"
    return ""


def _find_departures(
    kind: str, windows: LabelledWindows, measured: list[Provider], contradicting: list[Ints]
) -> Iterator[Finding]:
    if len(measured) < MIN_PROVIDERS:
        return
    shares = np.array([provider.share for provider in measured])
    for i, provider in enumerate(measured):
        others = np.delete(shares, i)
        usual = float(np.median(others))
        spread = 1.4826 * float(np.median(np.abs(others - usual)))
        limit = usual + max(_MIN_EXCESS, _MAX_DEVIATIONS * spread)
        if provider.low < limit or len(contradicting[i]) < MIN_COUNT:
            continue
        given = bincount(windows.label[contradicting[i]], minlength=len(windows.labels))
        most = windows.labels[int(given.argmax())]
        summary = (
            f"{provider.share:.0%} ({provider.low:.0%} to {provider.high:.0%}) of its {provider.n} labels contradict "
            f"others' labels of such windows, {usual:.0%} of the others' do; they say mostly {most}"
        )
        rows = name_rows(windows.names, contradicting[i])
        yield Finding(
            cast(Check, kind), provider.name, summary, len(contradicting[i]), provider.share, provider.low,
            provider.high, rows,
        )  # fmt: skip

"""What each field is worth: permutation importance (Breiman 2001; Fisher, Rudin, Dominici 2019), by whole windows.

A field's rows in a window are replaced by those of another window, so that its own course stays what it was. Fields of
one unit are also replaced together: of two that say the same, neither is missed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.evaluation.bench import Bench
from agent.evaluation.bootstrap import span
from agent.evaluation.document import Drop

REPEATS = 5
_MOST_FIELDS = 64


def measure(bench: Bench, seed: int) -> list[Drop]:
    """The largest loss first."""
    found = [_drop(bench, [i], seed) for i in range(min(len(bench.judge.inference.fields), _MOST_FIELDS))]
    found.sort(key=lambda drop: -(drop.drop.value or 0.0))
    return found + [_drop(bench, together, seed) for together in _units(bench)]


def _drop(bench: Bench, places: Sequence[int], seed: int) -> Drop:
    rng = np.random.default_rng([seed, *places])
    lost = []
    for _ in range(REPEATS):
        changed = bench.windows.copy()
        changed[:, :, places] = bench.windows[rng.permutation(len(changed))][:, :, places]
        lost.append(bench.worse(bench.again(changed)))
    names = bench.judge.inference.fields
    return Drop(fields=[names[i] for i in places], drop=span(np.mean(lost, axis=0)))


def _units(bench: Bench) -> list[list[int]]:
    """Fields that share a unit, where there are several units and several fields of one."""
    units = bench.judge.manifest.input.units
    found = [[i for i, unit in enumerate(units) if unit == one] for one in dict.fromkeys(units) if one]
    return [places for places in found if len(places) > 1] if len(found) > 1 else []

"""What each field is worth: permutation importance (Breiman 2001; Fisher, Rudin, Dominici 2019), by whole windows.

A field's rows in a window are replaced by those of another window, so that its own course stays what it was. Fields of
one unit are also replaced together: of two that say the same, neither is missed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.evaluation.bench import WindowSample
from agent.evaluation.bootstrap import percentile_interval
from agent.evaluation.document import FieldImportance

REPEATS = 5
_MAX_FIELDS = 64


def permutation_importance(sample: WindowSample, seed: int) -> list[FieldImportance]:
    """The largest loss first."""
    found = [
        _field_importance(sample, [i], seed) for i in range(min(len(sample.predictor.inference.fields), _MAX_FIELDS))
    ]
    found.sort(key=lambda drop: -(drop.drop.value or 0.0))
    return found + [_field_importance(sample, together, seed) for together in _fields_by_unit(sample)]


def _field_importance(sample: WindowSample, field_indices: Sequence[int], seed: int) -> FieldImportance:
    rng = np.random.default_rng([seed, *field_indices])
    lost = []
    for _ in range(REPEATS):
        changed = sample.windows.copy()
        changed[:, :, field_indices] = sample.windows[rng.permutation(len(changed))][:, :, field_indices]
        lost.append(sample.metric_drop(sample.reevaluate(changed)))
    names = sample.predictor.inference.fields
    return FieldImportance(fields=[names[i] for i in field_indices], drop=percentile_interval(np.mean(lost, axis=0)))


def _fields_by_unit(sample: WindowSample) -> list[list[int]]:
    """Fields that share a unit, where there are several units and several fields of one."""
    units = sample.predictor.manifest.input.units
    found = [[i for i, unit in enumerate(units) if unit == one] for one in dict.fromkeys(units) if one]
    return [places for places in found if len(places) > 1] if len(found) > 1 else []

"""All attacks on a model's input, within a number of invocations of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.random import Generator

from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.indices import repeat
from outstation.workbench.evaluation.adversarial import noise, patches, substitution
from outstation.workbench.evaluation.adversarial.results import (
    ALL_FIELDS,
    AdversarialResult,
    Attack,
    SmallestChange,
    flipped_share,
    smallest_change,
)
from outstation.workbench.evaluation.adversarial.substitution import Recording
from outstation.workbench.evaluation.adversarial.target import Target

MAX_INVOCATIONS = 60_000
MAX_WINDOWS = 500
MAX_FIELDS, MAX_CLASSES = 64, 40
# Noise on all fields, and on one alone, in sd of the field.
_BOUNDS, _FIELD_BOUNDS = (0.1, 0.25, 0.5, 1.0), (0.25, 0.5, 1.0, 2.0, 4.0)
_STEPS, _FIELD_STEPS = 24, 8
_MIN_PATCHED = 10
# Shares of the invocations, after one for each window's own answer.
_NOISE, _FIELDS, _SPOOF, _TRIGGER, _SUBSTITUTION = 0.25, 0.35, 0.1, 0.2, 0.1


def attack(
    target: Target, recording: Recording, max_invocations: int, seed: int, on_step: Callable[[str], None]
) -> AdversarialResult:
    """Attack the target's windows, the first ones most. The same seed gives the same numbers."""
    room = max_invocations - target.invocations
    movable = np.flatnonzero(target.limits.movable)[:MAX_FIELDS]
    rng = np.random.default_rng(seed)
    attacks: list[Attack] = []
    changes: list[SmallestChange] = []
    on_step("searching for noise that flips answers")
    index = _take(target, room * _NOISE, noise.count_queries(_BOUNDS, _STEPS))
    if len(index) and len(movable):
        allowed = np.broadcast_to(target.limits.movable, (len(index), len(target.limits.movable)))
        sizes = noise.find_smallest_noise(target, index, allowed, _BOUNDS, _STEPS, rng)
        points = [flipped_share(f"{bound:g} sd", sizes <= bound * (1 + 1e-6)) for bound in _BOUNDS]
        attacks.append(Attack(attack="noise", meaning="the worst noise found on all fields together", points=points))
        changes += _summarize(target, index, sizes, None, _BOUNDS[-1])
    changes += _change_single_fields(target, movable, room * _FIELDS, rng)
    on_step("replaying, delaying and spoofing readings")
    index = _take(target, room * _SUBSTITUTION, substitution.SUBSTITUTION_QUERIES)
    replayed = substitution.replay_windows(target, index, rng), substitution.delay_windows(target, index, recording)
    attacks += [each for each in replayed if each is not None]
    index = _take(target, room * _SPOOF, len(substitution.SPOOFED_VALUES) * max(1, len(movable)))
    attacks += substitution.spoof_fields(target, index, movable.tolist(), rng)
    on_step("searching for trigger patches")
    index = _take(target, room * _TRIGGER, patches.QUERIES)
    # A share of fewer says nothing; half of the windows are for the search.
    if len(index) >= 2 * _MIN_PATCHED:
        attacks += patches.search_patches(target, index, rng)
    is_number = target.answers.kind == "number"
    criterion = f"the value changes by more than {target.tolerance:.4g}" if is_number else "the answer is another one"
    return AdversarialResult(
        windows=len(target),
        invocations=target.invocations,
        max_invocations=max_invocations,
        seed=seed,
        criterion=criterion,
        low=_round(target.limits.low),
        high=_round(target.limits.high),
        attacks=attacks,
        smallest_changes=changes,
    )


def order_by_class(codes: Ints, seed: int) -> Ints:
    """Return an order of windows with these answers (n,) in which the first ones are of all classes alike."""
    shuffled = np.random.default_rng(seed).permutation(len(codes))
    by_class = shuffled[np.argsort(codes[shuffled], kind="stable")]
    sizes = np.unique(codes, return_counts=True)[1]
    rank = np.concatenate([np.arange(size) for size in sizes]) if len(sizes) else np.empty(0, np.int64)
    return by_class[np.argsort(rank, kind="stable")]


def _take(target: Target, room: float, queries: int) -> Ints:
    """Return as many of the first windows as `room` allows, if each takes `queries` queries."""
    return np.arange(min(len(target), int(room // queries)))


def _change_single_fields(target: Target, fields: Ints, room: float, rng: Generator) -> Iterator[SmallestChange]:
    """Yield the smallest change of each field alone."""
    queries = noise.count_queries(_FIELD_BOUNDS, _FIELD_STEPS) * max(1, len(fields))
    index = _take(target, room, queries)
    if not len(index) or not len(fields):
        return
    each, field = np.tile(index, len(fields)), repeat(fields, len(index))
    allowed = field[:, None] == np.arange(target.windows.shape[2])
    sizes = noise.find_smallest_noise(target, each, allowed, _FIELD_BOUNDS, _FIELD_STEPS, rng)
    for number, own in zip(fields.tolist(), sizes.reshape(len(fields), -1), strict=True):
        yield from _summarize(target, index, own, number, _FIELD_BOUNDS[-1])


def _summarize(
    target: Target, index: Ints, sizes: Float64s, field: int | None, largest_sd: float
) -> Iterator[SmallestChange]:
    """Yield the smallest change for all answers, then for each class."""
    manifest = target.inference.manifest
    name, unit, sd = ALL_FIELDS, "", None
    if field is not None:
        name, sd = target.inference.fields[field], float(target.limits.sd[field])
        unit = manifest.input.units[field] if manifest.input.units else ""
    yield smallest_change(name, "", sizes, largest_sd, sd, unit)
    labels: Sequence[str] = ()
    if target.answers.kind != "number" and target.answers.labels is None:
        labels = manifest.output.labels or ("normal", "anomaly")
    for code in np.unique(target.codes[index])[:MAX_CLASSES].tolist() if len(labels) > 1 else ():
        own = sizes[target.codes[index] == code]
        yield smallest_change(name, labels[code], own, largest_sd, sd, unit)


def _round(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]

"""Modes of a machine: classes for a model that names none, taken from a category field of its readings.

The first MAX_MODES names have a class each. All others share one with missing names and with model windows in which the
mode changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Ints

MAX_MODES = 32
OTHER_CLASS = MAX_MODES
CLASS_COUNT = MAX_MODES + 1


class Modes(msgspec.Struct, frozen=True, eq=False):
    """Modes of model windows: `codes` (w,) index `texts`, whose first entry stands for no name."""

    codes: Ints
    texts: Sequence[str]


def modes_of_windows(codes: np.ndarray, starts: Ints, window_rows: int, texts: Sequence[str]) -> Modes:
    """Return the modes of model windows at offsets `starts` (w,) into rows with `codes` (n,)."""
    first = codes[starts].astype(np.int64)
    if window_rows > 1 and len(starts):
        changes = np.concatenate([[0], np.cumsum(codes[1:] != codes[:-1])])
        first = np.where(changes[starts] == changes[starts + window_rows - 1], first, 0)
    return Modes(first, texts)


def assign_classes(known: tuple[str, ...], modes: Modes) -> tuple[tuple[str, ...], Ints]:
    """Return the names that have a class from now on, in order of arrival, and the class (w,) of each model window."""
    codes, first, inverse = np.unique(modes.codes, return_index=True, return_inverse=True)
    names = {code: modes.texts[code] for code in codes.tolist() if code}
    places = {name: place for place, name in enumerate(known)}
    for at in np.argsort(first).tolist():
        name = names.get(int(codes[at]))
        if name is not None and name not in places and len(places) < MAX_MODES:
            places[name] = len(places)
    table = np.array(
        [places.get(names.get(code, ""), OTHER_CLASS) if code else OTHER_CLASS for code in codes.tolist()], np.int64
    )
    return tuple(places), table[inverse.reshape(-1)] if len(codes) else modes.codes

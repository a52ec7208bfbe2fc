"""The smartwatch recordings of seglearn, split by subject and stored without pickled objects.

Run as a script it rebuilds `reference.npz` (training subjects), `../../recordings/exercise.npz` (held-out subjects) and
`golden.npz` (32 held-out windows). Only this script needs seglearn's file; everything else reads these three.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "reference.npz"
HELD_OUT = HERE.parents[1] / "recordings" / "exercise.npz"
GOLDEN = HERE / "golden.npz"

FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")
UNITS = ("g", "g", "g", "rad/s", "rad/s", "rad/s")
LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
RATE = 50.0  # rows per second
ROWS = 100  # rows of a window: two seconds
# Chosen by number before any model was trained: the last three of ten subjects are never trained or tuned on.
HELD_OUT_SUBJECTS = (8, 9, 10)
# The steps an inertial sensor at +-8 g reports. The source has six decimals; rounding moves a value by at most
# 0.00013 g or 0.0005 rad/s, and halves the committed files.
STEP = np.array([1 / 4096] * 3 + [1 / 1024] * 3)
ATTRIBUTION = (
    "Inertial recordings from seglearn (watch_dataset.npy), Copyright (c) 2018, David M. Burns, All rights reserved, "
    "BSD 3-Clause; Burns et al. 2018, arXiv:1802.01489. Rounded to 1/4096 g and 1/1024 rad/s. "
    "Licence text: models/recordings/README.md"
)


@dataclass(frozen=True)
class Recordings:
    """Recordings laid end to end: `rows` (N, 6) float32 in `UNITS`, recording r is rows[starts[r]:starts[r + 1]]."""

    rows: NDArray[np.float32]
    starts: NDArray[np.int64]
    label: NDArray[np.int64]
    subject: NDArray[np.int64]
    side: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.label)

    def recording(self, r: int) -> NDArray[np.float32]:
        return self.rows[self.starts[r] : self.starts[r + 1]]

    def where(self, keep: NDArray[np.bool_]) -> Recordings:
        """The recordings for which `keep` (R,) is true."""
        picked = np.flatnonzero(keep)
        parts = [self.recording(r) for r in picked]
        starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        return Recordings(np.concatenate(parts), starts, self.label[keep], self.subject[keep], self.side[keep])

    def windows(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Non-overlapping windows (w, 100, 6) from each recording's first row, and the recording of each (w,)."""
        parts = [self.recording(r) for r in range(len(self))]
        whole = [p[: len(p) // ROWS * ROWS].reshape(-1, ROWS, len(FIELDS)) for p in parts]
        return np.concatenate(whole), np.repeat(np.arange(len(self)), [len(w) for w in whole])


def load(path: Path) -> Recordings:
    with np.load(path, allow_pickle=False) as z:
        return Recordings(z["rows"], z["starts"], z["label"], z["subject"], z["side"])


def join(first: Recordings, second: Recordings) -> Recordings:
    """Both sets as one."""
    return Recordings(
        np.concatenate([first.rows, second.rows]),
        np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
        np.concatenate([first.label, second.label]),
        np.concatenate([first.subject, second.subject]),
        np.concatenate([first.side, second.side]),
    )


def save(path: Path, recordings: Recordings) -> None:
    np.savez_compressed(
        path,
        rows=recordings.rows,
        starts=recordings.starts,
        label=recordings.label.astype(np.int8),
        labels=np.array(LABELS),
        subject=recordings.subject.astype(np.int8),
        side=recordings.side,
        rate=np.float64(RATE),
        fields=np.array(FIELDS),
        units=np.array(UNITS),
        attribution=np.array(ATTRIBUTION),
    )


def from_seglearn() -> Recordings:
    """All 140 recordings, in the order subject, exercise, side."""
    # Found, not imported: `import seglearn` needs pandas and scikit-learn. The file is a pickled dict, read only here.
    spec = importlib.util.find_spec("seglearn")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("seglearn is not installed: pip install --no-deps seglearn==1.2.5")
    source = Path(spec.submodule_search_locations[0]) / "data" / "watch_dataset.npy"
    data = np.load(source, allow_pickle=True).item()
    if tuple(data["y_labels"]) != LABELS or tuple(data["X_labels"]) != FIELDS:
        raise SystemExit(f"{source}: labels or fields are not the ones this model was made for")
    order = np.lexsort((data["side"], data["y"], data["subject"]))
    parts = [(np.round(data["X"][i] / STEP) * STEP).astype(np.float32) for i in order]
    starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    side = np.where(data["side"][order] == 1, "right", "left")
    return Recordings(np.concatenate(parts), starts, data["y"][order], data["subject"][order], side)


def golden_windows(recordings: Recordings, count: int) -> NDArray[np.int64]:
    """Indices of `count` windows, spread evenly over exercises in turn; the same ones each time."""
    _, source = recordings.windows()
    rng = np.random.default_rng(0)
    queues = [rng.permutation(np.flatnonzero(recordings.label[source] == k)) for k in range(len(LABELS))]
    return np.sort(np.array([queues[i % len(LABELS)][i // len(LABELS)] for i in range(count)]))


def main() -> None:
    everything = from_seglearn()
    held_out = np.isin(everything.subject, HELD_OUT_SUBJECTS)
    save(REFERENCE, everything.where(~held_out))
    test = everything.where(held_out)
    save(HELD_OUT, test)
    windows, source = test.windows()
    picked = golden_windows(test, 32)
    np.savez_compressed(GOLDEN, windows=windows[picked], label=test.label[source[picked]].astype(np.int8))
    for path in (REFERENCE, HELD_OUT, GOLDEN):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

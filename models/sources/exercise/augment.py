"""Training windows: cut anywhere, faster or slower, on the other arm, with the sensor turned, louder or softer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from recordings import FIELDS, ROWS, Recordings

# Left arm to right: acceleration is a vector, x changes sign; rotation is a pseudovector, y and z do.
MIRROR = np.array([-1, 1, 1, 1, -1, -1], np.float32)


@dataclass(frozen=True)
class Augmentation:
    every: int = 50  # rows of recording per window drawn in one pass
    tempo: float = 0.3  # log of the playing speed is uniform within +-tempo
    mirror: float = 0.5  # share of windows moved to the other arm
    turn: float = 0.4  # radians, each component of a small rotation of the sensor
    far_turns: float = 0.3  # share of windows turned about a random axis instead, by up to a radian
    accel_gain: float = 0.05  # spread of the log of the gain
    gyro_gain: float = 0.2  # people differ more in speed than in gravity
    noise: float = 0.05  # standard deviations of the scaled input, at most


def rotations(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rotation vectors (n, 3) to matrices (n, 3, 3), Rodrigues' formula."""
    angle = np.linalg.norm(vectors, axis=1) + 1e-9
    x, y, z = (vectors / angle[:, None]).T
    o = np.zeros_like(x)
    cross = np.stack([np.stack([o, -z, y], 1), np.stack([z, o, -x], 1), np.stack([-y, x, o], 1)], 1)
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return (np.eye(3) + sin * cross + (1 - cos) * (cross @ cross)).astype(np.float32)


def cut(
    rng: np.random.Generator, recordings: Recordings, aug: Augmentation
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Windows (n, 100, 6) at random places and tempos, linearly interpolated, and the recording of each (n,)."""
    length = np.diff(recordings.starts)
    source = np.repeat(np.arange(len(recordings)), length // aug.every)
    tempo = np.exp(rng.uniform(-aug.tempo, aug.tempo, len(source)))
    first = rng.uniform(0, length[source] - 1 - (ROWS - 1) * tempo)
    place = first[:, None] + np.arange(ROWS) * tempo[:, None]
    before = np.minimum(place.astype(np.int64), length[source][:, None] - 2)
    share = (place - before)[:, :, None].astype(np.float32)
    row = recordings.starts[source][:, None] + before
    windows = recordings.rows[row] * (1 - share) + recordings.rows[row + 1] * share
    windows[:, :, 3:] *= tempo[:, None, None].astype(np.float32)  # turning faster is turning at a higher rate
    return windows, source


def turned(rng: np.random.Generator, windows: NDArray[np.float32], aug: Augmentation) -> NDArray[np.float32]:
    n = len(windows)
    vectors = rng.normal(0, aug.turn, (n, 3))
    far = rng.random(n) < aug.far_turns
    axis = rng.normal(size=(n, 3))
    axis *= rng.uniform(0, 1, (n, 1)) / np.linalg.norm(axis, axis=1, keepdims=True)
    vectors[far] = axis[far]
    both = windows.reshape(n, ROWS, 2, 3)  # the accelerometer and the gyroscope turn together
    return np.einsum("nij,ntsj->ntsi", rotations(vectors), both).reshape(n, ROWS, len(FIELDS))


def one_pass(
    rng: np.random.Generator, recordings: Recordings, std: NDArray[np.float32], aug: Augmentation
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One pass over the recordings, shuffled: windows (n, 100, 6) in physical units and their labels (n,)."""
    windows, source = cut(rng, recordings, aug)
    n = len(windows)
    flipped = rng.random(n) < aug.mirror
    windows[flipped] *= MIRROR
    windows = turned(rng, windows, aug)
    spread = np.array([aug.accel_gain] * 3 + [aug.gyro_gain] * 3)
    gain = np.exp(np.repeat(rng.normal(size=(n, 1, 2)), 3, axis=2) * spread)
    level = aug.noise * rng.random((n, 1, 1))
    windows = (windows * gain + rng.normal(size=windows.shape) * level * std).astype(np.float32)
    order = rng.permutation(n)
    return windows[order], recordings.label[source][order]

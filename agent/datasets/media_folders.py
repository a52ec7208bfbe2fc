"""Folders of images and sounds as data: a file is a recording, and the folder it lies in may name its label."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.errors import UsageError
from agent.media import ImageFormat, MediaFormat
from agent.model.bundle.manifest import ModelInput
from agent.model.inference import images, sound

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# Longer than any window's max_gap_s is taken to be.
_PAUSE_S = 10


def list_files(path: Path, spec: ModelInput) -> list[Path]:
    """The file at `path`, or all of its kind in that folder and its subfolders, in order. Raises UsageError."""
    suffixes = images.SUFFIXES if spec.image else sound.SUFFIXES
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: cannot be read: No such file or directory")
    named = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    found = sorted(one for one in named if one.suffix.lower() in suffixes and one.is_file())
    if not found:
        raise UsageError(f"{path}: no file in it ends with {' or '.join(suffixes)}")
    return found


def read(paths: Sequence[Path], spec: ModelInput) -> tuple[list[Floats], Ints]:
    """The rows of each file, and the times of all (n,) epoch µs: one second an image, or as the sound goes on.

    Between files there is a pause that no window reaches over. Raises UsageError.
    """
    made = spec.image or spec.sound
    assert made is not None
    parts = [read_rows(path, made) for path in paths]
    pause_s = _PAUSE_S * (1 + (spec.gap_s or 0.0))
    times, at_us = [np.zeros(0, np.int64)], 0
    for part in parts:
        times.append(at_us + row_times_us(len(part), made))
        last_us = 1e6 if isinstance(made, ImageFormat) else (len(part) * made.row_period_s + pause_s) * 1e6
        at_us += round(last_us)
    return parts, np.concatenate(times)


def row_times_us(n: int, media: MediaFormat) -> Ints:
    """Of the rows of one file, from its start."""
    if isinstance(media, ImageFormat):
        return np.zeros(n, np.int64)
    return np.asarray(np.rint(np.arange(n) * (media.row_period_s * 1e6)), np.int64)


def read_rows(path: Path, media: MediaFormat) -> Floats:
    """All rows of an image or sound. Raises UsageError."""
    if isinstance(media, ImageFormat):
        return images.read_rows(path, media)
    with contextlib.closing(sound.WavReader(path, media.rate)) as wav:
        return np.concatenate([np.zeros((0, len(media.columns)), np.float32), *sound.iter_row_blocks(wav, media)])

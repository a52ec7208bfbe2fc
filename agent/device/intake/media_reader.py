"""Image and sound files to blocks of columns: an image is one block, of a sound some rows at a time.

All rows of an image have its time; those of a sound go on from its start. The name tells the time where it holds one in
UTC, as `20261124T101530Z` or `2026-11-24T10-15-30.250Z`; else the file was last written at an image's time, and at a
sound's end. The first row of a file never seems to go on from the file before: see `Image.gap_s`, `Sound.gap_s`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.config import FieldConfig, StreamConfig
from agent.device.intake.file_reader import FileBlock, max_block_rows
from agent.device.store.quota import Quota
from agent.device.store.rows import RawColumns, row_bytes
from agent.errors import ConfigError, UsageError
from agent.media import ImageFormat, MediaFormat, SoundFormat
from agent.model.inference import images, sound
from agent.model.inference.sound import WavReader

_TIME_IN_NAME = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)[T_-](\d\d)[-:]?(\d\d)[-:]?(\d\d)(?:[.,](\d{1,6}))?Z")
# Images that were written so close together are told apart by a microsecond.
_BURST_US = 1000


def suffixes(media: MediaFormat) -> tuple[str, ...]:
    return images.SUFFIXES if isinstance(media, ImageFormat) else sound.SUFFIXES


def check_config(file: str, name: str, stream: StreamConfig, max_size: int) -> None:
    """Raises ConfigError where this machine cannot read what stream `name` is made of, or the store not keep it."""
    if not isinstance(stream.media_format, ImageFormat):
        return
    key = f"streams.{name}.source.image"
    if not images.is_pillow_installed():
        raise ConfigError(file, key, images.PILLOW_MISSING)
    # What waits beside it for the same commit is less than a quarter.
    takes, most = row_bytes(stream) * stream.media_format.height, Quota.from_max_size(max_size).transaction_bytes // 2
    if takes > most:
        raise ConfigError(
            file, key, f"an image takes {takes:,} bytes, the store {most:,} at once; make width and height smaller"
        )


def read_blocks(path: Path, name: str, stream: StreamConfig, skip: int, last_us: int | None) -> Iterator[FileBlock]:
    """The rows of file `path`, which was called `name`, after the first `skip`.

    `last_us`: when the last row of the stream was, of this file where some are skipped; None where nobody knows.
    Raises UsageError where it is not what the stream is made of.
    """
    made = stream.media_format
    if isinstance(made, ImageFormat):
        if not skip:
            rows = images.read_rows(path, made)
            at_us = _image_time_us(_parse_name_time_us(name) or os.stat(path).st_mtime_ns // 1000, last_us)
            yield _build_block(rows, np.full(len(rows), at_us), 0, stream.fields)
        return
    assert made is not None
    with contextlib.closing(WavReader(path, made.rate)) as wav:
        if wav.sample_count < made.window:
            raise UsageError(f"{path}: {wav.sample_count:,} samples are too few: one row takes {made.window:,}")
        if skip and last_us is not None:
            begin_us = last_us - round((skip - 1) * made.row_period_s * 1e6)
        else:
            own_us = _parse_name_time_us(name) or os.stat(path).st_mtime_ns // 1000 - round(
                wav.sample_count / made.rate * 1e6
            )
            begin_us = _sound_start_us(own_us, last_us, made)
        for rows in _merge_parts(sound.iter_row_blocks(wav, made, skip), max_block_rows(stream)):
            t = begin_us + np.rint(np.arange(skip, skip + len(rows)) * (made.row_period_s * 1e6)).astype(np.int64)
            yield _build_block(rows, t, skip, stream.fields)
            skip += len(rows)


def _image_time_us(at_us: int, last_us: int | None) -> int:
    near = last_us is not None and last_us - _BURST_US <= at_us <= last_us
    return at_us if last_us is None or not near else last_us + 1


def _sound_start_us(begin_us: int, last_us: int | None, media: SoundFormat) -> int:
    """Just before the last row, where it would seem to go on from there: later ones would add up to a delay."""
    goes_on = last_us is not None and last_us <= begin_us <= last_us + round(2 * media.row_period_s * 1e6)
    return begin_us if last_us is None or not goes_on else last_us - 1


def _parse_name_time_us(name: str) -> int | None:
    """The moment a file's name tells; None where it tells none."""
    found = _TIME_IN_NAME.search(name)
    if found is None:
        return None
    *parts, fraction = found.groups()
    try:
        moment = datetime(*map(int, parts), tzinfo=UTC)  # type: ignore[misc, arg-type]
    except ValueError:
        return None
    return int(moment.timestamp()) * 1_000_000 + int((fraction or "").ljust(6, "0"))


def _merge_parts(parts: Iterator[images.Floats], max_rows: int) -> Iterator[images.Floats]:
    """As many parts at once as have at most so many rows."""
    waiting: list[images.Floats] = []
    for part in parts:
        if waiting and sum(map(len, waiting)) + len(part) > max_rows:
            yield np.concatenate(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield np.concatenate(waiting)


def _build_block(rows: images.Floats, t: NDArray[np.int64], skip: int, fields: list[FieldConfig]) -> FileBlock:
    values = {field.name: np.ascontiguousarray(column) for field, column in zip(fields, rows.T, strict=True)}
    return FileBlock(RawColumns(len(rows), t / 1e6, values), list(range(skip + 1, skip + len(rows) + 1)), {})

"""Media reader: image and sound files to blocks of columns, an image in one block, a sound in several.

All rows of an image have its time; those of a sound follow from its start. The time is in the file's name, in UTC, as
`20261124T101530Z` or `2026-11-24T10-15-30.250Z`; otherwise the modification time is an image's time, and a sound's end.
The first row of a file never seems to continue the file before: see `ImageFormat.gap_s`, `SoundFormat.gap_s`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.intake.file_reader import FileBlock, max_block_rows
from outstation.device.store.quota import Quota
from outstation.device.store.rows import RawColumns, row_bytes
from outstation.foundation.arrays import Float32s, Float64s
from outstation.foundation.errors import ConfigError, UsageError
from outstation.foundation.media import ImageFormat, MediaFormat
from outstation.ml.model.inference import images, sound
from outstation.ml.model.inference.sound import WavReader

_TIME_IN_NAME = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)[T_-](\d\d)[-:]?(\d\d)[-:]?(\d\d)(?:[.,](\d{1,6}))?Z")
# Images that are closer together than this get times a microsecond apart.
_BURST_US = 1000


def suffixes(media: MediaFormat) -> tuple[str, ...]:
    return images.SUFFIXES if isinstance(media, ImageFormat) else sound.SUFFIXES


def check_config(file: str, name: str, stream: StreamConfig, max_size: int) -> None:
    """Raise ConfigError if this machine cannot read the stream's media, or the store cannot hold one file."""
    if not isinstance(stream.media_format, ImageFormat):
        return
    key = f"streams.{name}.source.image"
    if not images.is_pillow_installed():
        raise ConfigError(file, key, images.describe_missing_pillow())
    # Other rows of the same commit take less than a quarter.
    size, limit = row_bytes(stream) * stream.media_format.height, Quota.from_max_size(max_size).transaction_bytes // 2
    if size > limit:
        raise ConfigError(
            file, key, f"an image takes {size:,} bytes, the store {limit:,} at once; use a smaller width and height"
        )


def read_blocks(
    path: Path,
    file: BinaryIO,
    modified_us: int,
    stream: StreamConfig,
    skip: int,
    last_us: int | None,
    memory_bytes: int | None = None,
) -> Iterator[FileBlock]:
    """Yield the rows of the open `file`, whose original name is that of `path`, after the first `skip`.

    `modified_us`: the file's modification time.
    `last_us`: time of the stream's last row, which is in this file if `skip` is not 0; None if unknown.
    `memory_bytes`: what may be taken to decode it. Raises UsageError if the file is not in the stream's format.
    """
    media = stream.media_format
    if isinstance(media, ImageFormat):
        if not skip:
            rows = images.read_rows(path, media, file, memory_bytes)
            at_us = parse_name_time_us(path.name) or modified_us
            near = last_us is not None and last_us - _BURST_US <= at_us <= last_us
            at_us = at_us if last_us is None or not near else last_us + 1
            yield build_block(rows, np.full(len(rows), at_us / 1e6), 0, stream.fields)
        return
    assert media is not None
    with contextlib.closing(WavReader(path, media.rate, file)) as wav:
        if wav.sample_count < media.window:
            raise UsageError(f"{path}: {wav.sample_count:,} samples are too few: one row takes {media.window:,}")
        if skip and last_us is not None:
            begin_us = last_us - round((skip - 1) * media.row_period_s * 1e6)
        else:
            own_us = parse_name_time_us(path.name) or modified_us - round(wav.sample_count / media.rate * 1e6)
            # A sound that would seem to continue the last row begins just before it: a begin behind the last row
            # would add up to a delay over many files.
            goes_on = last_us is not None and last_us <= own_us <= last_us + round(2 * media.row_period_s * 1e6)
            begin_us = own_us if last_us is None or not goes_on else last_us - 1
        for rows in _merge_parts(sound.iter_row_blocks(wav, media, skip), max_block_rows(stream)):
            t = begin_us + np.rint(
                np.arange(skip, skip + len(rows), dtype=np.float64) * (media.row_period_s * 1e6)
            ).astype(np.int64)
            yield build_block(rows, t / 1e6, skip, stream.fields)
            skip += len(rows)


def parse_name_time_us(name: str) -> int | None:
    """Return the time in a file's name, epoch µs, or None."""
    match = _TIME_IN_NAME.search(name)
    if match is None:
        return None
    *parts, fraction = match.groups()
    try:
        moment = datetime(*map(int, parts), tzinfo=UTC)  # type: ignore[misc, arg-type]
    except ValueError:
        return None
    return int(moment.timestamp()) * 1_000_000 + int((fraction or "").ljust(6, "0"))


def _merge_parts(parts: Iterator[Float32s], max_rows: int) -> Iterator[Float32s]:
    """Merge consecutive parts up to `max_rows` rows."""
    waiting: list[Float32s] = []
    for part in parts:
        if waiting and sum(map(len, waiting)) + len(part) > max_rows:
            yield np.concatenate(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield np.concatenate(waiting)


def build_block(rows: Float32s, t: Float64s, skip: int, fields: list[FieldConfig]) -> FileBlock:
    """Return the block of `rows` (n, F) with times `t` (n,), epoch seconds, after the first `skip` rows of the file."""
    values = {field.name: np.ascontiguousarray(column) for field, column in zip(fields, rows.T, strict=True)}
    return FileBlock(RawColumns(len(rows), t, values), range(skip + 1, skip + len(rows) + 1), {})

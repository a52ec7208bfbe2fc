"""Progress of a watched file that is read."""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.device.intake.sources.watched_folder import FileState
from outstation.device.store.rows import RawColumns


class FileProgress(msgspec.Struct):
    """Progress of a file: its last submitted line, that row's number in the stream, and rejected rows.

    `deaths`: processes in a row that ended while they read on from this line. `digest`: of its content, "" if the
    stream's files may repeat. `is_compared`: no earlier file has the digest, or rows of this file are stored.
    `has_all_times`: each of its rows so far came with a time. `state`: of the file as it was read. `is_torn`: the last
    line was rejected.
    """

    last_line: int
    last_row: int = 0
    rejected_rows: int = 0
    deaths: int = 0
    digest: str = ""
    is_compared: bool = False
    has_all_times: bool = True
    state: FileState | None = None
    is_torn: bool = False


def has_all_times(raw: RawColumns) -> bool:
    """Return True if each row came with a time."""
    if raw.t is None or isinstance(raw.t, list):
        return raw.t is not None and None not in raw.t
    return not np.isnan(raw.t).any()

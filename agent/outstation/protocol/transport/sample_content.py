"""Content of a sample: readings with their times, as they are sealed inside a `samples` message.

zlib of JSON. Times are differences, so that a steady rate is a run of one number; values are columns. Rows of a joined
stream have numbers, since those between that no window took are left out.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from outstation.foundation import decoders
from outstation.foundation.arrays import Float64s, Ints

MAX_CONTENT_BYTES = 8 << 20
MAX_SAMPLE_ROWS, MAX_SAMPLE_FIELDS = 1 << 18, 4096
# Epoch µs of the years 1 to 9999.
_FIRST_TIME_US, _LAST_TIME_US = -62_135_596_800_000_000, 253_402_300_799_999_999

_Reading = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Step = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Column = list[_Reading | None]
_COLUMN = re.compile(rb"(\[[^\[\]]*\])")


class SampleContent(msgspec.Struct, frozen=True, eq=False):
    """Rows of a stream: times `t` (n,) epoch µs; one column (n,) for each of `fields`, NaN missing.

    `consent` is the text of the owner's config, so that it goes where the readings go. `numbers` (n,) ascend: those of
    the rows of a joined stream; None of consecutive rows.
    """

    consent: str
    fields: list[str]
    t: Ints
    columns: list[Float64s]
    numbers: Ints | None = None


class _Members(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """JSON object of a content. The lists are not parsed yet: a list in a few bytes of zlib can hold millions."""

    v: Literal[1]
    consent: Annotated[str, msgspec.Meta(max_length=200)]
    fields: msgspec.Raw
    t: msgspec.Raw
    columns: msgspec.Raw
    rows: msgspec.Raw = msgspec.Raw(b"")


class SampleTooLarge(ValueError):
    """More rows, fields or bytes than `decode` accepts."""


def encode(
    consent: str,
    fields: Sequence[str],
    t: Ints,
    columns: Sequence[Sequence[float | None]],
    numbers: Ints | None = None,
) -> bytes:
    """Return the content of readings at times `t` (n,) epoch µs, one column (n,) for each field.

    `numbers` (n,): those of rows that are not consecutive. Raises SampleTooLarge if `decode` would refuse so much:
    a constant field compresses so well that the size of a message is no limit.
    """
    if not 1 <= len(t) <= MAX_SAMPLE_ROWS or len(fields) > MAX_SAMPLE_FIELDS:
        raise SampleTooLarge(f"{len(t)} rows of {len(fields)} fields, more than a sample may have")
    times = np.diff(t, prepend=0).tolist()
    members = {"v": 1, "consent": consent, "fields": fields, "t": times, "columns": columns}
    if numbers is not None:
        members["rows"] = np.diff(numbers, prepend=0).tolist()
    text = msgspec.json.encode(members)
    # One byte less, so that `decode` reaches the end of the stream.
    if len(text) >= MAX_CONTENT_BYTES:
        raise SampleTooLarge(f"{len(text)} bytes, a sample has less than {MAX_CONTENT_BYTES}")
    return zlib.compress(text, 9)


def decode(data: bytes, rows: int, span: tuple[int, int] | None = None) -> SampleContent:
    """Parse the content of a sample with this number of rows. Raises ValueError, and no other exception.

    With `span`, rows have numbers, the first and the last of which it gives; without one they have none. No list is
    parsed before its length is counted, and one column at a time.
    """
    if not 1 <= rows <= MAX_SAMPLE_ROWS:
        raise ValueError(f"{rows} rows, a sample has 1 to {MAX_SAMPLE_ROWS}")
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, MAX_CONTENT_BYTES)
        if not inflater.eof or inflater.unused_data:
            raise ValueError(f"it is cut, has an appendix, or is larger than {MAX_CONTENT_BYTES} bytes")
        members = decoders.from_json(text, _Members)
        fields = _parse_fields(members.fields)
        times = list(itertools.accumulate(_parse_list(bytes(members.t), list[int], rows)))
        if not _FIRST_TIME_US <= min(times) <= max(times) <= _LAST_TIME_US:
            raise ValueError("a time is none of the calendar")
        columns = [
            np.array(_parse_list(column, _Column, rows), np.float64)
            for column in _split_columns(bytes(members.columns).strip(), len(fields))
        ]
        numbers = _parse_numbers(raw, rows, span) if (raw := bytes(members.rows)) else None
        if (numbers is None) != (span is None):
            raise ValueError("row numbers are for joined rows, and these have them")
        return SampleContent(members.consent, fields, np.array(times, np.int64), columns, numbers)
    except (zlib.error, msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _parse_fields(raw: msgspec.Raw) -> list[str]:
    # Each name has two quotation marks.
    if bytes(raw).count(b'"') > 2 * MAX_SAMPLE_FIELDS:
        raise ValueError(f"more than {MAX_SAMPLE_FIELDS} fields")
    fields: list[str] = decoders.from_json(raw, list[_Name])
    if not fields or len(set(fields)) != len(fields):
        raise ValueError(f"{len(fields)} fields, {len(set(fields))} distinct")
    return fields


def _parse_numbers(text: bytes, rows: int, span: tuple[int, int] | None) -> Ints:
    steps = _parse_list(text, list[_Step], rows)
    numbers = list(itertools.accumulate(steps))
    if (numbers[0], numbers[-1]) != span:
        raise ValueError(f"row numbers reach from {numbers[0]} to {numbers[-1]}, the message says {span}")
    return np.array(numbers, np.int64)


def _split_columns(text: bytes, count: int) -> list[bytes]:
    """Return the texts of the lists in a list. Raises ValueError unless it has `count` of them and nothing else."""
    parts = _COLUMN.split(text[1:-1]) if text[:1] == b"[" and text.count(b"[") == count + 1 else []
    if [gap.strip() for gap in parts[::2]] != [b"", *[b","] * (count - 1), b""]:
        raise ValueError(f"columns are not a list for each of {count} fields")
    return parts[1::2]


def _parse_list(text: bytes, type_: Any, rows: int) -> list[Any]:
    """Parse a list of numbers. Raises ValueError unless it has `rows` of them."""
    if text.count(b",") != rows - 1:
        raise ValueError(f"a list has not {rows} items, as many as the sample has rows")
    items: list[Any] = decoders.from_json(text, type_)
    if len(items) != rows:
        raise ValueError(f"{len(items)} items for {rows} rows")
    return items

"""Content of a sample: readings with their times, as they are sealed inside a `samples` message.

zlib of JSON. Times are differences, so that a steady rate is a run of one number; values are columns.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Annotated, Literal

import msgspec

from agent import decoders

MAX_CONTENT_BYTES = 8 << 20
MAX_SAMPLE_ROWS, MAX_SAMPLE_FIELDS = 1 << 18, 4096
# Epoch µs of the years 1 to 9999.
_FIRST_TIME_US, _LAST_TIME_US = -62_135_596_800_000_000, 253_402_300_799_999_999

Reading = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class SampleContent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows of a stream: `t` epoch µs, the first and then differences; one column for each of `fields`, null missing.

    `consent` is the text of the owner's config, so that it goes where the readings go.
    """

    v: Literal[1] = 1
    consent: Annotated[str, msgspec.Meta(max_length=200)]
    fields: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_SAMPLE_FIELDS)]
    t: Annotated[list[int], msgspec.Meta(min_length=1, max_length=MAX_SAMPLE_ROWS)]
    columns: list[list[Reading | None]]

    def __post_init__(self) -> None:
        if len(self.columns) != len(self.fields) or len(set(self.fields)) != len(self.fields):
            raise ValueError(f"{len(self.columns)} columns, {len(set(self.fields))} distinct fields")
        if any(len(column) != len(self.t) for column in self.columns):
            raise ValueError(f"a column is not as long as t, {len(self.t)}")
        if not all(_FIRST_TIME_US <= t <= _LAST_TIME_US for t in self.expand_times()):
            raise ValueError("a time is none of the calendar")

    def expand_times(self) -> list[int]:
        """Return the times (n,), epoch µs."""
        return list(itertools.accumulate(self.t))


def encode(content: SampleContent) -> bytes:
    return zlib.compress(msgspec.json.encode(content), 9)


def decode(data: bytes) -> SampleContent:
    """Parse the content. Raises ValueError, and no other exception."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, MAX_CONTENT_BYTES)
        if not inflater.eof or inflater.unused_data:
            raise ValueError(f"it is cut, has an appendix, or is larger than {MAX_CONTENT_BYTES} bytes")
        return decoders.from_json(text, SampleContent)
    except (zlib.error, msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None

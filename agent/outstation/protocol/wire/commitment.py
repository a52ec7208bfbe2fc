"""Commitment to the rows of a results message: HMAC-SHA-256 (RFC 2104) under a key of that message alone.

The key of a message is derived from the device's secret by log, task and rows. Showing it opens this one message: rows
cannot be guessed from the commitments of others, and the device's secret cannot be computed from it.
`docs/concepts/privacy.md` gives the bytes.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from outstation.protocol.wire.keys import b64url_decode, b64url_encode

if TYPE_CHECKING:
    from collections.abc import Buffer  # Python 3.12

SECRET_BYTES = 32
# Event of the audit message behind which commitments are under another secret.
SECRET_REPLACED = "secret replaced"
_FORMATS = {"f32": "f", "f64": "d", "i64": "q", "category": "H"}
_PREFIX = "hmac-sha256:"
_PURPOSE, _JOINED_PURPOSE = "outstation rows v1", "outstation joined rows v1"
_NAN = float("nan")


class DisclosedRows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a stream, shown to an auditor, with the key that proves them.

    `fields` (name, type); `t` (n,) epoch µs; `columns` one list (n,) per field, None for a missing number; `categories`
    the code of each text by field.
    """

    rows: tuple[int, int]
    key: str
    fields: list[tuple[str, str]]
    t: list[int]
    columns: list[list[float | int | str | None]]
    categories: dict[str, dict[str, int]] = {}

    def commit(self) -> str:
        """Compute the commitment of these rows under the disclosed key. Raises ValueError if they do not fit."""
        count = self.rows[1] - self.rows[0] + 1
        if len(self.columns) != len(self.fields) or {len(self.t), *map(len, self.columns)} != {count}:
            raise ValueError(f"rows {self.rows[0]} to {self.rows[1]} need {count} values of t and of each field")
        try:
            columns = [[self._pack(*column)] for column in zip(self.fields, self.columns, strict=True)]
            codes = {
                name: sorted((code, text) for text, code in used.items()) for name, used in self.categories.items()
            }
            return commit(b64url_decode(self.key), self.fields, [struct.pack(f"<{count}q", *self.t)], columns, codes)
        except (KeyError, TypeError, OverflowError, struct.error) as error:
            raise ValueError(f"a value is not of its field's type: {error}") from None

    def _pack(self, field: tuple[str, str], values: Sequence[float | int | str | None]) -> bytes:
        name, kind = field
        numbers = [self.categories[name][str(v)] if kind == "category" else _NAN if v is None else v for v in values]
        return struct.pack(f"<{len(numbers)}{_FORMATS[kind]}", *numbers)


class DisclosedJoin(DisclosedRows, frozen=True, kw_only=True):
    """Rows of the stream that a further input of the model was joined from."""

    stream: str


class Disclosure(DisclosedRows, frozen=True, kw_only=True):
    """Rows of one results message, and those that its further inputs were joined from, by input."""

    device: str
    log: str
    task: str
    joined: dict[str, DisclosedJoin] = {}


def derive_key(secret: bytes, log: str, task: str, rows: tuple[int, int]) -> bytes:
    """Derive the key of the message of `task` that covers `rows` in `log`."""
    return hmac.digest(secret, "\n".join([_PURPOSE, log, task, *map(str, rows)]).encode(), "sha256")


def derive_joined_key(secret: bytes, log: str, stream: str, rows: tuple[int, int]) -> bytes:
    """Derive the key of the rows of `stream` that inputs were joined from: one key for the same rows in `log`."""
    return hmac.digest(secret, "\n".join([_JOINED_PURPOSE, log, stream, *map(str, rows)]).encode(), "sha256")


def commit(
    key: bytes,
    fields: Sequence[tuple[str, str]],
    t: Iterable[Buffer],
    columns: Sequence[Iterable[Buffer]],
    codes: Mapping[str, Sequence[tuple[int, str]]],
) -> str:
    """Return the commitment to rows, given as the little-endian bytes of their times and of one column per field.

    Times and columns may be in pieces that follow one another.
    `codes` holds the category codes in use with their texts, ascending, by field.
    """
    code = hmac.new(key, msgspec.json.encode(fields) + b"\n", "sha256")
    for piece in t:
        code.update(piece)
    for (name, kind), column in zip(fields, columns, strict=True):
        for piece in column:
            code.update(piece)
        if kind == "category":
            code.update(msgspec.json.encode(codes[name]) + b"\n")
    return _PREFIX + code.hexdigest()


def encode_key(key: bytes) -> str:
    return b64url_encode(key)

"""Commitment to the rows of a results message: HMAC-SHA-256 (RFC 2104) under a key of that message alone.

The key of a message is derived from the device's secret by log, task and rows. Showing it opens this one message: rows
cannot be guessed from the commitments of others, and the device's secret cannot be computed from it.
`docs/concepts/privacy.md` gives the bytes.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.wire.keys import b64url_decode, b64url_encode

SECRET_BYTES = 32
DTYPES = {"f32": "<f4", "f64": "<f8", "i64": "<i8", "category": "<u2"}
_PREFIX = "hmac-sha256:"
_PURPOSE = "outstation rows v1"


class Disclosure(msgspec.Struct, frozen=True):
    """Rows of one results message, shown to an auditor, with the key that proves them.

    `fields` (name, type); `t` (n,) epoch µs; `columns` one list (n,) per field, None for a missing number; `categories`
    the code of each text by field.
    """

    device: str
    log: str
    task: str
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
        arrays: list[NDArray[Any]] = []
        texts: dict[str, Mapping[int, str]] = {}
        try:
            for (name, kind), values in zip(self.fields, self.columns, strict=True):
                if kind == "category":
                    codes = self.categories[name]
                    texts[name] = {code: text for text, code in codes.items()}
                    arrays.append(np.array([codes[str(value)] for value in values], DTYPES[kind]))
                elif kind == "i64":
                    arrays.append(np.array(values, DTYPES[kind]))
                else:
                    arrays.append(np.array([np.nan if v is None else v for v in values], DTYPES[kind]))
            return commit(b64url_decode(self.key), self.fields, np.array(self.t, "<i8"), arrays, texts)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"a value is not of its field's type: {error}") from None


def derive_key(secret: bytes, log: str, task: str, rows: tuple[int, int]) -> bytes:
    """Derive the key of the message of `task` that covers `rows` in `log`."""
    return hmac.digest(secret, "\n".join([_PURPOSE, log, task, *map(str, rows)]).encode(), "sha256")


def commit(
    key: bytes,
    fields: Sequence[tuple[str, str]],
    t: NDArray[np.int64],
    columns: Sequence[NDArray[Any]],
    texts: Mapping[str, Mapping[int, str] | Sequence[str]],
) -> str:
    """Return the commitment to rows with times `t` (n,) and one column (n,) per field.

    Covers the fields as JSON, the little-endian bytes of `t` and of each column, and the texts of the category codes
    in use.
    """
    code = hmac.new(key, msgspec.json.encode(fields) + b"\n", "sha256")
    code.update(np.ascontiguousarray(t, "<i8"))
    for (name, kind), column in zip(fields, columns, strict=True):
        code.update(np.ascontiguousarray(column, DTYPES[kind]))
        if kind == "category":
            used = np.unique(column).tolist()
            code.update(msgspec.json.encode([[number, texts[name][number]] for number in used]) + b"\n")
    return _PREFIX + code.hexdigest()


def encode_key(key: bytes) -> str:
    return b64url_encode(key)

"""Columns that come as their bytes: base64 of little-endian numbers, one after another."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from agent.errors import RowRejected

NumberType = Literal["f4", "f8", "i4", "i8"]


def decode_column(name: str, kind: NumberType, data: bytes) -> Any:
    """The values; where NaN is among them a list, in which it is None: a missing value. Raises Rejected."""
    width = int(kind[1])
    if len(data) % width:
        raise RowRejected(f"{name}: {len(data)} bytes are no {kind} values of {width} bytes")
    values = np.frombuffer(data, f"<{kind}")
    # The least is NaN where one is among them: one pass. NaN is no value that equals itself.
    if kind[0] == "f" and len(values) and (least := np.minimum.reduce(values)) != least:
        return [None if value != value else value for value in values.tolist()]
    return values

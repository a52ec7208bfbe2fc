"""Rounding of readings that leave the device: significant digits, then the owner's rules for each field."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float64s
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy

EXACT_DIGITS = 9
# JSON readers take larger ones for an error.
_MAX_VALUE = 1e100


def protect_column(
    name: str, column: NDArray[np.generic], digits: int, privacy: FieldPrivacy, now_us: int
) -> list[float | None] | None:
    """Return the readings (n,) of a field as they may leave; None where a value is missing, or of a private field."""
    # A model reads float32, which nine digits hold.
    read = column.astype(np.float32) if digits >= EXACT_DIGITS else column
    values = round_to_digits(read.astype(np.float64), digits).tolist()
    return privacy.protect_column(name, [value if abs(value) <= _MAX_VALUE else None for value in values], now_us)


def round_to_digits(values: Float64s, digits: int) -> Float64s:
    """Round values (n,) to a number of significant digits; NaN and infinity stay."""
    usable = np.isfinite(values) & (values != 0)
    exponent = np.floor(np.log10(np.abs(values, where=usable, out=np.ones_like(values)))) - (digits - 1)
    # Powers of ten are exact up to 1e22, so that a quotient of integers is the nearest number to the decimal.
    exponent = np.clip(exponent, -300, 300)
    up, down = 10.0 ** np.maximum(exponent, 0), 10.0 ** np.maximum(-exponent, 0)
    return np.where(usable, np.round(values / up * down) / down * up, values)

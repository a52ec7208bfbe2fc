"""Price list: TOML file with prices of a fleet and of a cloud endpoint."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from outstation.foundation.config import toml_files
from outstation.foundation.config.toml_files import Section

_SHIPPED = Path(__file__).with_name("prices.toml")
Price = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class EdgePrices(Section, frozen=True):
    """Prices of a fleet of devices; 0 is not counted."""

    energy_per_kwh: Price = 0.0
    air_per_gb: Price = 0.0
    flash_per_tb: Price = 0.0
    collector_per_month: Price = 0.0


class CloudPrices(Section, frozen=True):
    """Published prices of a cloud that gets the readings and runs the model; `as_of` is the date of the sources."""

    name: Annotated[str, msgspec.Meta(max_length=200)]
    as_of: datetime.date
    messages_per_million: Price
    message_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**30)]
    endpoint_per_hour: Price
    endpoint_count: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1
    sources: tuple[str, ...] = ()


class PriceList(Section, frozen=True, kw_only=True):
    """Prices in `currency`."""

    currency: Annotated[str, msgspec.Meta(min_length=1, max_length=8)] = "USD"
    edge: EdgePrices = EdgePrices()
    cloud: CloudPrices


def load_prices(file: Path | None) -> PriceList:
    """Load a price list, the shipped one without `file`. Raises ConfigError."""
    missing = "`outstation cost --show-prices` prints one to copy"
    return toml_files.read(file or _SHIPPED, PriceList, missing=missing)


def shipped_text() -> str:
    """Return the shipped price list as a file to copy."""
    return _SHIPPED.read_text(encoding="utf-8")

"""Section [broker.metered]: limits of a connection that is billed by the byte."""

from __future__ import annotations

from typing import Annotated

import msgspec

from agent.config.broker import BrokerConfig
from agent.config.day_window import DAY_S, DayWindow
from agent.errors import ConfigError
from agent.quantities import Duration, Size
from agent.toml_files import Section

KEY = "broker.metered"
_MIN_BUDGET, _MAX_BUDGET = 100_000, 10**12
# A message must fit into the part of a day's budget that bulk may use.
_MIN_MESSAGES = 2
_MIN_AGE_S, _MAX_AGE_S = 3600.0, 365 * DAY_S


class MeteredConfig(Section, frozen=True):
    """Limits of what is sent and received.

    `budget`: bytes within 24 h. `windows`: when bulk may be sent. Bulk that waited for `max_age` is given up.
    """

    budget: Size | None = None
    windows: Annotated[list[str], msgspec.Meta(max_length=24)] = msgspec.field(default_factory=list)
    max_age: Duration | None = None

    @property
    def day_windows(self) -> list[DayWindow]:
        """Windows for bulk; none where it may be sent at any time. Raises ValueError."""
        return [DayWindow.parse(text) for text in self.windows]


class UplinkBrokerConfig(BrokerConfig, frozen=True):
    """Section [broker] of a device."""

    metered: MeteredConfig | None = None


def check(file: str, broker: UplinkBrokerConfig) -> None:
    """Check the limits. Raises ConfigError."""
    metered = broker.metered
    if metered is None:
        return
    try:
        _ = metered.day_windows
    except ValueError as problem:
        raise ConfigError(file, f"{KEY}.windows", f"{problem}; omit it to send at any time") from None
    least = max(_MIN_BUDGET, _MIN_MESSAGES * broker.max_message_bytes)
    if metered.budget is not None and not least <= metered.budget <= _MAX_BUDGET:
        raise ConfigError(
            file,
            f"{KEY}.budget",
            f"must be between {least:,} B ({_MIN_MESSAGES} messages of max_message_bytes) and 1000 GB a day; omit it "
            "for no limit",
        )
    if metered.max_age is not None and not _MIN_AGE_S <= metered.max_age <= _MAX_AGE_S:
        raise ConfigError(file, f"{KEY}.max_age", "must be between 1 h and 365 d; omit it to keep everything")

"""Section [broker.metered]: limits of a connection that is billed by the byte."""

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
    """Limits of a connection that is billed by the byte. The section may be empty.

    ```toml
    [broker.metered]
    budget = "5 MB"
    windows = ["01:00-05:00"]
    ```

    - Alerts, audit messages and health messages, then one an hour, go at once, before everything else. Results, drift
      windows and metrics are bulk. Bulk may use 80 % of the budget, and waits for a window.
    - When the whole budget is used up, the device disconnects: being connected costs bytes, too. No message is lost.
    - Bytes are those of the network: the kernel counts TCP/IP headers, TLS, repetitions and acknowledgements. Name
      look-ups and failed attempts without an answer are not counted. The pings of an idle connection take 60 kB a day.
    - 24 h are hours that the device was on, by the boot-time clock: neither a restart nor a clock that is set gives a
      second budget.
    - While the clock is not set, nobody knows when a window opens. Bulk then goes in the first part of each 24 h of
      uptime, as long as all windows together.
    - Given up are `results`, `shadow`, `samples` and `health` messages. Each is declared to the collector in a signed
      audit message, event `evicted` with reason `expired`, and counted. The log stays complete, and `fleet audit`
      passes. Their age is counted in uptime.
    - `outstation status`, health messages (member `metered`) and `outstation check` show what was used, and what holds
      bulk back. `check` warns if the messages of a day take more than the budget.
    """

    budget: Size | None = None
    """Bytes within 24 h, both ways, such as `"5 MB"`; at least two messages of `max_message_bytes`."""
    windows: Annotated[list[str], msgspec.Meta(max_length=24)] = msgspec.field(default_factory=list)
    """Times of the local day when bulk may be sent, such as `["01:00-05:00"]`; without any, at all times."""
    max_age: Duration | None = None
    """Bulk that waited this long is given up, such as `"7 d"`; without it, everything waits."""

    @property
    def day_windows(self) -> list[DayWindow]:
        """Windows for bulk; none where it may be sent at any time. Raises ValueError."""
        return [DayWindow.parse(text) for text in self.windows]


class UplinkBrokerConfig(BrokerConfig, frozen=True):
    metered: MeteredConfig | None = None
    """Limits of a connection that is billed by the byte, see [broker.metered](#brokermetered)."""


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

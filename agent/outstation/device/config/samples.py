"""Section [samples]: the owner's consent to send readings around alerts and uncertain results, and its limits."""

from collections.abc import Collection
from typing import Annotated

import msgspec

from outstation.device.config.tasks import NO_TASK
from outstation.foundation.config.quantities import Size
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError

_MIN_MESSAGE_BYTES, _MAX_MESSAGE_BYTES = 2048, 1 << 19


class SamplesConfig(Section, frozen=True):
    """Consent to send readings around alerts and uncertain results.

    ```toml
    [samples]
    consent = "J. Doe, owner of the site, 2026-11-01"
    uncertain_below = 0.5
    ```

    Without this section no reading leaves the device. It needs `[collector] encryption_key`.
    [Samples](../guides/samples.md) explains it.
    """

    consent: Annotated[str, msgspec.Meta(min_length=10, max_length=200)]
    """Who agreed to send which readings, and when: It goes sealed with each sample, in the clear
    in health, and into the data card."""
    tasks: list[str] = msgspec.field(default_factory=list)
    """Tasks whose readings may be sent; all if empty."""
    on_alert: bool = True
    """Send readings around a result with an alert, and at the end of a drift window with one."""
    on_request: bool = True
    """Send readings around the result that `outstation fleet command DEVICE sample TASK ROW` names."""
    uncertain_below: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    """Send readings around results with a lower score; at most the four least certain of a batch."""
    windows: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    """Model windows sent on either side of the result's; for a model without windows, rows."""
    digits: Annotated[int, msgspec.Meta(ge=1, le=9)] = 4
    """Significant digits of each value; 9 are exactly the numbers that a model reads."""
    max_message: Size = Size(16 << 10)
    """Largest message; a larger sample loses the rows far from its result."""
    max_per_day: Size = Size(256 << 10)
    """Bytes of all samples in 24 h of uptime."""

    def covers(self, task: str) -> bool:
        return not self.tasks or task in self.tasks


def check(file: str, samples: SamplesConfig, tasks: Collection[str]) -> None:
    """Check the section. Raises ConfigError."""
    if not samples.consent.strip():
        raise ConfigError(file, "samples.consent", "is blank; write who agreed to send which readings, and when")
    for name in samples.tasks:
        if name not in tasks:
            raise ConfigError(file, "samples.tasks", f"unknown task {name!r}{did_you_mean(name, tasks, NO_TASK)}")
    if not _MIN_MESSAGE_BYTES <= samples.max_message <= _MAX_MESSAGE_BYTES:
        raise ConfigError(file, "samples.max_message", "must be between 2 KiB and 512 KiB")
    if samples.max_per_day < 2 * samples.max_message:
        problem = f"{int(samples.max_per_day)} bytes are less than twice max_message, {int(samples.max_message)} bytes"
        raise ConfigError(file, "samples.max_per_day", f"{problem}; raise it, or remove [samples] to send no readings")

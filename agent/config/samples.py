"""Section [samples]: the owner's consent to send readings around alerts and uncertain results, and its limits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import msgspec

from agent.errors import ConfigError
from agent.quantities import Size
from agent.toml_files import Section, did_you_mean

_MIN_MESSAGE_BYTES, _MAX_MESSAGE_BYTES = 2048, 1 << 19


class SamplesConfig(Section, frozen=True):
    """Without this section no reading leaves the device. `consent`: who agreed to what, and when.

    A sample covers the model window of a result and `windows` more on either side, `digits` significant digits of each
    value. `uncertain_below`: results with a lower score are sampled. `tasks`: all of them if empty.
    """

    consent: Annotated[str, msgspec.Meta(min_length=10, max_length=200)]
    tasks: list[str] = msgspec.field(default_factory=list)
    on_alert: bool = True
    on_request: bool = True
    uncertain_below: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    windows: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 2
    digits: Annotated[int, msgspec.Meta(ge=1, le=7)] = 4
    max_message: Size = Size(16 << 10)
    max_per_day: Size = Size(256 << 10)

    def covers(self, task: str) -> bool:
        return not self.tasks or task in self.tasks


def check(file: str, samples: SamplesConfig, tasks: Collection[str]) -> None:
    """Check the section. Raises ConfigError."""
    if not samples.consent.strip():
        raise ConfigError(file, "samples.consent", "is blank; write who agreed to send which readings, and when")
    for name in samples.tasks:
        if name not in tasks:
            raise ConfigError(file, "samples.tasks", f"unknown task {name!r}{did_you_mean(name, tasks)}")
    if not _MIN_MESSAGE_BYTES <= samples.max_message <= _MAX_MESSAGE_BYTES:
        raise ConfigError(file, "samples.max_message", "must be between 2 KiB and 512 KiB")
    if samples.max_per_day < 2 * samples.max_message:
        problem = f"{int(samples.max_per_day)} bytes are less than twice max_message, {int(samples.max_message)} bytes"
        raise ConfigError(file, "samples.max_per_day", f"{problem}; raise it, or remove [samples] to send no readings")

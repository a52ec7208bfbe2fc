"""This machine's own condition as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import psutil

from agent import clock
from agent.config import HostSource, StreamConfig
from agent.device.intake.server import SubmitRows
from agent.device.store.rows import RawColumns
from agent.errors import ConfigError
from agent.toml_files import did_you_mean

log = logging.getLogger("outstation.host")


def _read_temperature() -> float | None:
    """°C of the hottest sensor; None where the machine has none."""
    readings = [entry.current for chip in psutil.sensors_temperatures().values() for entry in chip if entry.current]
    return max(readings, default=None)


# Each is given the data folder.
_READERS: dict[str, Callable[[Path], float | None]] = {
    "temperature": lambda _: _read_temperature(),
    "cpu": lambda _: psutil.cpu_percent(None),
    "load1": lambda _: psutil.getloadavg()[0],
    "memory": lambda _: psutil.virtual_memory().percent,
    "disk": lambda data_dir: psutil.disk_usage(str(data_dir)).percent,
    "swap": lambda _: psutil.swap_memory().percent,
    "uptime": lambda _: clock.boot_seconds(),
}


def check_config(file: str, name: str, stream: StreamConfig) -> None:
    """Raises ConfigError where a field of stream `name` is nothing that is read here."""
    for field in stream.fields:
        if field.name not in _READERS:
            problem = f"the host has no {field.name!r}{did_you_mean(field.name, _READERS)}"
            raise ConfigError(file, f"streams.{name}.fields", problem)


class HostMetrics:
    """Reads what the stream's fields name, every so often. A value this machine cannot read is missing."""

    def __init__(self, file: str, name: str, stream: StreamConfig, source: HostSource, data_dir: Path) -> None:
        """Raises ConfigError."""
        check_config(file, name, stream)
        self._name, self._stream, self._interval_s = name, stream, float(source.poll_interval)
        self._data_dir = data_dir
        self._last_warning = ""
        # It counts from one call to the next: the first one would say 0.
        psutil.cpu_percent(None)

    async def run(self, submit_rows: SubmitRows) -> None:
        while True:
            values = {f.name: [self._read_value(f.name)] for f in self._stream.fields}
            outcome = await submit_rows(self._name, RawColumns(1, None, values), None)
            complaint = "; ".join(reason for _, reason in outcome.rejected)
            if complaint and complaint != self._last_warning:
                log.warning("%s: not stored: %s (optional = true allows a missing value)", self._name, complaint)
            self._last_warning = complaint
            await asyncio.sleep(self._interval_s)

    def _read_value(self, name: str) -> float | None:
        try:
            return _READERS[name](self._data_dir)
        except OSError:
            return None

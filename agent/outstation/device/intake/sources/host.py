"""Host metrics as a stream: temperature, load, memory and disk of this machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import psutil

from outstation.device.config import StreamConfig
from outstation.device.config.sources import HostSource
from outstation.device.intake.source import SourceContext, SubmitRows
from outstation.device.store.rows import RawColumns
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import ConfigError

log = logging.getLogger("outstation.host")

# Rows that wait for one commit; the last of them brings it.
_MAX_WAITING = 100


def _read_temperature() -> float | None:
    """Return the temperature of the hottest sensor in °C; None if the machine has none."""
    readings = [entry.current for chip in psutil.sensors_temperatures().values() for entry in chip if entry.current]
    return max(readings, default=None)


# Each gets the data folder.
_READERS: dict[str, Callable[[Path], float | None]] = {
    "temperature": lambda _: _read_temperature(),
    "cpu": lambda _: psutil.cpu_percent(None),
    "load1": lambda _: psutil.getloadavg()[0],
    "memory": lambda _: psutil.virtual_memory().percent,
    "disk": lambda data_dir: psutil.disk_usage(str(data_dir)).percent,
    "swap": lambda _: psutil.swap_memory().percent,
    "uptime": lambda _: clock.boot_seconds(),
}


def check(context: SourceContext, source: HostSource) -> str:
    """Describe the source. Raises ConfigError if a field of the stream is no metric of the host."""
    names = [field.name for field in context.stream.fields]
    for name in names:
        if name not in _READERS:
            problem = f"the host has no {name!r}{did_you_mean(name, _READERS)}"
            raise ConfigError(context.file, f"streams.{context.name}.fields", problem)
    return f"{', '.join(names)} of this machine"


def build(context: SourceContext, source: HostSource, store: Store) -> HostMetrics:
    check(context, source)
    return HostMetrics(context.name, context.stream, source, context.conf.data_dir)


class HostMetrics:
    """Metrics that the stream's fields name, at an interval; a value that this machine cannot read is missing."""

    def __init__(self, name: str, stream: StreamConfig, source: HostSource, data_dir: Path) -> None:
        self._name, self._stream, self._interval_s = name, stream, float(source.poll_interval)
        self._data_dir = data_dir
        self._last_warning = ""
        # It measures from one call to the next: the first one returns 0.
        psutil.cpu_percent(None)

    async def run(self, submit_rows: SubmitRows) -> None:
        waiting = asyncio.Semaphore(_MAX_WAITING)
        async with asyncio.TaskGroup() as submissions:
            while True:
                await waiting.acquire()
                # A commit may take longer than the interval, and one row is not worth a commit of its own.
                submission = submissions.create_task(self._submit_values(submit_rows, is_stalled=waiting.locked()))
                submission.add_done_callback(lambda _: waiting.release())
                await asyncio.sleep(self._interval_s)

    async def _submit_values(self, submit_rows: SubmitRows, *, is_stalled: bool) -> None:
        values = {f.name: [self._read_value(f.name)] for f in self._stream.fields}
        outcome = await submit_rows(self._name, RawColumns(1, None, values), None, is_stalled=is_stalled)
        complaint = "; ".join(reason for _, reason in outcome.rejected)
        if complaint and complaint != self._last_warning:
            log.warning("%s: not stored: %s (optional = true allows a missing value)", self._name, complaint)
        self._last_warning = complaint

    def _read_value(self, name: str) -> float | None:
        try:
            return _READERS[name](self._data_dir)
        except OSError:
            return None

"""Device that fetches bundles: its store, its fetcher with the real child process, and a settable clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from outstation.device import config
from outstation.device.config.config import Config
from outstation.device.config.streams import StreamConfig
from outstation.device.config.tasks import TaskConfig
from outstation.device.config.updates import UpdatesConfig
from outstation.device.recovery.open import open_store
from outstation.device.rollout.fetch import version_floors as floors
from outstation.device.rollout.fetch.fetcher import WORKER_COMMAND, FetchedBundle, Fetcher, FetchFailure
from outstation.device.rollout.fetch.version_floors import VersionFloors
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.protocol.wire.desired_state import DesiredBundle
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import STREAMS

# The child has the lowest priority, and other tests run in parallel.
PATIENCE_S = 90.0
RUNS = b"the bundle that runs"


class Updating:
    """`folder` holds all files of the device; `wall_us` and `quality` are its clock, correct by default."""

    def __init__(
        self, folder: Path, url: str, root: bytes, streams: Mapping[str, StreamConfig] = STREAMS, **updates: Any
    ) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        (folder / "root.json").write_bytes(root)
        self.conf = Config(
            device=config.DeviceConfig(id="pi-07", fleet="acme", data_dir=str(self.data)),
            updates=UpdatesConfig(url=url, root=str(folder / "root.json"), **updates),
            streams=dict(streams),
            tasks={"exercise": TaskConfig(stream="watch", bundle="exercise")},
        )
        self.runs = self.data / "bundles" / "exercise" / "model.tflite"
        self.runs.parent.mkdir(parents=True, exist_ok=True)
        self.runs.write_bytes(RUNS)
        self.store = open_store(self.data)
        with self.store.transaction() as tx:
            # The store creates its own files at the first open.
            tx.set_meta("first", "1")
        self.quality: clock.ClockQuality = "synced"
        self.wall_us: int | None = None
        self.later_s = 0.0
        self.command: Sequence[str] = WORKER_COMMAND
        self.patience_s = 30.0
        self.fetcher = Fetcher(self.conf, self.store)

    def restart(self) -> None:
        """Create a new fetcher, as a restart of the daemon does."""
        self.fetcher.close()
        self.fetcher = Fetcher(self.conf, self.store, command=self.command, stall_timeout_s=self.patience_s)

    def configure(self, **updates: Any) -> None:
        """Apply another [updates] section, as a restart of the daemon does."""
        assert self.conf.updates is not None
        self.conf = msgspec.structs.replace(self.conf, updates=msgspec.structs.replace(self.conf.updates, **updates))
        self.restart()

    def now(self) -> ClockReading:
        wall_us = time.time_ns() // 1000 if self.wall_us is None else self.wall_us
        return ClockReading(
            wall_us, time.monotonic() + self.later_s, self.quality, 1000 if self.quality == "synced" else None
        )

    def fetch(self, wanted: DesiredBundle, within_s: float = PATIENCE_S) -> FetchedBundle | FetchFailure:
        """Run one fetch to its end."""
        self.fetcher.start("exercise", wanted, self.now())
        self.later_s += 100_000.0
        return self.result(within_s)

    def result(self, within_s: float = PATIENCE_S) -> FetchedBundle | FetchFailure:
        results: list[FetchedBundle | FetchFailure | None] = [None]

        def is_over() -> bool:
            results[0] = self.fetcher.poll(self.now())
            return results[0] is not None

        wait_until("the end of the fetch", is_over, within_s)
        assert results[0] is not None
        return results[0]

    def must_fetch(self, wanted: DesiredBundle) -> FetchedBundle:
        result = self.fetch(wanted)
        assert isinstance(result, FetchedBundle), result
        return result

    def must_fail(self, wanted: DesiredBundle, error: str) -> FetchFailure:
        """Check that the fetch fails with this error name and has no side effect."""
        with self.unchanged():
            result = self.fetch(wanted)
            assert isinstance(result, FetchFailure), result
            assert result.error == error, result
        return result

    @property
    def floors(self) -> VersionFloors:
        return floors.load(self.store)

    @property
    def versions(self) -> dict[str, int]:
        return {role: floor.version for role, floor in self.floors.roles.items()}

    @property
    def fetched(self) -> list[str]:
        """Return the names of fetched files."""
        return sorted(path.name for path in (self.data / "bundles" / ".fetched").glob("*"))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check that nothing is installed, no version floor decreases and the active bundle stays."""
        before, had = self.floors, self.fetched
        with self.untouched():
            yield
        for role, floor in before.roles.items():
            assert self.floors.roles[role].version >= floor.version
        assert [name for name in self.fetched if name.endswith(".zip")] == [n for n in had if n.endswith(".zip")]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Check that nothing is written outside the fetcher's folders and the active bundle stays."""
        before = self._others()
        yield
        assert not (new := set(self._others()) - set(before)), new
        assert not (missing := set(before) - set(self._others())), missing
        assert self.runs.read_bytes() == RUNS

    def _others(self) -> list[Path]:
        ours = (self.data / "updates", self.data / "bundles" / ".fetched")
        paths = (path for path in self.folder.parent.rglob("*") if not any(map(path.is_relative_to, ours)))
        return sorted(
            path for path in paths if "web" not in path.parts and not path.name.startswith(("outstation.", "ballast"))
        )

    def close(self) -> None:
        self.fetcher.close()
        self.store.close()

    def __enter__(self) -> Updating:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

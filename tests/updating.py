"""A device that fetches bundles, for tests: its store, its fetcher with the real child, and a clock that can be set."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from agent import clock, config
from agent.clock import Now
from agent.config import Config, Task, Updates
from agent.device.storage.store import Store
from agent.device.updates import child, floors
from agent.device.updates.fetching import Failed, Fetched, Fetcher
from agent.device.updates.floors import Floors
from agent.wire.desired import Wanted
from tests.stations import STREAMS

RUNS = b"the bundle that runs"


class Updating:
    """`folder` is all the device has. `wall_us` and `quality` are its clock, by default a right one."""

    def __init__(self, folder: Path, url: str, root: bytes, **updates: Any) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        (folder / "root.json").write_bytes(root)
        self.conf = Config(
            device=config.Device(id="pi-07", fleet="acme", data_dir=str(self.data)),
            updates=Updates(url=url, root=str(folder / "root.json"), **updates),
            streams=STREAMS,
            tasks={"exercise": Task(stream="watch", bundle="exercise")},
        )
        self.runs = self.data / "bundles" / "exercise" / "model.tflite"
        self.runs.parent.mkdir(parents=True, exist_ok=True)
        self.runs.write_bytes(RUNS)
        self.store = Store(self.data)
        self.quality: clock.Quality = "synced"
        self.wall_us: int | None = None
        self.later_s = 0.0
        self.command: Sequence[str] = child.COMMAND
        self.patience_s = 30.0
        self.fetcher = self.fetching()

    def fetching(self) -> Fetcher:
        """A fetcher as after a start of the daemon."""
        self.fetcher = Fetcher(self.conf, self.store, command=self.command, patience_s=self.patience_s)
        return self.fetcher

    def now(self) -> Now:
        wall_us = time.time_ns() // 1000 if self.wall_us is None else self.wall_us
        return Now(wall_us, time.monotonic() + self.later_s, self.quality, 1000 if self.quality == "synced" else None)

    def fetch(self, wanted: Wanted, within_s: float = 20.0) -> Fetched | Failed:
        """One try, from its start to its end."""
        self.fetcher.start("exercise", wanted, self.now())
        self.later_s += 100_000.0
        return self.result(within_s)

    def result(self, within_s: float = 20.0) -> Fetched | Failed:
        deadline = time.monotonic() + within_s
        while (found := self.fetcher.poll(self.now())) is None:
            assert time.monotonic() < deadline, f"no answer within {within_s:g} s"
            time.sleep(0.01)
        return found

    def must_fetch(self, wanted: Wanted) -> Fetched:
        found = self.fetch(wanted)
        assert isinstance(found, Fetched), found
        return found

    def must_fail(self, wanted: Wanted, error: str) -> Failed:
        """It must fail by this name, and nothing must be the worse for it."""
        with self.unharmed():
            found = self.fetch(wanted)
            assert isinstance(found, Failed), found
            assert found.error == error, found
        return found

    @property
    def floors(self) -> Floors:
        return floors.load(self.store)

    @property
    def versions(self) -> dict[str, int]:
        return {role: floor.version for role, floor in self.floors.roles.items()}

    @property
    def fetched(self) -> list[str]:
        """Names of what was fetched."""
        return sorted(path.name for path in (self.data / "bundles" / ".fetched").glob("*"))

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """No floor falls meanwhile, no archive appears, and what runs stays as it is."""
        before, had = self.floors, [name for name in self.fetched if name.endswith(".zip")]
        yield
        after = self.floors
        assert after.anchor in (before.anchor, after.anchor if not before.anchor else before.anchor)
        for role, floor in before.roles.items():
            assert after.roles[role].version >= floor.version
        assert [name for name in self.fetched if name.endswith(".zip")] == had
        assert self.runs.read_bytes() == RUNS

    def close(self) -> None:
        self.fetcher.close()
        self.store.close()

    def __enter__(self) -> Updating:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_updates(conf: Config, **changed: Any) -> Config:
    assert conf.updates is not None
    return msgspec.structs.replace(conf, updates=msgspec.structs.replace(conf.updates, **changed))

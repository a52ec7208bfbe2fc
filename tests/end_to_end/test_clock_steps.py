"""The wall clock is set while the device runs: nothing bursts, nothing stops, no run is lost or doubled."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apscheduler.triggers.cron import CronTrigger

from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.daemon import Daemon
from outstation.device.pipeline import batch
from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.protocol.client import Client
from outstation.workbench.testing.fleet import FIELDS, DeviceProcess, LocalFleet, field_tables
from outstation.workbench.testing.patience import wait_until
from tests.kit.commands import audit_fleet

LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
HOUR_S, DAY_S = 3600, 86_400
SECOND, MINUTE = 1_000_000, 60_000_000
STEPS_S = [-HOUR_S, HOUR_S, 60 * DAY_S, 730 * DAY_S, -700 * DAY_S]
TASKS = {"minutely": "every 60 s", "cron": "*/5 * * * *", "nightly": "0 3 * * *", "rows": "when 500 rows"}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        yield made


class Turned:
    """A real daemon, its loop turned by hand in virtual time; `runs` and `work` count what it did."""

    def __init__(self, device: DeviceProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        device.append_config(f"[streams.watch]\nfields = [{', '.join(field_tables(FIELDS))}]\n")
        for name, schedule in TASKS.items():
            device.add_task(name, schedule=schedule)
        self.file, self.conf = load_config(str(device.config))
        self.store: Store = open_store(self.conf)
        self.daemon: Daemon = build_daemon(self.file, self.conf, self.store)
        self.runs: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.wall_us = clock.parse_rfc3339("2026-11-24T22:00:30Z")
        self.boot_s = 1000.0
        monkeypatch.setattr(batch, "run", self._counted("batches", batch.run))
        monkeypatch.setattr(CronTrigger, "get_next_fire_time", self._counted("times", CronTrigger.get_next_fire_time))
        monkeypatch.setattr(Store, "transaction", self._counted("commits", Store.transaction))
        for planned in self.daemon._scheduled_tasks:
            planned.schedule.record_run = self._noted(planned.task.name, planned.schedule.record_run)  # type: ignore[assignment]

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.work[name] += 1
            return call(*args, **kwargs)

        return counting

    def _noted(self, task: str, ran: Callable[[ClockReading], bool]) -> Callable[[ClockReading], bool]:
        def noting(now: ClockReading) -> bool:
            self.runs[task] += 1
            return ran(now)

        return noting

    def live(self, seconds: float) -> None:
        """The loop for a while: each turn when the one before asked for it."""
        end = self.boot_s + seconds
        while self.boot_s < end:
            before = self.work.copy()
            wait = self.daemon.tick(ClockReading(self.wall_us, self.boot_s, "restored"))
            for name in self.work:
                self.most[name] = max(self.most[name], self.work[name] - before[name])
            passed = min(max(wait, 0.05), 5.0)
            self.boot_s += passed
            self.wall_us += round(passed * 1e6)

    def step(self, seconds: float) -> None:
        self.wall_us += round(seconds * 1e6)


@pytest.fixture
def turned(fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Turned]:
    made = Turned(fleet.add_device("pi-01"), monkeypatch)
    yield made
    made.store.close()


def test_no_step_of_the_wall_clock_makes_runs_burst_or_a_turn_long(turned: Turned) -> None:
    turned.live(60)
    for step in STEPS_S:
        turned.runs.clear()
        turned.most.clear()
        turned.step(step)
        turned.live(900)
        # One more for what a step forward passed over, never one for each time that it passed.
        assert 14 <= turned.runs["minutely"] <= 16, step
        assert 2 <= turned.runs["cron"] <= 4, step
        assert turned.runs["nightly"] <= 2, step
        assert turned.runs["rows"] == 0, step
        # What one turn did, whatever lay between the clock before and after: a look-up for each cron task and a few.
        assert turned.most["times"] <= 8, (step, turned.most)
        assert turned.most["batches"] <= len(TASKS), (step, turned.most)
        assert turned.most["commits"] <= 20, (step, turned.most)


def test_runs_between_two_cron_times_write_no_state_and_a_stop_saves_the_last_one(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "minutely", "every 60 s or 30 3 * * *")
    turned, saved = Turned(fleet.add_device("pi-01"), monkeypatch), Counter[str]()
    save = Transaction.save_state

    def noting(tx: Transaction, task: str, name: str, value: bytes) -> None:
        saved[f"{task} {name}"] += 1
        save(tx, task, name, value)

    monkeypatch.setattr(Transaction, "save_state", noting)
    turned.live(3600)
    assert turned.runs["minutely"] >= 60
    assert saved[f"minutely {task_keys.LAST_RUN}"] == 1
    assert saved[f"cron {task_keys.LAST_RUN}"] == turned.runs["cron"]
    turned.daemon._save_last_runs(turned.daemon._scheduled_tasks)
    last = int(turned.store.load_state("minutely", task_keys.LAST_RUN) or 0)
    assert turned.wall_us - last < 2 * MINUTE
    turned.store.close()


# --- a real process


def preload() -> Path:
    libraries = [path for pattern in LIBRARIES for path in sorted(Path("/").glob(pattern[1:]))]
    if not libraries:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("faketime is not installed; see scripts/setup system")
    return libraries[0]


class FakeTime:
    """Wall clock of one process; its boot-time clock stays unchanged."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.environment = {
            "LD_PRELOAD": str(preload()),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",
            "NO_FAKE_STAT": "1",
        }
        self.ahead(0)

    def ahead(self, seconds: int) -> None:
        """From now on wall time is true time + `seconds`."""
        following = self._file.with_suffix(".next")
        following.write_text(f"{seconds:+d}\n", encoding="ascii")
        following.replace(self._file)


def send(client: Client, n: int = 100) -> None:
    """Rows that the agent stamps."""
    for _ in range(n):
        client.send("watch", **dict.fromkeys(FIELDS, 0.5))
    assert not client.flush().rejected


def test_clock_steps_back_and_ahead_lose_and_repeat_no_run(
    fleet: LocalFleet,
) -> None:
    fleet.broker.start()
    fleet.collector.start()
    device = fleet.add_device("pi-01").append_config(
        f'[buffer]\ncommit_every = "50 ms"\n[streams.watch]\nfields = [{", ".join(field_tables(FIELDS))}]\n'
    )
    device.add_task("exercise", schedule="every 200 ms")
    face = FakeTime(fleet.folder / "faketime")
    device.start_and_wait(**face.environment)
    began, used = time.monotonic(), cpu_s(device.pid)
    with Client(device.data_dir / "intake.sock", name="rig") as client:
        for rounds, ahead in enumerate((0, -HOUR_S, 60 * DAY_S, 0), start=1):
            face.ahead(ahead)
            for _ in range(2):
                send(client)
                time.sleep(0.2)
            wait_until("every row run", lambda n=rounds: fleet.last_result_row("pi-01") == 200 * n)  # type: ignore[misc]
    busy = (cpu_s(device.pid) - used) / (time.monotonic() - began)
    anchors = fleet.query("SELECT segment, step_us FROM anchors ORDER BY seq")
    assert [(segment, round(step / 1e6)) for segment, step in anchors] == [
        (1, 0),
        (2, -HOUR_S),
        (3, 60 * DAY_S + HOUR_S),
        (1, -60 * DAY_S),
    ]
    # No time service vouches for this clock, so nothing is claimed: but order and distance by boot time are right.
    rows = fleet.query("SELECT row, boot_us, time_quality FROM results_dated ORDER BY row")
    assert [row[0] for row in rows] == list(range(100, 801, 100))
    distances = [later[1] - earlier[1] for earlier, later in itertools.pairwise(rows)]
    assert all(0 < distance < 5 * MINUTE for distance in distances)
    runs = fleet.query("SELECT count(*) FROM messages WHERE kind = 'results'")[0][0]
    assert 4 <= runs <= 5 * (time.monotonic() - began) + 1
    # The step of 60 days passes 26 million intervals of 200 ms over.
    assert busy < 0.8
    assert device.stop() == 0
    code, report = audit_fleet(fleet.home)
    assert (code, report["passed"], report["duplicates"]) == (0, True, 0)


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

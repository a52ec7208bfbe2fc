"""Daemon, one tick at a time: due tasks run, used readings go, and a missed run is made up for once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.device import config
from outstation.device import daemon as daemon_module
from outstation.device.batch_parts import batch_size
from outstation.device.bootstrap.daemon import build_daemon, load_scheduled_tasks
from outstation.device.bootstrap.device import load_config, open_store
from outstation.device.capacity.space import SpaceManager
from outstation.device.config.config import Config
from outstation.device.daemon import Daemon
from outstation.device.machine import heap
from outstation.device.pipeline import batch
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.recovery import open as recovery
from outstation.device.signals import Signals
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from outstation.workbench.testing.messages import new_key
from tests.kit.stations import T0, conf

# Real starts, as users and systemd do it.
pytestmark = pytest.mark.exec

NOW = clock.ClockReading(round(T0 * 1e6) + 48 * 3_600_000_000, 200_000.0, "synced")


def fill(store: Store, conf: Config, rows: int = 1000) -> None:
    """Rows of T0 in stream `watch`, two days before NOW."""
    store.declare_streams(conf.streams)
    t = round(T0 * 1e6) + np.arange(rows, dtype=np.int64) * 20_000
    with store.transaction() as tx:
        tx.append("watch", Rows(t, (np.zeros(rows, "<f4"), np.zeros(rows, "<f4"))), "synced")


def with_task(base: Config) -> Config:
    task = config.TaskConfig(stream="watch", bundle="exercise")
    return Config(device=base.device, buffer=base.buffer, streams=base.streams, tasks={"exercise": task})


def trim(conf: Config, store: Store, now: clock.ClockReading) -> None:
    """Free space as the daemon does every ten seconds."""
    author = MessageLog("acme", "pi-07", new_key(1), store.log_id, store.boot, 120_000)
    SpaceManager(conf, store, author, lambda _: None, set).tick(now)


def test_old_readings_of_a_stream_without_a_task_go(tmp_path: Path) -> None:
    store = recovery.open_store(tmp_path)
    fill(store, conf(tmp_path))
    trim(conf(tmp_path), store, NOW)
    assert (store.first_row("watch"), store.last_row("watch")) == (1001, 1000)
    store.close()


def test_readings_that_a_task_has_yet_to_use_stay_however_old_they_are(tmp_path: Path) -> None:
    store = recovery.open_store(tmp_path)
    waiting = with_task(conf(tmp_path))
    fill(store, waiting)
    trim(waiting, store, NOW)
    assert store.first_row("watch") == 1
    with store.transaction() as tx:
        tx.advance_cursor("exercise", 1, 1000)
    trim(waiting, store, NOW)
    assert store.first_row("watch") == 1001
    store.close()


def test_a_used_reading_stays_for_a_while(tmp_path: Path) -> None:
    store = recovery.open_store(tmp_path)
    fill(store, conf(tmp_path))
    trim(conf(tmp_path), store, clock.ClockReading(round(T0 * 1e6) + 3_600_000_000, 1.0, "synced"))
    assert store.first_row("watch") == 1
    store.close()


def test_a_step_forward_of_the_wall_clock_makes_no_reading_old(tmp_path: Path) -> None:
    store, boot_s = recovery.open_store(tmp_path), 200_000.0
    store.declare_streams(conf(tmp_path).streams)
    t = NOW.wall_us + np.arange(1000, dtype=np.int64) * 20_000
    with store.transaction() as tx:
        rows = Rows(t, (np.zeros(1000, "<f4"), np.zeros(1000, "<f4")))
        tx.append("watch", rows, "synced", boot_us=round(boot_s * 1e6))
    for later_s, stepped_s in ((60.0, 0.0), (70.0, 1e9), (86_000.0, 1e9)):
        trim(
            conf(tmp_path),
            store,
            clock.ClockReading(NOW.wall_us + round((later_s + stepped_s) * 1e6), boot_s + later_s, "synced"),
        )
        assert store.first_row("watch") == 1
    trim(conf(tmp_path), store, clock.ClockReading(NOW.wall_us + round(86_500 * 1e6), boot_s + 86_500, "synced"))
    assert store.first_row("watch") == 1001
    store.close()


CRON = """
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"
[streams.watch]
fields = [{ name = "ax" }, { name = "ay" }, { name = "az" }, { name = "wx" }, { name = "wy" }, { name = "wz" }]
[tasks.exercise]
stream = "watch"
bundle = "exercise"
schedule = "0 3 * * *"
"""


def test_a_missed_nightly_run_is_due_at_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(CRON, encoding="utf-8")
    _, conf = load_config(str(file))
    store = open_store(conf)
    ((fresh,), _) = load_scheduled_tasks(file, conf, store)
    assert not fresh.schedule.is_due(NOW, 0)
    with store.transaction() as tx:
        tx.save_state("exercise", task_keys.LAST_RUN, str(NOW.wall_us - 30 * 3_600_000_000).encode())
    ((late,), _) = load_scheduled_tasks(file, conf, store)
    assert late.schedule.is_due(NOW, 0)
    late.schedule.record_run(NOW)
    assert not late.schedule.is_due(NOW, 0)
    store.close()


def test_a_store_that_holds_another_devices_messages_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(CRON, encoding="utf-8")
    open_store(load_config(str(file))[1]).close()
    file.write_text(CRON.replace('"pi-07"', '"pi-08"'), encoding="utf-8")
    with pytest.raises(UsageError, match=r"belongs to acme/pi-07.*data_dir of its own"):
        open_store(load_config(str(file))[1])
    file.write_text(CRON, encoding="utf-8")
    open_store(load_config(str(file))[1]).close()


# --- one task must not stop the others, nor a backlog everything else ---


TWO = (
    CRON.replace('schedule = "0 3 * * *"', 'schedule = "every 60 s"')
    + """
[tasks.other]
stream = "watch"
bundle = "exercise"
schedule = "every 60 s"
[collector]
delivery = "broker"
"""
)


class Turned:
    """A real daemon of two tasks, its loop turned by hand; its clock goes on by `look_s` with each look at it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "outstation.toml"
        self.file.write_text(TWO, encoding="utf-8")
        keys.generate(folder / "device.key")
        _, self.conf = load_config(str(self.file))
        self.store = open_store(self.conf)
        self.boot_s, self.look_s = 1000.0, 0.0
        self.daemon: Daemon = build_daemon(self.file, self.conf, self.store, now=self.now)

    def now(self) -> clock.ClockReading:
        self.boot_s += self.look_s
        return clock.ClockReading(NOW.wall_us + round(self.boot_s * 1e6), self.boot_s, "synced")

    def feed(self, rows: int) -> None:
        t = NOW.wall_us + (self.store.last_row("watch") + np.arange(rows, dtype=np.int64)) * 20_000
        with self.store.transaction() as tx:
            tx.append("watch", Rows(t, tuple(np.zeros(rows, "<f4") for _ in range(6))), "synced")

    def turn(self, after_s: float = 0.0) -> float:
        self.boot_s += after_s
        return self.daemon.tick(self.now())

    def alerts(self) -> list[tuple[str, str]]:
        bodies = [json.loads(message.payload) for message in self.store.unacknowledged_messages(0, 10_000)]
        return [(body["task"], body["state"]) for body in bodies if body.get("alert") == "model"]


@pytest.fixture
def turned(tmp_path: Path) -> Iterator[Turned]:
    made = Turned(tmp_path)
    yield made
    made.store.close()


def test_a_task_with_an_unexpected_error_backs_off_and_the_other_goes_on(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried, broken = batch.run, [], [True]

    def run(task: LoadedTask, *rest: Any) -> batch.BatchResult | None:
        if task.name == "exercise":
            tried.append(turned.boot_s)
            if broken[0]:
                raise ValueError("rows up to 1500 were judged before")
        return real(task, *rest)

    monkeypatch.setattr(batch, "run", run)
    turned.feed(1000)
    for _ in range(90):
        turned.turn(after_s=10.0)
    waits = np.diff(tried)
    assert list(waits[:7]) == [10.0, 10.0, 10.0, 10.0, 20.0, 40.0, 70.0]
    assert (turned.store.cursor("exercise"), turned.store.cursor("other")) == (None, 1000)
    assert turned.alerts() == [("exercise", "raised")]
    assert turned.daemon._list_stalled_tasks() == {"exercise"}
    broken[0] = False
    for _ in range(100):
        turned.turn(after_s=10.0)
    assert turned.store.cursor("exercise") == 1000
    assert turned.alerts() == [("exercise", "raised"), ("exercise", "cleared")]
    assert turned.daemon._list_stalled_tasks() == set()


def test_rows_wake_the_main_loop_where_a_task_counts_them_or_space_is_short(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes: list[bool] = []
    monkeypatch.setattr(Signals, "wake", lambda _: wakes.append(True))
    committed = turned.daemon.intake._on_committed
    committed()
    assert wakes == []
    monkeypatch.setattr(Store, "used_bytes", lambda store: int(store.limit_bytes() * 0.86))
    committed()
    assert wakes == [True]


def test_a_backlog_leaves_time_for_commands_clock_health_and_other_tasks(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = batch.run

    def run(task: LoadedTask, *rest: Any) -> batch.BatchResult | None:
        done.append(task.name)
        turned.boot_s += 0.6
        return real(task, *rest)

    monkeypatch.setattr(batch, "run", run)
    monkeypatch.setattr(batch_size, "_BATCH_WINDOWS", 4)
    monkeypatch.setattr(batch_size, "_BATCH_ROWS", 4)
    monkeypatch.setattr(turned.daemon._remote_commands, "tick", lambda now: done.append("commands"))
    monkeypatch.setattr(turned.daemon._health_reporter, "write_health", lambda: done.append("health"))
    turned.feed(32_000)
    assert turned.turn() == 0.0
    assert [name for name in done if name != "health"] == ["commands", "exercise", "exercise", "other", "other"]
    for _ in range(100):
        turned.turn()
    assert turned.store.cursor("exercise") == turned.store.cursor("other") == 32_000
    assert done.count("commands") == 101
    assert done.count("health") > 1
    assert turned.turn() > 0.0


def test_rows_that_arrive_during_a_run_wait_for_the_next_one(turned: Turned, monkeypatch: pytest.MonkeyPatch) -> None:
    real, arrivals = batch.run, [500] * 5

    def run(task: LoadedTask, *rest: Any) -> batch.BatchResult | None:
        if task.name == "exercise" and arrivals:
            turned.feed(arrivals.pop())
        return real(task, *rest)

    monkeypatch.setattr(batch, "run", run)
    turned.feed(1000)
    assert turned.turn() > 0, "nothing is left to do at once"
    assert len(arrivals) == 4
    turned.turn(60)
    assert (turned.store.cursor("exercise"), len(arrivals)) == (2000, 3)


def test_a_wait_does_not_begin_only_when_the_work_of_other_tasks_is_done(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tick(now: clock.ClockReading) -> float:
        # Another task takes most of the tenth of a second that a run may wait for more rows.
        turned.boot_s += 0.08
        return 0.1

    waits: list[float] = []

    def wait(signals: Signals, timeout_s: float) -> None:
        waits.append(timeout_s)
        signals.request_stop()

    monkeypatch.setattr(Signals, "wait", wait)
    monkeypatch.setattr(turned.daemon, "tick", tick)
    turned.daemon.run()
    assert waits == [pytest.approx(0.02)]


def test_the_memory_of_a_backlog_that_takes_several_time_slices_is_given_back(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases: list[int | None] = []
    monkeypatch.setattr(batch_size, "_BATCH_WINDOWS", 4)
    monkeypatch.setattr(daemon_module, "_MANY_ROWS", 14_000)
    monkeypatch.setattr(heap, "release_free", lambda: releases.append(turned.store.cursor("other")))
    turned.feed(8000)
    # One batch a slice: none of them has that many rows.
    turned.look_s = 0.5
    for _ in range(200):
        turned.turn()
    assert releases == [8000]


def test_tasks_wait_while_the_machine_is_too_hot(turned: Turned, monkeypatch: pytest.MonkeyPatch) -> None:
    heat = [91.0]
    monkeypatch.setattr(turned.daemon.throttle, "_read_temperature", lambda: heat[0])
    turned.feed(1000)
    for _ in range(12):
        turned.turn(after_s=10.0)
    assert turned.store.cursor("exercise") is None
    alerts = [
        json.loads(m.payload) for m in turned.store.unacknowledged_messages(0, 10_000) if m.topic.endswith("/health")
    ]
    assert alerts[-1]["throttle"] == {
        "temperature": 91.0,
        "resting": "91 °C; more than 80 °C ([throttle] max_temperature), until 75 °C",
    }
    heat[0] = 60.0
    turned.turn(after_s=10.0)
    assert turned.store.cursor("exercise") == turned.store.cursor("other") == 1000
    assert turned.alerts() == []


def test_a_warm_machine_works_off_its_backlog_in_a_quarter_of_the_time(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    heat, busy_s, real = [78.0], [0.0], batch.run

    def run(task: LoadedTask, *rest: Any) -> batch.BatchResult | None:
        turned.boot_s += 0.6
        busy_s[0] += 0.6
        return real(task, *rest)

    monkeypatch.setattr(batch, "run", run)
    monkeypatch.setattr(batch_size, "_BATCH_WINDOWS", 4)
    monkeypatch.setattr(batch_size, "_BATCH_ROWS", 4)
    monkeypatch.setattr(turned.daemon.throttle, "_read_temperature", lambda: heat[0])
    turned.feed(32_000)
    start_s = turned.boot_s
    while turned.store.cursor("other") != 32_000:
        wait = turned.turn()
        assert wait <= 5.0, "commands and health do not wait for the rest"
        turned.boot_s += wait
    assert turned.store.cursor("exercise") == 32_000
    assert busy_s[0] / (turned.boot_s - start_s) == pytest.approx(0.25, abs=0.04)
    assert turned.daemon.throttle.status.to_dict() == {
        "temperature": 78.0,
        "slowed": "78 °C; more than 75 °C ([throttle] slow_temperature), until 70 °C",
    }


def test_a_paused_task_does_not_go_on_with_its_backlog(turned: Turned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_BATCH_WINDOWS", 4)
    monkeypatch.setattr(batch_size, "_BATCH_ROWS", 4)
    turned.feed(8000)
    turned.look_s = 0.5
    assert turned.turn() == 0.0
    used = turned.store.cursor("exercise")
    assert used is not None
    assert used < 8000
    for planned in turned.daemon._scheduled_tasks:
        planned.paused = True
    turned.turn()
    assert turned.store.cursor("exercise") == used

"""The daemon, one turn at a time: what is due runs, what is used goes, what was missed is made up for once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent import clock, config
from agent.cli import wiring
from agent.config import Config
from agent.device.author import Author
from agent.device.storage.rows import Rows
from agent.device.storage.space import Space
from agent.device.storage.store import Store
from agent.errors import UsageError
from tests.senders import new_key
from tests.stations import T0, conf

NOW = clock.Now(round(T0 * 1e6) + 48 * 3_600_000_000, 1000.0, "synced")


def fill(store: Store, conf: Config, rows: int = 1000) -> None:
    """Rows of T0 in stream `watch`, two days before NOW."""
    store.declare(conf.streams)
    t = round(T0 * 1e6) + np.arange(rows, dtype=np.int64) * 20_000
    with store.transaction() as tx:
        tx.append("watch", Rows(t, (np.zeros(rows, "<f4"), np.zeros(rows, "<f4"))), "synced")


def with_task(base: Config) -> Config:
    task = config.Task(stream="watch", bundle="exercise")
    return Config(device=base.device, buffer=base.buffer, streams=base.streams, tasks={"exercise": task})


def trim(conf: Config, store: Store, now: clock.Now) -> None:
    """What the daemon does every ten seconds, with no task that needs help."""
    author = Author("acme", "pi-07", new_key(1), store.log_id, store.boot, 120_000)
    Space(conf, store, author, lambda _: None, set).turn(now)


def test_old_readings_of_a_stream_without_a_task_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, conf(tmp_path))
    trim(conf(tmp_path), store, NOW)
    assert (store.first_row("watch"), store.last_row("watch")) == (1001, 1000)
    store.close()


def test_readings_that_a_task_has_yet_to_use_stay_however_old_they_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    waiting = with_task(conf(tmp_path))
    fill(store, waiting)
    trim(waiting, store, NOW)
    assert store.first_row("watch") == 1
    with store.transaction() as tx:
        tx.advance("exercise", 1, 1000)
    trim(waiting, store, NOW)
    assert store.first_row("watch") == 1001
    store.close()


def test_a_used_reading_stays_for_a_while(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, conf(tmp_path))
    trim(conf(tmp_path), store, clock.Now(round(T0 * 1e6) + 3_600_000_000, 1.0, "synced"))
    assert store.first_row("watch") == 1
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


def test_a_nightly_run_that_was_missed_while_the_agent_was_off_is_due_at_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(CRON, encoding="utf-8")
    _, conf = wiring.load(str(file))
    store = wiring.open_store(conf)
    ((fresh,), _) = wiring.planned(file, conf, store)
    assert not fresh.schedule.due(NOW, 0)
    with store.transaction() as tx:
        tx.keep("exercise", "last run", str(NOW.wall_us - 30 * 3_600_000_000).encode())
    ((late,), _) = wiring.planned(file, conf, store)
    assert late.schedule.due(NOW, 0)
    late.schedule.ran(NOW)
    assert not late.schedule.due(NOW, 0)
    store.close()


def test_a_store_that_holds_another_devices_messages_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(CRON, encoding="utf-8")
    wiring.open_store(wiring.load(str(file))[1]).close()
    file.write_text(CRON.replace('"pi-07"', '"pi-08"'), encoding="utf-8")
    with pytest.raises(UsageError, match=r"of acme/pi-07.*data_dir of its own"):
        wiring.open_store(wiring.load(str(file))[1])
    file.write_text(CRON, encoding="utf-8")
    wiring.open_store(wiring.load(str(file))[1]).close()

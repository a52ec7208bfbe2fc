"""Cursor repair: a task whose cursor was lost goes on, raises an alert, and tests no row twice."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_message_log
from outstation.device.daemon import Daemon
from outstation.device.pipeline import cursor_repair
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store.store import Store
from outstation.ml.drift.state import DriftState
from tests.device.pipeline.test_relearn import NOW, Site, work

PAGE = 4096


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def bodies(store: Store, kind: str) -> list[dict[str, Any]]:
    document = [json.loads(message.payload) for message in store.unacknowledged_messages(0, 10_000)]
    return [body for body in document if body["kind"] == kind]


def rows_run(store: Store) -> list[int]:
    """Return each row as often as a result message covers it."""
    return [row for body in bodies(store, "results") for row in range(body["rows"][0], body["rows"][1] + 1)]


def loaded(site: Site, store: Store) -> LoadedTask:
    return tasks.load_task(site.file, site.conf, store, "exercise")


def drift_of(task: LoadedTask) -> DriftState:
    assert task.drift is not None
    return task.drift.state


def test_a_cursor_behind_the_drift_state_is_repaired_once_with_an_alert(site: Site) -> None:
    store = site.open()
    used = work(site, store, 2)
    assert used.drift is not None
    true = store.cursor("exercise")
    assert true is not None
    with store.transaction() as tx:
        tx.advance_cursor("exercise", 1, 700)
    task, author = loaded(site, store), open_message_log(site.file, site.conf, store)
    assert cursor_repair.repair_cursor(task, store, author, NOW)
    assert not cursor_repair.repair_cursor(task, store, author, NOW)
    assert store.cursor("exercise") == true
    (alert,) = bodies(store, "alerts")
    assert (alert["alert"], alert["severity"], alert["evidence"]["cursor"]) == ("storage", "critical", 700)
    work(site, store, 1)
    rows = rows_run(store)
    assert rows == list(range(1, len(rows) + 1))
    store.close()


def test_a_cursor_where_batches_leave_it_is_left_alone(site: Site) -> None:
    store = site.open()
    author = open_message_log(site.file, site.conf, store)
    for n in range(1, 4):
        work(site, store, n)
        assert not cursor_repair.repair_cursor(loaded(site, store), store, author, NOW)
    assert bodies(store, "alerts") == []
    store.close()


def test_where_rows_are_numbered_from_anew_the_judge_takes_them(site: Site) -> None:
    store = site.open()
    seen = drift_of(work(site, store, 2))
    with store.transaction() as tx:
        tx.connection.execute("UPDATE streams SET next_row = 1")
        tx.connection.execute("DELETE FROM chunks")
        tx.connection.execute("DELETE FROM cursors")
    task, author = loaded(site, store), open_message_log(site.file, site.conf, store)
    assert cursor_repair.repair_cursor(task, store, author, NOW)
    assert task.drift is not None
    assert (task.drift.state.last_counted_row, task.drift.state.index) == (-1, seen.index)
    after = drift_of(work(site, store, 1))
    assert after.last_counted_row > 1000
    store.close()


def test_a_daemon_with_lost_cursors_and_an_old_watermark_goes_on(site: Site, tmp_path: Path) -> None:
    store = site.open()
    work(site, store, 1)
    early = tmp_path / "early"
    shutil.copyfile(store.path.parent / "watermark", early)
    work(site, store, 1)
    with store.transaction() as tx:
        # Delivered long ago: nothing in the outbox tells of these rows.
        tx.connection.execute("DELETE FROM outbox")
    true, path = store.cursor("exercise"), store.path
    store.close()
    with closing(sqlite3.connect(path)) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'cursors'").fetchone()[0]
    data = bytearray(path.read_bytes())
    data[(page - 1) * PAGE : page * PAGE] = b"\xff" * PAGE
    path.write_bytes(data)
    shutil.copyfile(early, path.parent / "watermark")
    (path.parent / "damaged").write_text("{}")
    store = site.open()
    daemon = made(site, store)
    daemon.tick(NOW)
    assert daemon._list_stalled_tasks() == set()
    assert store.cursor("exercise") == true
    store.close()


def made(site: Site, store: Store) -> Daemon:
    text = site.config.read_text(encoding="utf-8")
    site.config.write_text(text.replace('delivery = "collector"', 'delivery = "broker"'), encoding="utf-8")
    site.file, site.conf = load_config(str(site.config))
    return build_daemon(site.file, site.conf, store, now=lambda: NOW)

"""A device whose data folder was restored, damaged or deleted between two starts, in a whole system."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from tests.kit.commands import audit_fleet

ENDLESS = 10**9


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        made.broker.start()
        made.collector.start()
        yield made


def logs(fleet: LocalFleet) -> list[str]:
    return [row[0] for row in fleet.query("SELECT log FROM logs ORDER BY rowid")]


def test_a_data_folder_restored_from_an_image_begins_a_new_log(fleet: LocalFleet, tmp_path: Path) -> None:
    device = fleet.add_device("pi-01").add_replay_stream(ENDLESS, 20).add_task("exercise").start_and_wait()
    wait_until("results at the collector", lambda: fleet.last_result_row("pi-01") > 100)
    assert device.stop() == 0
    shutil.copytree(device.data_dir, tmp_path / "image", ignore=shutil.ignore_patterns("intake.sock"))
    before = fleet.last_result_row("pi-01")
    device.start_and_wait()
    wait_until("more results", lambda: fleet.last_result_row("pi-01") > before + 100)
    device.kill()
    shutil.rmtree(device.data_dir)
    shutil.copytree(tmp_path / "image", device.data_dir)
    device.start_and_wait()
    wait_until("a new log", lambda: len(logs(fleet)) == 2)
    _, new = logs(fleet)
    results = "SELECT count(*) FROM results WHERE log = ?"
    wait_until("results in the new log", lambda: fleet.query(results, new)[0][0] > 2)
    assert device.is_running
    assert device.stop() == 0
    wait_until("everything arrived", lambda: fleet.query("SELECT state FROM devices") == [("stopped",)])
    code, report = audit_fleet(fleet.home)
    assert (code, report["passed"]) == (0, True), report
    assert fleet.query("SELECT count(*) FROM refusals WHERE reason = 'conflicting payload'") == [(0,)]
    [(summary,)] = fleet.query("SELECT summary FROM alerts WHERE alert = 'storage' AND severity = 'critical'")
    assert "restored from an old copy" in summary


def test_a_damaged_store_is_salvaged_and_the_audit_passes(fleet: LocalFleet) -> None:
    device = fleet.add_device("pi-01").add_replay_stream(ENDLESS, 20).add_task("exercise").start_and_wait()
    wait_until("results at the collector", lambda: fleet.last_result_row("pi-01") > 100)
    # Stopped once, so that most of it is in the database and not in its log.
    assert device.stop() == 0
    first = fleet.last_result_row("pi-01")
    device.start_and_wait()
    wait_until("more results", lambda: fleet.last_result_row("pi-01") > first + 100)
    device.kill()
    data = bytearray((device.data_dir / "outstation.db").read_bytes())
    for page in range(4096, len(data), 2 * 4096):
        data[page + 20 : page + 4000] = bytes(3980)
    (device.data_dir / "outstation.db").write_bytes(data)
    before = fleet.last_result_row("pi-01")
    device.start_and_wait()
    wait_until("more results", lambda: fleet.last_result_row("pi-01") > before + 100)
    assert device.stop() == 0
    wait_until("everything arrived", lambda: fleet.query("SELECT state FROM devices") == [("stopped",)])
    code, report = audit_fleet(fleet.home)
    assert (code, report["passed"]) == (0, True), report
    assert len(logs(fleet)) == 1
    assert fleet.query("SELECT count(*) FROM alerts WHERE alert = 'storage' AND severity = 'critical'")[0][0] >= 1


def test_an_idle_device_refills_a_collector_restored_from_a_backup_within_seconds(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    device = fleet.add_device("pi-01").add_replay_stream(40, 40).start_and_wait()
    wait_until("its first messages arrived", lambda: len(seqs(fleet)) >= 2)
    with (
        contextlib.closing(sqlite3.connect(f"{(fleet.home / 'fleet.db').as_uri()}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(tmp_path / "backup.db")) as backup,
    ):
        source.backup(backup)
    count = len(seqs(fleet))
    # Messages that the backup lacks; then it writes none for a minute.
    assert device.stop() == 0
    device.start_and_wait()
    wait_until("more messages than in the backup", lambda: len(seqs(fleet)) >= count + 3)
    written = 0

    def all_arrived() -> bool:
        nonlocal written
        status = device.status()
        written = int(status["outbox"]["last"])
        return status["outbox"]["waiting"] == 0 and seqs(fleet) == list(range(1, written + 1))

    wait_until("all arrived", all_arrived)
    fleet.collector.stop()
    for suffix in ("-wal", "-shm"):
        (fleet.home / f"fleet.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "backup.db").replace(fleet.home / "fleet.db")
    fleet.collector.start()
    wait_until("the collector has everything again", lambda: set(seqs(fleet)) >= set(range(1, written + 1)), 25)
    assert audit_fleet(fleet.home)[0] == 0


def seqs(fleet: LocalFleet) -> list[int]:
    return [row[0] for row in fleet.query("SELECT seq FROM messages ORDER BY seq")]

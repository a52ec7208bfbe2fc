"""A device whose data folder was restored, damaged or deleted between two starts, in a whole system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.system import Fleet, eventually

ENDLESS = 10**9


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as made:
        made.broker.start()
        made.collector.start()
        yield made


def logs(fleet: Fleet) -> list[str]:
    return [row[0] for row in fleet.ask("SELECT log FROM logs ORDER BY rowid")]


def test_a_data_folder_restored_from_an_image_goes_on_in_a_new_log_by_itself(fleet: Fleet, tmp_path: Path) -> None:
    device = fleet.device("pi-01").replay(ENDLESS, 40).task("exercise").up()
    eventually("results at the collector", lambda: fleet.covered("pi-01") > 100)
    assert device.stop() == 0
    shutil.copytree(device.data, tmp_path / "image", ignore=shutil.ignore_patterns("intake.sock"))
    before = fleet.covered("pi-01")
    device.up()
    eventually("more results", lambda: fleet.covered("pi-01") > before + 100)
    device.kill()
    shutil.rmtree(device.data)
    shutil.copytree(tmp_path / "image", device.data)
    device.up()
    eventually("a new log", lambda: len(logs(fleet)) == 2)
    _, new = logs(fleet)
    results = "SELECT count(*) FROM results WHERE log = ?"
    eventually("results in the new log", lambda: fleet.ask(results, new)[0][0] > 2)
    assert device.running
    assert device.stop() == 0
    eventually("everything arrived", lambda: fleet.ask("SELECT state FROM devices") == [("stopped",)])
    code, report = fleet.audit()
    assert (code, report["passed"]) == (0, True), report
    assert fleet.ask("SELECT count(*) FROM refusals WHERE reason = 'conflicting payload'") == [(0,)]
    [(summary,)] = fleet.ask("SELECT summary FROM alerts WHERE alert = 'storage' AND severity = 'critical'")
    assert "restored from an old copy" in summary


def test_a_damaged_store_is_salvaged_and_the_audit_passes(fleet: Fleet) -> None:
    device = fleet.device("pi-01").replay(ENDLESS, 40).task("exercise").up()
    eventually("results at the collector", lambda: fleet.covered("pi-01") > 100)
    # Stopped once, so that most of it is in the database and not in its log.
    assert device.stop() == 0
    first = fleet.covered("pi-01")
    device.up()
    eventually("more results", lambda: fleet.covered("pi-01") > first + 100)
    device.kill()
    data = bytearray((device.data / "outstation.db").read_bytes())
    for page in range(4096, len(data), 2 * 4096):
        data[page + 20 : page + 4000] = bytes(3980)
    (device.data / "outstation.db").write_bytes(data)
    before = fleet.covered("pi-01")
    device.up()
    eventually("more results", lambda: fleet.covered("pi-01") > before + 100)
    assert device.stop() == 0
    eventually("everything arrived", lambda: fleet.ask("SELECT state FROM devices") == [("stopped",)])
    code, report = fleet.audit()
    assert (code, report["passed"]) == (0, True), report
    assert len(logs(fleet)) == 1
    assert fleet.ask("SELECT count(*) FROM alerts WHERE alert = 'storage' AND severity = 'critical'")[0][0] >= 1

"""Results that were delivered stay readable on the device: real broker and collector, restarts and kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.device.store.store import Store
from outstation.workbench.testing.fleet import DeviceProcess, LocalFleet
from outstation.workbench.testing.patience import wait_until
from tests.kit.commands import call_outstation

ROWS, LAST = 4000, 20


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        yield made


def add_device(fleet: LocalFleet, delivery: str) -> DeviceProcess:
    """Add a device that deletes what it can as soon as it is delivered."""
    device = fleet.add_device("pi-01").add_replay_stream(ROWS, 100).add_task("exercise")
    text = device.config.read_text().replace("[collector]\n", f'[collector]\ndelivery = "{delivery}"\n')
    assert delivery in text
    device.config.write_text(text.replace("[buffer]\n", '[buffer]\nkeep_messages = "0 s"\n'))
    if "keep_messages" not in device.config.read_text():
        device.append_config('[buffer]\nkeep_messages = "0 s"\n')
    return device


def show(device: DeviceProcess, *more: str) -> list[dict[str, Any]]:
    done = call_outstation("results", "exercise", "--last", str(LAST), "-c", str(device.config), "--json", *more)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def read_state(device: DeviceProcess) -> tuple[int, int]:
    """Return the last row that is stored, and how many messages other than results are."""
    with Store.open_read_only(device.data_dir) as store:
        [others] = store._fetch_one("SELECT count(*) FROM outbox WHERE topic NOT LIKE '%/results/%'") or (0,)
        return store.last_row("watch"), int(others)


def is_delivered(device: DeviceProcess) -> bool:
    """Return True once every message that may go is delivered and deleted."""
    return read_state(device)[1] == 0 and device.status()["outbox"]["waiting"] == 0


@pytest.mark.parametrize("delivery", ["broker", "collector"])
def test_delivered_results_are_shown_as_before_also_after_a_kill_and_a_restart(
    fleet: LocalFleet, delivery: str
) -> None:
    device = add_device(fleet, delivery).start_and_wait()
    wait_until("all rows and their results", lambda: read_state(device)[0] == ROWS and len(show(device)) == LAST)
    # The replay is over; `batch` computes what is left, so that no later result comes.
    assert device.stop() == 0
    call_outstation("batch", "-c", str(device.config))
    before = show(device)
    device.start_and_wait()
    fleet.broker.start()
    fleet.collector.start()
    wait_until("delivery", lambda: is_delivered(device))
    wait_until("the results at the collector", lambda: fleet.last_result_row("pi-01") == before[-1]["row"])
    assert show(device) == before
    device.kill()
    assert show(device) == before
    device.start_and_connect()
    wait_until("delivery of what the start wrote", lambda: is_delivered(device))
    assert show(device) == before
    assert device.stop() == 0
    assert show(device) == before
    done = call_outstation("results", "exercise", "--last", "10000", "-c", str(device.config))
    assert f"the newest was computed {before[-1]['computed'][:10]}" in done.stderr
    assert device.status()["outbox"]["waiting"] == 0

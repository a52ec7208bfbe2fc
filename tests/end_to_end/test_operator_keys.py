"""Stolen operator keys against a real daemon, collector and Mosquitto, and the root keys that take them out of use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet import config as fleet_config
from outstation.protocol.wire import keys
from outstation.workbench.testing.fleet import DeviceProcess, LocalFleet
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation

pytestmark = pytest.mark.attack("operators")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("keys")) as made:
        made.broker.start()
        made.collector.start()
        (made.folder / "stick").mkdir()
        where = ("--root-keys", str(made.folder / "stick"), "--url", str(made.home / "repository"))
        assert run(made, "repository", "init", *where)[0] == 0
        made.config = fleet_config.load(made.home)
        yield made


@pytest.fixture(scope="module")
def device(fleet: LocalFleet) -> DeviceProcess:
    return fleet.add_device("pi-01").add_replay_stream(10**9, 10).add_task("exercise").start_and_connect()


def run(fleet: LocalFleet, *words: str) -> tuple[int, str]:
    folder = () if "sign-root" in words else ("--dir", str(fleet.home))
    done = run_outstation("fleet", *words, *folder)
    return done.returncode, done.stdout + done.stderr


def command(fleet: LocalFleet, *words: str, wait_s: int = 60) -> tuple[int, dict[str, Any]]:
    code, text = run(fleet, "command", "pi-01", *words, "--json", "--wait", str(wait_s))
    return code, json.loads(text)


def change_trust(fleet: LocalFleet, *words: str) -> None:
    """Change the trust document with two of the three root keys, each signing by itself, and send it to devices."""
    code, text = run(fleet, "keys", *words, "--sign-with", str(fleet.folder / "stick" / "root-1.key"))
    assert (code, "needs 1 more signatures" in text) == (1, True), text
    draft = str(fleet.home / "repository" / "root.json.draft")
    assert (
        run(fleet, "repository", "sign-root", "--sign-with", str(fleet.folder / "stick" / "root-2.key"), draft)[0] == 0
    )
    assert run(fleet, "repository", "refresh")[0] == 0
    code, text = run(fleet, "keys", "publish")
    assert code == 0, text


def wait_for_root(fleet: LocalFleet, version: int) -> None:
    def versions() -> list[int]:
        rows = fleet.query("SELECT payload FROM messages WHERE device = 'pi-01' AND kind = 'audit' ORDER BY seq")
        bodies = [json.loads(row[0]) for row in rows]
        return [body["evidence"]["version"] for body in bodies if body["event"] == "trust changed"]

    wait_until(f"the device uses root {version}", lambda: version in versions())


def use_key(fleet: LocalFleet, path: Path) -> None:
    """Let the operator sign with another key from now on."""
    file = fleet.home / "fleet.toml"
    text = file.read_text(encoding="utf-8").replace('"operator.key"', json.dumps(str(path)))
    file.write_text(text, encoding="utf-8")


def test_a_stolen_signature_with_the_highest_counter_locks_nobody_out(fleet: LocalFleet, device: DeviceProcess) -> None:
    assert command(fleet, "report")[0] == 0
    counter = (fleet.home / "operator.counter").read_text(encoding="ascii")
    (fleet.home / "operator.counter").write_text(f"{2**53 - 2}\n", encoding="ascii")
    code, answer = command(fleet, "report", wait_s=3)
    assert (code, answer["answered"], answer["counter"]) == (1, False, 2**53 - 1)
    (fleet.home / "operator.counter").write_text(counter, encoding="ascii")
    assert command(fleet, "report")[0] == 0


def test_a_wipe_of_one_key_waits_is_announced_and_cancelled(fleet: LocalFleet, device: DeviceProcess) -> None:
    code, answer = command(fleet, "wipe", "--yes")
    assert (code, "due" in answer["data"]) == (0, True), answer

    def states() -> list[str]:
        rows = fleet.query("SELECT state FROM alerts WHERE device = 'pi-01' AND subject = 'wipe' ORDER BY seq")
        return [state for (state,) in rows]

    wait_until("the wipe is announced", lambda: states() == ["raised"])
    assert command(fleet, "cancel-wipe")[0] == 0
    wait_until("the alert is cleared", lambda: states() == ["raised", "cleared"])
    assert device.is_running


def test_a_stolen_operator_key_is_replaced_while_the_device_runs(fleet: LocalFleet, device: DeviceProcess) -> None:
    stolen = keys.load_public_for(fleet.home / "operator.key")
    new = keys.generate(fleet.folder / "new.key")
    change_trust(fleet, "add", "operator", new.public.text)
    wait_for_root(fleet, 2)
    change_trust(fleet, "revoke", stolen.text)
    wait_for_root(fleet, 3)
    code, answer = command(fleet, "report", wait_s=3)
    assert (code, answer["answered"]) == (1, False), answer
    use_key(fleet, fleet.folder / "new.key")
    assert command(fleet, "report")[0] == 0
    device.kill()
    device.start_and_connect()
    assert command(fleet, "report")[0] == 0
    _, text = run(fleet, "keys", "show", "--json")
    assert {entry["key"] for entry in json.loads(text)["keys"] if entry["role"] == "operator"} == {new.public.text}

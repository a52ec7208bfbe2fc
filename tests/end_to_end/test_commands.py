"""Remote commands from the command line to a real daemon and back, through Mosquitto, with a real collector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.protocol.wire import jws, keys
from outstation.protocol.wire.jws import encode
from outstation.workbench.testing.fleet import FLEET, DeviceProcess, LocalFleet
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation
from scripts.kit.broker_client import publish_all
from tests.kit.commands import audit_fleet, call_outstation


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("commanded")) as made:
        made.broker.start()
        made.collector.start()
        yield made


@pytest.fixture(scope="module")
def device(fleet: LocalFleet) -> DeviceProcess:
    device = fleet.add_device("pi-01").add_replay_stream(10**9, 10).add_task("exercise").start_and_connect()
    wait_until("the first results", lambda: fleet.last_result_row("pi-01") > 0)
    return device


def command(fleet: LocalFleet, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document of `fleet command`."""
    done = call_outstation("fleet", "command", *arguments, "--dir", str(fleet.home), "--json", "--wait", "60")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def audits(fleet: LocalFleet, device: str, event: str) -> list[dict[str, Any]]:
    rows = fleet.query("SELECT payload FROM messages WHERE device = ? AND kind = 'audit' ORDER BY seq", device)
    bodies = [json.loads(row[0]) for row in rows]
    return [body["evidence"] for body in bodies if body["event"] == event]


def task(device: DeviceProcess) -> dict[str, Any]:
    done = call_outstation("status", "--json", "-c", str(device.config))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["tasks"][0])


def test_report_answers_with_the_status_and_sends_health(fleet: LocalFleet, device: DeviceProcess) -> None:
    code, answer = command(fleet, "pi-01", "report")
    assert (code, answer["ok"], answer["data"]["device"]) == (0, True, "pi-01")
    assert answer["data"]["tasks"][0]["task"] == "exercise"


def test_pause_stops_a_task_also_over_a_restart_and_resume_goes_on(fleet: LocalFleet, device: DeviceProcess) -> None:
    assert command(fleet, "pi-01", "pause", "exercise")[0] == 0
    assert device.stop() == 0
    device.start_and_connect()
    assert task(device)["paused"] is True
    used = task(device)["row"]
    code, answer = command(fleet, "pi-01", "run", "exercise")
    assert (code, "paused" in answer["summary"]) == (1, True)
    assert task(device)["row"] == used
    assert command(fleet, "pi-01", "resume", "exercise")[0] == 0
    wait_until("the task goes on", lambda: task(device)["row"] > used)
    assert "paused" not in task(device)


def test_a_schedule_is_changed_and_set_back_and_nonsense_is_refused(fleet: LocalFleet, device: DeviceProcess) -> None:
    code, answer = command(fleet, "pi-01", "set-schedule", "exercise", "every 1 h")
    assert (code, answer["data"]) == (0, {"schedule": "every 1 h", "configured": "every 500 ms"})
    assert (task(device)["schedule"], task(device)["schedule_override"]) == ("every 1 h", "every 1 h")

    def uses_rows() -> bool:
        before = task(device)["row"]
        code, answer = command(fleet, "pi-01", "run", "exercise")
        assert code == 0
        # A backlog is worked off in slices, and the next one may already have run.
        assert task(device)["row"] >= before + answer["data"]["used"]
        return bool(answer["data"]["used"] > 0)

    # The last scheduled run may still use what waits.
    wait_until("a run uses rows", uses_rows)
    code, answer = command(fleet, "pi-01", "set-schedule", "exercise", "each moon")
    assert (code, answer["ok"]) == (1, False)
    assert command(fleet, "pi-01", "set-schedule", "exercise", "default")[0] == 0
    assert (task(device)["schedule"], task(device).get("schedule_override")) == ("every 500 ms", None)


def test_each_command_is_in_the_log_with_its_sender_and_outcome(fleet: LocalFleet, device: DeviceProcess) -> None:
    code, answer = command(fleet, "pi-01", "run", "no-such-task")
    assert code == 1
    wait_until(
        "the audit message at the collector",
        lambda: any(
            event["id"] == answer["id"] and event["outcome"] == "refused" for event in audits(fleet, "pi-01", "command")
        ),
    )


def test_an_absent_device_is_reported_at_once(fleet: LocalFleet) -> None:
    fleet.add_device("pi-09")
    code, answer = command(fleet, "pi-09", "report")
    assert (code, answer["answered"]) == (1, False)
    assert "not connected" in answer["summary"]


@pytest.mark.parametrize(
    "arguments",
    [("pi-77", "report"), ("pi-01", "dance"), ("pi-01", "run"), ("pi-01", "set-schedule", "exercise", "every", "5 s")],
    ids=["device", "name", "argument", "arguments"],
)
def test_wrong_use_exits_2_and_sends_nothing(
    fleet: LocalFleet, device: DeviceProcess, arguments: tuple[str, ...]
) -> None:
    assert command(fleet, "pi-01", "report")[0] == 0
    before = (fleet.home / "operator.counter").read_text(encoding="ascii")
    done = call_outstation("fleet", "command", *arguments, "--dir", str(fleet.home))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert (fleet.home / "operator.counter").read_text(encoding="ascii") == before


def test_the_counter_of_a_restored_fleet_folder_continues_above_used_ones(
    fleet: LocalFleet, device: DeviceProcess
) -> None:
    _, first = command(fleet, "pi-01", "report")
    (fleet.home / "operator.counter").write_text("5\n", encoding="ascii")
    code, second = command(fleet, "pi-01", "report")
    assert code == 0
    assert second["counter"] > first["counter"]


def test_commands_sent_at_once_are_all_answered(fleet: LocalFleet, device: DeviceProcess) -> None:
    words = ("fleet", "command", "pi-01", "report", "--dir", str(fleet.home), "--wait", "60")
    with ThreadPoolExecutor(3) as threads:
        sent = [threads.submit(run_outstation, *words) for _ in range(3)]
    assert [done.result().returncode for done in sent] == [0, 0, 0]


def test_forged_commands_change_nothing_and_the_next_command_is_executed(
    fleet: LocalFleet, device: DeviceProcess
) -> None:
    topic = f"outstation/{FLEET}/pi-01/cmd"
    payload = encode({"v": 1, "kind": "cmd", "device": "pi-01", "id": "x", "name": "wipe", "args": {}})
    forged = OutgoingMessage(topic, payload, (("jws", jws.sign(new_key(3), topic, payload)),))
    with Link(BrokerConfig(url=fleet.broker.url), "attacker") as link:
        publish_all(link, [forged] * 10_000)
        link.send(OutgoingMessage(topic, payload, forged.properties, retain=True))
    before = fleet.last_result_row("pi-01")
    assert command(fleet, "pi-01", "report")[0] == 0
    wait_until("results go on", lambda: fleet.last_result_row("pi-01") > before)
    wait_until(
        "one alert at the collector",
        lambda: (
            len(fleet.query("SELECT 1 FROM alerts WHERE device = 'pi-01' AND id = '_device/security/refused'")) == 1
        ),
    )
    with Link(BrokerConfig(url=fleet.broker.url), "attacker") as link:
        link.send(OutgoingMessage(topic, b"", (), retain=True))


def test_a_key_is_rotated_twice_while_results_flow_and_the_audit_passes(
    fleet: LocalFleet, device: DeviceProcess
) -> None:
    kids = set()
    for _ in range(2):
        sessions = device.session_count()
        code, answer = command(fleet, "pi-01", "rotate-key")
        assert code == 0, json.dumps(answer)
        kids.add(answer["data"]["kid"])
        wait_until(
            "the collector knows the new key",
            lambda: listed(fleet, "pi-01")["key"] == answer["data"]["key"],  # noqa: B023
        )
        before = fleet.last_result_row("pi-01")
        wait_until("results under the new key", lambda: fleet.last_result_row("pi-01") > before)  # noqa: B023
        # The new key signs the last will of a new session.
        device.wait_for_session(sessions)
    assert len(kids) == 2
    assert command(fleet, "pi-01", "report")[0] == 0
    device.kill()
    device.start_and_connect()
    assert command(fleet, "pi-01", "report")[0] == 0
    report = audit_fleet(fleet.home)[1]
    assert report["passed"], report


def listed(fleet: LocalFleet, name: str) -> dict[str, Any]:
    done = call_outstation("fleet", "devices", "--json", "--dir", str(fleet.home))
    return next(row for row in json.loads(done.stdout) if row["device"] == name)


def test_a_wiped_device_reports_it_first_and_does_not_start_again(fleet: LocalFleet) -> None:
    doomed = fleet.add_device("pi-02").add_replay_stream(10**9, 10, seed=3).add_task("exercise")
    at_once = doomed.config.read_text(encoding="utf-8").replace("[operators]", '[operators]\nwipe_delay = "0 s"')
    doomed.config.write_text(at_once, encoding="utf-8")
    doomed.start_and_connect()
    wait_until("something was collected", lambda: fleet.last_result_row("pi-02") > 0)
    sessions = doomed.session_count()
    assert command(fleet, "pi-02", "rotate-key")[0] == 0
    doomed.wait_for_session(sessions)
    code, answer = command(fleet, "pi-02", "wipe", "not-the-word")
    assert (code, answer["answered"], doomed.is_running) == (1, True, True)
    unconfirmed = run_outstation("fleet", "command", "pi-02", "wipe", "--dir", str(fleet.home))
    assert (unconfirmed.returncode, "--yes" in unconfirmed.stderr) == (2, True)
    code, answer = command(fleet, "pi-02", "wipe", "--yes")
    assert code == 0, answer
    assert doomed.wait(60) == 0
    operator = keys.load_public_for(fleet.home / "operator.key").kid
    assert audits(fleet, "pi-02", "wiped") == [{"kids": [operator]}]
    left = {path.name for path in doomed.data_dir.iterdir()}
    assert left <= {"wiped", "lock", "bundles"}
    assert not (doomed.home / "device.key").exists()
    assert not list((doomed.data_dir / "bundles").glob(".copies/*"))
    doomed.start()
    assert doomed.wait(60) == 0
    assert doomed.log_contains("was wiped by an operator")
    again = call_outstation("status", "-c", str(doomed.config))
    assert again.returncode == 2
    assert "wiped" in again.stderr


def test_a_revoked_device_stays_out(fleet: LocalFleet, device: DeviceProcess) -> None:
    done = run_outstation("fleet", "revoke", "pi-01", "--dir", str(fleet.home), "--json")
    assert done.returncode == 0, done.stderr
    wait_until(
        "what it sends is refused",
        lambda: fleet.query("SELECT 1 FROM refusals WHERE device = 'pi-01' AND reason = 'revoked key'"),
    )
    assert audit_fleet(fleet.home)[1]["passed"]

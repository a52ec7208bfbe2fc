"""A device that replays for ever, with real processes: messages, refusals, stops, and reports of its state."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.protocol.wire import jws
from outstation.workbench.testing.fleet import FLEET, LocalFleet
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.patience import Patience, wait_until
from outstation.workbench.testing.process import NotifySocket, run_outstation
from scripts.kit.broker_client import receive_messages
from tests.end_to_end.test_pipeline import STOP_LIMIT_S, last_row, with_link
from tests.kit.commands import audit_fleet, call_outstation


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A fleet with one device that replays for ever; a test leaves it running."""
    folder = tmp_path_factory.mktemp("running")
    with LocalFleet(folder) as fleet:
        fleet.broker.start()
        fleet.collector.start()
        made = Running(fleet)
        yield made
        made.systemd.close()


class Running:
    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet = fleet
        self.device = fleet.add_device("pi-01").add_replay_stream(10**9, 10).add_task("exercise")
        self.systemd = NotifySocket(fleet.folder / "notify")
        self.start()

    def start(self) -> None:
        self.device.start_and_wait(NOTIFY_SOCKET=str(self.systemd.path))
        before = self.fleet.last_result_row("pi-01")
        wait_until("results at the collector", lambda: self.fleet.last_result_row("pi-01") > before)

    def progresses(self) -> None:
        before = self.fleet.last_result_row("pi-01")
        wait_until("further results", lambda: self.fleet.last_result_row("pi-01") > before)


def test_the_head_of_a_running_device_agrees_with_its_operators_evidence(running: Running, tmp_path: Path) -> None:
    head = call_outstation("head", "--json", "-c", str(running.device.config))
    assert head.returncode == 0, head.stderr
    signed = json.loads(head.stdout)["head"]
    (tmp_path / "head.json").write_text(head.stdout, encoding="utf-8")
    newest = "SELECT max(last_seq) FROM logs WHERE device = ? AND log = ?"
    wait_until(
        "the message of the head is collected",
        lambda: running.fleet.query(newest, "pi-01", signed["log"])[0][0] >= signed["seq"],
    )
    home, out, key = running.fleet.home, tmp_path / "out", running.fleet.home / "operator.key.pub"
    made = call_outstation("fleet", "evidence", "--out", str(out), "--dir", str(home))
    assert made.returncode == 0, made.stdout + made.stderr
    verify = ("fleet", "evidence", "verify", str(out), "--operator", str(key), "--witness", str(tmp_path / "head.json"))
    report = json.loads(call_outstation(*verify, "--json").stdout)
    assert (report["problems"], report["witnesses"], report["unchecked_stamps"]) == ([], 1, 0)
    assert report["chained_messages"] >= signed["seq"] > 0


def test_the_audit_names_a_stored_message_with_an_altered_byte(running: Running, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    fleet = running.fleet
    with (
        contextlib.closing(sqlite3.connect(fleet.config.fleet.db)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
        target,
    ):
        source.backup(target)
        sql = "SELECT rowid, log, seq, payload FROM messages WHERE kind = 'results' ORDER BY seq LIMIT 1"
        rowid, log, seq, payload = target.execute(sql).fetchone()
        at = len(payload) // 2
        altered = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        target.execute("UPDATE messages SET payload = ? WHERE rowid = ?", (altered, rowid))
    source.close()
    target.close()
    audit = ("fleet", "audit", "--dir", str(fleet.home), "--db", f"sqlite:///{copy}")
    report = call_outstation(*audit, "--json")
    assert report.returncode == 1
    [invalid] = json.loads(report.stdout)["invalid"]
    assert (invalid["device"], invalid["log"], invalid["seq"]) == ("pi-01", log, seq)
    assert "bad signature" in invalid["reason"]
    printed = call_outstation(*audit)
    assert printed.returncode == 1
    assert f"pi-01 {log} seq {seq} does not verify: bad signature" in printed.stdout
    assert printed.stdout.rstrip().endswith("FAILED")


def refusals(fleet: LocalFleet) -> dict[tuple[str, str], int]:
    return {(row[0], row[1]): row[2] for row in fleet.query("SELECT device, reason, count FROM refusals")}


def test_unsigned_foreign_and_replayed_messages_are_refused_and_counted(running: Running) -> None:
    fleet, base = running.fleet, f"outstation/{FLEET}"
    [(topic, payload, token)] = fleet.query("SELECT topic, payload, jws FROM messages WHERE kind = 'results' LIMIT 1")
    alert = f"{base}/pi-01/alerts/exercise"
    foreign = jws.sign(new_key(), alert, payload)
    hostile = [
        OutgoingMessage(alert, b'{"v":1,"kind":"alerts","device":"pi-01","alert":"drift"}'),
        OutgoingMessage(alert, payload, (("jws", foreign),)),
        OutgoingMessage(alert, payload, (("jws", token),)),
        OutgoingMessage(topic.replace("pi-01", "pi-02"), payload, (("jws", token),)),
        OutgoingMessage(topic, payload[:-1] + b" }", (("jws", token),)),
        OutgoingMessage(f"{base}/pi-01/health", bytes(range(256)), (("jws", "a.b.c.d"),)),
    ]
    before = refusals(fleet)
    with_link(fleet.broker.url, hostile)
    wait_until("all six refused", lambda: sum(refusals(fleet).values()) - sum(before.values()) == 6)
    new = {key: count - before.get(key, 0) for key, count in refusals(fleet).items()}
    assert new == {
        ("pi-01", "unsigned"): 1,
        ("pi-01", "unknown key"): 1,
        ("pi-01", "other topic"): 1,
        ("", "other topic"): 1,
        ("pi-01", "bad signature"): 1,
        ("pi-01", "malformed signature"): 1,
    }
    running.progresses()
    assert audit_fleet(fleet.home)[0] == 0


def test_sigterm_stops_before_systemd_kills_and_the_next_start_goes_on(running: Running) -> None:
    device, fleet = running.device, running.fleet
    running.progresses()
    patience = Patience(STOP_LIMIT_S)
    assert device.stop() == 0
    assert not patience.is_over()
    wait_until("the word to systemd", lambda: running.systemd.messages[-1] == "STOPPING=1")
    assert json.loads(retained(fleet, "state"))["state"] == "stopped"
    wait_until("stopped at the collector", lambda: fleet.query("SELECT state FROM devices") == [("stopped",)])
    rows, [(log, through)] = last_row(device), fleet.query("SELECT log, last_seq FROM logs")
    running.start()
    running.progresses()
    assert last_row(device) > rows
    [(log_after, through_after)] = fleet.query("SELECT log, last_seq FROM logs")
    assert (log_after, through_after > through) == (log, True)
    assert json.loads(retained(fleet, "state"))["state"] == "online"
    events = "SELECT json_extract(CAST(payload AS TEXT), '$.event') FROM messages WHERE kind = 'audit' ORDER BY seq"
    names = [row[0] for row in fleet.query(events)]
    assert [event for event in names if event in ("started", "stopped")] == ["started", "stopped", "started"]
    assert names.count("activated") == 1
    assert audit_fleet(fleet.home)[0] == 0


def retained(fleet: LocalFleet, kind: str) -> bytes:
    with Link(BrokerConfig(url=fleet.broker.url), "looker-on", subscribe=[f"outstation/{FLEET}/pi-01/{kind}"]) as link:
        return receive_messages(link, 1)[0].payload


def test_a_second_daemon_on_the_same_folder_is_refused_in_one_line(running: Running) -> None:
    second = run_outstation("run", "-c", str(running.device.config))
    assert second.returncode == 1
    [line] = second.stderr.strip().splitlines()
    assert f"another outstation (process {running.device.pid}) uses this data folder" in line
    running.progresses()


def test_mosquitto_sub_shows_every_kind_as_readable_json(running: Running, program: Callable[[str], str]) -> None:
    command = [program("mosquitto_sub"), "-p", str(running.fleet.broker.port), "-V", "5", "-v", "-t", "outstation/#"]
    missing = {"state", "keys", "results", "ack"}
    with subprocess.Popen([*command, "-W", "60"], stdout=subprocess.PIPE, text=True) as seen:
        assert seen.stdout is not None
        while missing and (line := seen.stdout.readline()):
            topic, payload = line.split(" ", 1)
            body = json.loads(payload)
            assert topic.startswith(f"outstation/{FLEET}/pi-01/{body['kind']}")
            assert body["v"] == 1
            assert body["device"] == "pi-01"
            missing.discard(body["kind"])
        seen.kill()
    assert not missing


def test_systemd_hears_that_the_daemon_is_ready_and_alive(running: Running) -> None:
    assert running.systemd.messages[0] == "READY=1"
    before = running.systemd.messages.count("WATCHDOG=1")
    wait_until("two signs of life", lambda: running.systemd.messages.count("WATCHDOG=1") >= before + 2)


def test_status_and_check_describe_a_running_daemon_undisturbed(running: Running) -> None:
    file = str(running.device.config)
    status = running.device.status()
    assert (status["device"], status["fleet"]) == ("pi-01", FLEET)
    [task], [stream] = status["tasks"], status["streams"]
    assert (task["task"], task["stream"], task["schedule"]) == ("exercise", "watch", "every 500 ms")
    assert 0 < task["row"] <= stream["rows"]
    assert status["outbox"]["last"] > 0
    printed = call_outstation("status", "-c", file)
    assert printed.returncode == 0
    assert "exercise" in printed.stdout
    assert "waiting of" in printed.stdout
    checked = call_outstation("check", "--json", "-c", file)
    findings = {finding["name"]: finding for finding in json.loads(checked.stdout)}
    assert checked.returncode == 0
    assert {name for name, finding in findings.items() if finding["state"] == "failed"} == set()
    assert {
        "config",
        "key",
        "collector",
        "schedule exercise",
        "stream watch",
        "bundle exercise",
        "confinement",
        "kernel",
        "trusted keys",
        "storage",
        "store",
        "clock",
        "broker",
    } == set(findings)
    assert "in use by the running daemon" in findings["storage"]["detail"]
    printed = call_outstation("check", "-c", file)
    assert printed.returncode == 0
    assert len(printed.stdout.splitlines()) == len(findings)
    running.progresses()
    assert running.device.log.read_text(encoding="utf-8").count("connected to") == running.device.start_count()

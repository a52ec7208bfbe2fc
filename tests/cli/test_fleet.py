"""Fleet commands as people and programs use them, as real processes with a real broker where it matters."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from outstation.fleet.cli.group import fleet
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.workers.device_ranges import split_devices
from outstation.foundation.cli.output import print_table
from outstation.foundation.errors import UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from outstation.workbench.testing.patience import wait_until

NOW = "2026-11-24T22:20:00.000000Z"
COMMANDS = [
    "init",
    "devices token",
    "enrol",
    "collect",
    "devices",
    "alerts",
    "log gaps",
    "audit",
    "drift",
    "evidence",
    "devices watch",
]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(fleet, [str(arg) for arg in args])


def document(*args: str | Path) -> Any:
    """Run a command that must succeed, and return its JSON document."""
    result = run(*args, "--json")
    assert result.exit_code in (0, 1), result.exception
    return json.loads(result.stdout)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a fleet named acme without TLS."""
    assert run("init", tmp_path / "acme", "--broker", "mqtt://127.0.0.1:1").exit_code == 0
    return tmp_path / "acme"


def collected(folder: Path, sender: MessageSender, *sent: SignedMessage) -> None:
    store = FleetStore(folder / "fleet.db")
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)
    store.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = run(*command.split(), "--help").stdout
    assert f"Example: outstation fleet {command}" in text


def test_a_short_form_calls_the_command_of_its_group() -> None:
    for name, path in [("token", "devices token"), ("gaps", "log gaps"), ("label-next", "labels next")]:
        assert f"Example: outstation fleet {path}" in run(name, "--help").stdout


@pytest.mark.parametrize("words", ["alerts", "devices", "devices revoke pi-07", "dashboard user list"])
def test_root_becomes_the_owner_of_the_folder_of_the_command_and_of_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    document("enrol", "pi-07", "--dir", folder, "--bundle-out", folder / "pi-07.tar.gz")
    owned: list[Path] = []
    monkeypatch.setattr("outstation.fleet.cli.common.become_owner", owned.append)
    assert run(*words.split(), "--dir", folder).exit_code == 0
    assert owned == [folder]


def test_from_init_to_an_empty_audit_every_report_is_one_json_document(folder: Path) -> None:
    enrolled = document("enrol", "pi-07", "--dir", folder, "--bundle-out", folder / "pi-07.tar.gz")
    assert (enrolled["device"], enrolled["fleet"], enrolled["new"]) == ("pi-07", "acme", True)
    assert document("devices", "--dir", folder) == [
        {
            "device": "pi-07",
            "fleet": "acme",
            "key": enrolled["key"],
            "state": "enrolled",
            "last_seen": None,
            "through": 0,
            "alerts": 0,
            "logs": 0,
            "clock": None,
        }
    ]
    assert document("alerts", "--dir", folder) == []
    assert document("gaps", "--dir", folder) == []
    assert document("audit", "--dir", folder)["passed"]


def test_a_table_is_wrapped_in_its_last_column_where_the_terminal_is_narrow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = MessageSender()
    collected(folder, sender, sender.alert(summary="ax: spread fell " + "to 0.6 of this site's reference " * 5))
    whole = run("alerts", "--dir", folder).stdout
    assert len(whole.splitlines()) == 2
    for columns in (60, 80, 130):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = run("alerts", "--dir", folder).stdout.splitlines()
        assert max(map(len, lines)) <= max(columns, 77)
        assert " ".join(" ".join(lines).split()) == " ".join(whole.split())
    assert lines[2].startswith(" " * 60)


def test_spaces_at_the_end_of_a_text_cost_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    # In the square of their number, these would take minutes.
    print_table(["device", "summary"], [["pi-07", "x" + " " * 100_000]], "")
    assert capsys.readouterr().out.splitlines()[1:] == ["pi-07   x"]


@pytest.mark.parametrize(("is_after", "name"), [(False, "incident"), (True, "id")])
def test_options_of_a_group_stand_before_its_subcommand_or_after_it(folder: Path, is_after: bool, name: str) -> None:
    sender = MessageSender()
    collected(folder, sender, sender.alert())
    [alert] = document("alerts", "--dir", folder)
    (folder / "fleet.db").rename(folder / "other.db")
    options = ["--dir", folder, "--db", folder / "other.db"]
    arguments = ["acknowledge", alert[name]]
    done = run("alerts", *(arguments + options if is_after else options + arguments))
    assert done.exit_code == 0, done.exception


def test_what_was_collected_is_reported_for_programs_and_people(folder: Path) -> None:
    sender = MessageSender()
    log = [sender.results(), sender.quality(), sender.alert(summary="ax: \x1b[31mgain\u202e loss."), sender.state()]
    collected(folder, sender, log[0], log[2], log[3])
    [device] = document("devices", "--dir", folder)
    assert (device["state"], device["through"], device["alerts"]) == ("online", 3, 1)
    assert document("gaps", "--dir", folder) == [
        {"device": "pi-07", "log": sender.log, "from": 2, "to": 2, "declared": False}
    ]
    [alert] = document("alerts", "--device", "pi-07", "--dir", folder)
    assert (alert["task"], alert["alert"], alert["state"]) == ("exercise", "drift", "raised")
    text = run("alerts", "--dir", folder).stdout
    assert "ax: \\x1b[31mgain\\u202e loss." in text
    assert "missing" in run("gaps", "--dir", folder).stdout


def test_the_fleets_month_counts_silent_devices_as_the_mean_of_those_that_stated_their_usage(folder: Path) -> None:
    usage = {"seconds": 86_400, "cpu_s": 864, "flash_bytes": 1e9, "air_bytes": 1e6, "raw_bytes": 1e8, "inferences": 1e4}
    sender = MessageSender()
    collected(folder, sender, sender.append("health", outbox=0, usage=usage), *(sender.health() for _ in range(60)))
    collected(folder, MessageSender(device="pi-08"))
    report = document("cost", "--dir", folder)
    assert [(each["device"], each["counted_s"], each["month"] is None) for each in report["devices"]] == [
        ("pi-07", 86_400, False),
        ("pi-08", None, True),
    ]
    assert report["fleet"]["devices"] == 2
    assert report["fleet"]["inferences"] == round(1e4 * 30.4375)
    text = run("cost", "--dir", folder).stdout
    assert "304,375" in text
    assert "Not measured: energy." in text
    refusal = run("cost", "--device", "pi-08", "--dir", folder).exception
    assert "a device states it with its second health message, and then once an hour. Try again" in str(refusal)


def test_the_month_of_simulated_devices_says_that_processor_time_is_not_measured(folder: Path) -> None:
    usage = {"seconds": 86_400, "flash_bytes": 1e9, "air_bytes": 1e6, "raw_bytes": 1e8, "inferences": 1e4}
    sender = MessageSender()
    collected(folder, sender, sender.append("health", outbox=0, usage=usage))
    assert document("cost", "--dir", folder)["fleet"]["cpu_s"] is None
    text = run("cost", "--dir", folder).stdout
    assert re.search(r"pi-07 +24 h +304,375 +- +30\.4 GB +30\.4 MB +-\n", text)
    assert "304,375 inferences, 30.4 GB on flash, 30.4 MB on the air\nNot measured: processor time and energy." in text


def test_a_revoked_or_retired_device_counts_in_no_month(folder: Path) -> None:
    usage = {"seconds": 86_400, "cpu_s": 864, "flash_bytes": 1e9, "air_bytes": 1e6, "raw_bytes": 1e8, "inferences": 1e4}
    for name in ("pi-07", "pi-08", "pi-09"):
        sender = MessageSender(device=name)
        collected(folder, sender, sender.append("health", outbox=0, usage=usage | {"inferences": 1e4 * int(name[-1])}))
    with contextlib.closing(FleetStore(folder / "fleet.db")) as store:
        store.revoke("pi-08", None, NOW)
        store.revoke("pi-09", None, NOW)
        store.retire("pi-09", "ops", NOW)
    report = document("cost", "--dir", folder)
    assert [each["device"] for each in report["devices"]] == ["pi-07"]
    assert (report["fleet"]["devices"], report["fleet"]["inferences"]) == (1, round(7e4 * 30.4375))
    for device, state in (("pi-08", "revoked"), ("pi-09", "retired")):
        assert f"{device} is {state}" in str(run("cost", "--device", device, "--dir", folder).exception)


def test_the_audit_exits_1_and_names_the_message_when_a_byte_was_altered(folder: Path) -> None:
    sender = MessageSender()
    collected(folder, sender, sender.results(), sender.results())
    passed = run("audit", "--dir", folder)
    assert (passed.exit_code, passed.stdout.splitlines()[-1]) == (0, "PASSED")
    with contextlib.closing(sqlite3.connect(folder / "fleet.db")) as db, db:
        db.execute("UPDATE messages SET payload = CAST(replace(payload, 'PEN', 'PEM') AS BLOB) WHERE seq = 2")
    db.close()
    failed = run("audit", "--dir", folder)
    assert failed.exit_code == 1
    assert f"pi-07 {sender.log} seq 2 does not verify: bad signature" in failed.stdout
    report = document("audit", "--dir", folder, "--device", "pi-07")
    assert [(entry["device"], entry["log"], entry["seq"]) for entry in report["invalid"]] == [("pi-07", sender.log, 2)]
    assert report["passed"] is False


def test_worker_processes_audit_a_database_of_ten_thousand_messages(folder: Path) -> None:
    senders = [MessageSender("pi-07"), MessageSender("pi-08")]
    for sender in senders:
        collected(folder, sender, *(sender.quality() for _ in range(5_000)))
    with FleetStore(folder / "fleet.db", read_only=True) as store:
        # Fewer messages are audited without another process.
        assert len(split_devices(store, 2)) == 2
    audit = ("audit", "--processes", "2", "--dir", folder)
    first = run(*audit)
    assert (first.exception, first.stdout.splitlines()[-1:]) == (None, ["PASSED"])
    with FleetStore(folder / "fleet.db") as store:
        store.ingest([Arrival(sender.verify(sender.results())) for sender in senders], [], NOW)
    further = document(*audit)
    assert (further["passed"], further["messages"], further["checkpoint"] is not None) == (True, 10_002, True)
    for option in (("--full",), ("--db", f"sqlite:///{folder / 'fleet.db'}")):
        assert document(*audit, *option) == {**further, "checkpoint": None}
    with contextlib.closing(sqlite3.connect(folder / "fleet.db")) as db, db:
        db.execute("UPDATE messages SET payload = CAST(replace(payload, '0.9', '0.8') AS BLOB) WHERE seq = 5000")
    db.close()
    altered = run(*audit)
    assert altered.exit_code == 1
    for sender in senders:
        assert f"{sender.device} {sender.log} seq 5000 does not verify: bad signature" in altered.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["init", "{folder}"], "never overwritten"),
        (["init", "{folder}/x", "--name", "No Name"], "--name"),
        (["init", "{folder}/x", "--broker", "http://broker"], "--broker"),
        (["init", "{folder}/x", "--broker", "mqtt://broker"], "is not encrypted"),
        (["enrol", "pi-07", "--device-key", "nonsense", "--dir", "{folder}"], "nonsense"),
        (["enrol", "collector", "--dir", "{folder}"], "role"),
        (["enrol", "pi-07", "--dir", "{folder}"], "no private key stays in the fleet's folder"),
        (["enrol", "pi-07", "--thumbprint", "x", "--dir", "{folder}"], "add --request"),
        (["enrol", "pi-07", "--request", "{folder}/none", "--dir", "{folder}"], "cannot be read"),
        (["enrol", "pi-07", "--request", "{folder}/fleet.toml", "--dir", "{folder}"], "not a valid enrolment request"),
        (["token", "collector", "--dir", "{folder}"], "role"),
        (["token", "pi-07", "--valid", "soon", "--dir", "{folder}"], "--valid"),
        (["enrol", "pi-07", "--bundle-out", "{folder}/fleet.toml", "--dir", "{folder}"], "name a new file"),
        (["audit", "--dir", "{folder}"], "no database here yet"),
        (["collect", "--share", "a", "--dir", "{folder}"], "SQLite has one writer"),
        (["devices", "--dir", "{folder}/none"], "fleet init"),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_do(folder: Path, args: list[str], says: str) -> None:
    result = run(*[arg.format(folder=folder) for arg in args])
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_an_unknown_device_is_wrong_use_with_a_suggestion(folder: Path) -> None:
    run("enrol", "pi-07", "--dir", folder, "--bundle-out", folder / "pi-07.tar.gz")
    result = run("audit", "--device", "pi-70", "--dir", folder)
    assert isinstance(result.exception, UsageError)
    assert "did you mean 'pi-07'" in str(result.exception)


# --- watch, as a process ---

WATCH = [sys.executable, "-c", "from outstation.fleet.cli.group import fleet; fleet()", "watch"]


@pytest.fixture
def watched(tmp_path: Path, broker: MosquittoBroker) -> Path:
    """Create a fleet on the running broker."""
    assert run("init", tmp_path / "acme", "--broker", broker.url).exit_code == 0
    return tmp_path / "acme"


def send(broker: MosquittoBroker, *sent: SignedMessage) -> None:
    """Publish with retain, so that the order of subscriptions does not matter."""
    with Link(BrokerConfig(url=broker.url), "sender") as link:
        for item in sent:
            link.send(item.to_outgoing(retain=True))


def test_watch_prints_verdicts_and_escapes_control_characters(watched: Path, broker: MosquittoBroker) -> None:
    sender, stranger = MessageSender(), MessageSender("pi-09")
    collected(watched, sender)
    forged = SignedMessage("outstation/acme/pi-09/health", b"\x1b]0;title\x07\xff\n[ok]", "", 0)
    send(broker, sender.results(), sender.drift(), stranger.results(), forged)
    lines = sorted(watching(watched, 4))
    assert lines[0].startswith("outstation/acme/pi-07/drift/exercise {")
    assert lines[0].endswith("}  [ok]")
    assert lines[1].endswith("  [ok]")
    assert "\\x1b]0;title\\x07\ufffd\\n[ok]" in lines[2]
    assert lines[2].endswith("[refused: malformed signature: not a detached compact JWS]")
    assert "[refused: unknown key" in lines[3]


def watching(folder: Path, lines: int) -> list[str]:
    """Return `lines` lines of `watch`, interrupt it, and check that it printed no more."""
    with subprocess.Popen([*WATCH, "--dir", str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
    assert process.returncode == 0
    return [line.rstrip("\n") for line in output]


def test_watch_ends_after_its_seconds(watched: Path) -> None:
    collected(watched, MessageSender())
    done = subprocess.run([*WATCH, "--dir", watched, "--seconds", "0.1"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_watch_shows_a_table_on_a_terminal_and_ends_cleanly_on_interrupt(
    watched: Path, broker: MosquittoBroker
) -> None:
    sender = MessageSender()
    collected(watched, sender)
    send(broker, sender.results(), sender.drift("drift"), sender.state(), sender.alert(summary="ax: gain loss."))
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "LINES": "40", "TERM": "xterm"}
    command = [*WATCH, "--dir", str(watched)]
    seen = b""
    words = ("pi-07", "online", "drift ax", "1: ax: gain loss.")
    with subprocess.Popen(command, stdout=child, stderr=child, stdin=child, env=environment) as process:
        os.close(child)
        given_up = threading.Timer(120, process.kill)
        given_up.start()
        while not all(word.encode() in seen for word in words):
            seen += os.read(parent, 65536)
        process.send_signal(signal.SIGINT)
        seen += drained(parent)
        given_up.cancel()
    assert process.returncode == 0
    text = seen.decode()
    assert "Traceback" not in text


def drained(terminal: int) -> bytes:
    """Read until the other side closes."""
    data = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            part = b""
        if not part:
            os.close(terminal)
            return data
        data += part


def test_watch_comes_back_when_the_broker_does(watched: Path, broker: MosquittoBroker) -> None:
    sender = MessageSender()
    collected(watched, sender)
    broker.kill()
    command = [*WATCH, "--raw", "--dir", str(watched)]
    output = watched / "stderr"
    with output.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    wait_until("the broker is missed", lambda: "trying again" in output.read_text())
    broker.start()
    send(broker, sender.results())
    with process:
        assert process.stdout is not None
        assert "[ok]" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert "[ok]" not in process.stdout.read()
    assert process.returncode == 0


def test_watch_needs_no_private_key_of_the_collector(watched: Path, broker: MosquittoBroker) -> None:
    sender = MessageSender()
    collected(watched, sender)
    (watched / "collector.key").unlink()
    send(broker, sender.results())
    assert watching(watched, 1)[0].endswith("  [ok]")


def test_alerts_are_followed_as_they_come_and_go(folder: Path) -> None:
    sender = MessageSender()
    collected(folder, sender, sender.alert(summary="ax: gain loss."))
    command = [
        sys.executable,
        "-c",
        "from outstation.fleet.cli.group import fleet; fleet()",
        "alerts",
        "--follow",
        "--json",
    ]
    with subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        collected(folder, sender, sender.alert(state="cleared"), sender.alert("exercise/fall/result/1", alert="result"))
        changes = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
    assert process.returncode == 0
    assert (first["summary"], first["status"]) == ("ax: gain loss.", "raised")
    assert [(row["id"], row["status"]) for row in changes] == [
        ("exercise/ax/1", "cleared"),
        ("exercise/fall/result/1", "raised"),
    ]


# --- collect, as a process ---

COLLECT = [sys.executable, "-c", "from outstation.fleet.cli.group import fleet; fleet()", "collect"]


def first_words(*args: str | Path) -> str:
    """Return the first log lines of `collect`, up to the one about the missing broker."""
    command = [*COLLECT, *map(str, args)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        output = ""
        for line in process.stderr:
            output += line
            if "trying again" in line:
                break
        process.terminate()
    assert process.returncode == 0
    return output


def test_collect_warns_about_a_database_without_devices(folder: Path, tmp_path: Path) -> None:
    collected(folder, MessageSender())
    output = first_words("--dir", folder, "--db", tmp_path / "other.db")
    assert f"{tmp_path / 'other.db'}: no device is enrolled in this database" in output
    assert f"`enrol` uses {folder / 'fleet.db'}: collect without --db" in output
    assert "no device is enrolled" not in first_words("--dir", folder)


def test_collect_in_a_new_fleet_explains_enrolment(folder: Path) -> None:
    output = first_words("--dir", folder)
    assert "no device is enrolled" in output
    assert "enrol devices: outstation fleet enrol DEVICE" in output


def test_an_operator_lists_the_logs_of_a_device_and_accepts_one(tmp_path: Path) -> None:
    folder = tmp_path / "acme"
    document("init", folder, "--broker", "mqtt://127.0.0.1:1")
    device = MessageSender()
    document("enrol", device.device, "--dir", folder, "--device-key", device.key.public.text)
    clone = MessageSender(key=device.key)
    store = FleetStore(folder / "fleet.db")
    for sender in (device, clone):
        store.ingest([Arrival(sender.verify(sender.results()))], [], "2026-11-24T22:20:00.000000Z")
    store.close()
    logs = document("accept-log", device.device, "--dir", folder)
    assert [(entry["log"], entry["live"]) for entry in logs] == [(device.log, True), (clone.log, True)]
    [listed] = document("devices", "--dir", folder)
    assert (listed["logs"], listed["alerts"]) == (2, 1)
    accepted = document("accept-log", device.device, device.log, "--dir", folder)
    assert accepted == {"device": device.device, "accepted": device.log, "ended": [clone.log]}
    assert document("alerts", "--dir", folder) == []

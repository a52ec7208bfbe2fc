"""Remote commands: a counter is never used twice, and only a reply signed by the device is accepted."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest

from outstation.fleet.cli import command as fleet_command
from outstation.fleet.commands import COUNTER_FILE, CommandResult, parse_arguments, reserve_counter, send
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.protocol.transport.packets import NO_SUBSCRIBERS, IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.messages import CommandPayload
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.messages import MessageSender, new_key

COMMANDS = Path(__file__).parents[2] / "docs" / "reference" / "remote-commands.md"
FLEET, DEVICE = "acme", "pi-07"
REPLY = f"outstation/{FLEET}/{DEVICE}/reply"
TIME = "2026-11-24T22:18:01.000000Z"
OPERATOR, KEY = new_key(77), new_key(1)


class Broker:
    """A link that delivers the replies of `device`."""

    def __init__(self, device: Callable[[OutgoingMessage], list[IncomingMessage]], code: int = 0) -> None:
        self._device, self._code = device, code
        self.sent: list[OutgoingMessage] = []
        self._events: list[IncomingMessage | PublishReceipt] = []

    def send(self, message: OutgoingMessage) -> int:
        self.sent.append(message)
        self._events += [PublishReceipt(1, self._code, "reason"), *self._device(message)]
        return 1

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        events, self._events = self._events, []
        return events

    def acknowledge(self, delivery: IncomingMessage) -> None:
        pass

    def close(self) -> None:
        pass


def reply(command: OutgoingMessage, key: SigningKey = KEY, topic: str = REPLY, **changes: Any) -> IncomingMessage:
    identity = (command.correlation or b"").decode()
    body = {"v": 1, "kind": "reply", "device": DEVICE, "id": identity, "name": "report", "ok": True, "summary": "Done."}
    payload = encode({**body, "data": {"n": 1}, "time": TIME, **changes})
    return IncomingMessage(topic, payload, (jws.sign(key, topic, payload),), False, 1, 1, command.correlation)


@pytest.fixture
def keyring(tmp_path: Path) -> Iterator[Keyring]:
    store = FleetStore(tmp_path / "fleet.db")
    store.enrol(DEVICE, KEY.public, replace=False, now=TIME)
    store.enrol("pi-08", new_key(8).public, replace=False, now=TIME)
    yield Keyring(store)
    store.close()


def through(broker: Broker, keyring: Keyring, wait_s: float = 0.05) -> CommandResult:
    return send(broker, FLEET, DEVICE, "report", {}, OPERATOR, 7, keyring, wait_s)


def test_a_command_is_signed_expires_and_names_its_reply_topic(keyring: Keyring) -> None:
    broker = Broker(lambda command: [reply(command)])
    sent = through(broker, keyring)
    assert (sent.ok, sent.to_dict()["data"]) == (True, {"n": 1})
    [command] = broker.sent
    assert (command.retain, command.response_topic, command.expiry_s) == (False, REPLY, 600)
    signer = jws.Signer("operator", OPERATOR.public)
    token = dict(command.properties)["jws"]
    body = verify_message(command.topic, command.payload, [token], {signer.key.kid: signer}.get).body
    assert isinstance(body, CommandPayload)
    assert (body.device, body.counter, body.id.encode()) == (DEVICE, 7, command.correlation)


@pytest.mark.parametrize(
    "forge",
    [
        lambda command: reply(command, new_key(9)),
        lambda command: reply(command, new_key(8)),
        lambda command: reply(command, new_key(8), REPLY.replace(DEVICE, "pi-08"), device="pi-08"),
        lambda command: reply(command, id="another"),
        lambda command: IncomingMessage(REPLY, reply(command).payload, (), False, 1, 1, command.correlation),
        lambda command: IncomingMessage(
            REPLY, reply(command).payload, reply(command).tokens, True, 1, 1, command.correlation
        ),
        lambda command: IncomingMessage(REPLY, reply(command).payload, reply(command).tokens, False, 1, 1, b"other"),
    ],
    ids=["stranger", "other device's key", "other device", "other command", "unsigned", "retained", "correlation"],
)
def test_a_reply_of_another_device_or_command_is_ignored(
    keyring: Keyring, forge: Callable[[OutgoingMessage], IncomingMessage]
) -> None:
    sent = through(Broker(lambda command: [forge(command)]), keyring)
    assert (sent.ok, sent.to_dict()["answered"]) == (False, False)
    genuine = through(Broker(lambda command: [forge(command), reply(command)]), keyring)
    assert genuine.ok


def test_a_reply_is_accepted_once_the_collector_has_stored_its_new_key(keyring: Keyring) -> None:
    new = new_key(40)

    class Learning(Broker):
        def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
            if not self._events:
                keyring._store.enrol(DEVICE, new.public, replace=True, now=TIME)
            return super().receive(timeout_s)

    assert through(Learning(lambda command: [reply(command, new)]), keyring, 60.0).ok


def test_a_reply_from_before_the_last_look_is_read(keyring: Keyring) -> None:
    assert through(Broker(lambda command: [reply(command)]), keyring, 0.0).ok


def test_the_reply_to_a_rotation_is_accepted_from_the_former_key(keyring: Keyring) -> None:
    def device(command: OutgoingMessage) -> list[IncomingMessage]:
        keyring._store.enrol(DEVICE, new_key(40).public, replace=True, now=TIME, keep_through=1)
        return [reply(command)]

    assert through(Broker(device), keyring).ok


def test_a_revoked_devices_answer_does_not_count(keyring: Keyring) -> None:
    keyring._store.revoke(DEVICE, None, TIME)
    keyring.refresh()
    sent = through(Broker(lambda command: [reply(command)]), keyring)
    assert not sent.ok
    assert "revoked" in sent.reason


def test_an_absent_device_and_a_refusing_broker_are_reported_at_once(keyring: Keyring) -> None:
    assert "not connected" in through(Broker(lambda _: [], NO_SUBSCRIBERS), keyring, 60.0).reason
    assert "access list" in through(Broker(lambda _: [], 0x87), keyring, 60.0).reason


def test_a_counter_is_on_the_disk_before_it_is_used_and_never_comes_again(tmp_path: Path) -> None:
    given = []
    for now_ms in (100, 100, 50, 1000, 7):
        with reserve_counter(tmp_path, partial(int, now_ms)) as counter:
            assert int((tmp_path / COUNTER_FILE).read_text()) == counter
            given.append(counter)
    assert given == [100, 101, 102, 1000, 1001]


def test_a_restored_folder_and_a_second_machine_go_on_above_by_the_clock(tmp_path: Path) -> None:
    with reserve_counter(tmp_path, lambda: 5000) as counter:
        assert counter == 5000
    (tmp_path / COUNTER_FILE).unlink()
    with reserve_counter(tmp_path, lambda: 6000) as counter:
        assert counter == 6000


def test_a_counter_file_that_is_none_is_named_and_not_guessed_over(tmp_path: Path) -> None:
    (tmp_path / COUNTER_FILE).write_text("many\n")
    with pytest.raises(UsageError, match=r"operator\.counter: holds no counter"), reserve_counter(tmp_path, lambda: 1):
        pass


def test_processes_that_command_at_once_never_get_the_same_counter(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from outstation.fleet.commands import reserve_counter\n"
        "for _ in range(20):\n"
        "    with reserve_counter(Path(sys.argv[1]), lambda: 1) as counter: print(counter)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) for _ in range(3)]
    counters = [int(line) for process in running for line in process.communicate(timeout=60)[0].split()]
    assert sorted(counters) == list(range(1, 61))


def test_arguments_are_named_by_their_order_and_wrong_ones_are_refused() -> None:
    assert parse_arguments("set-schedule", ["exercise", "every 5 s"]) == {"task": "exercise", "schedule": "every 5 s"}
    assert parse_arguments("wipe", []) == {}
    for name, values in (("dance", []), ("run", []), ("report", ["x"]), ("run", ["a", "b"])):
        with pytest.raises(UsageError):
            parse_arguments(name, values)


def test_a_reply_must_name_its_command() -> None:
    topic = REPLY
    payload = encode({"v": 1, "kind": "reply", "device": DEVICE, "time": TIME})
    signer = jws.Signer(DEVICE, KEY.public)
    with pytest.raises(MessageRefused, match="malformed"):
        verify_message(topic, payload, [jws.sign(KEY, topic, payload)], {signer.key.kid: signer}.get)


def test_a_wipe_wants_the_devices_name_typed_and_asks_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = []

    def prompt(text: str, **options: Any) -> str:
        arguments.append((text, options["err"]))
        return answers.pop(0)

    answers = ["pi-08", DEVICE]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "prompt", prompt)
    assert not fleet_command.confirm_wipe(DEVICE)
    assert fleet_command.confirm_wipe(DEVICE)
    assert all(DEVICE in text and err for text, err in arguments)


def test_a_damaged_counter_file_is_restored_from_the_database(
    tmp_path: Path,
) -> None:
    ahead, now = 9_000, 5_000
    sender = MessageSender(DEVICE)
    store = FleetStore(tmp_path / "fleet.db")
    store.enrol(DEVICE, sender.key.public, replace=False, now=TIME)
    for counter in (ahead, ahead - 1):
        report = sender.append("audit", event="command", summary="Done.", evidence={"counter": counter})
        store.ingest([Arrival(sender.verify(report))], [], TIME)
    store.close()
    (tmp_path / COUNTER_FILE).write_text("damaged\n")
    says = r"write the highest used counter into it .*docs/reference/remote-commands\.md"
    with pytest.raises(UsageError, match=says), reserve_counter(tmp_path, lambda: now):
        pass
    [query] = re.findall(r"^    (SELECT max\(counter\).*?;)$", COMMANDS.read_text(), re.MULTILINE | re.DOTALL)
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db")) as db:
        [(highest,)] = db.execute(query)
    (tmp_path / COUNTER_FILE).write_text(f"{highest}\n")
    with reserve_counter(tmp_path, lambda: now) as counter:
        assert counter == ahead + 1


def test_a_counter_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / COUNTER_FILE).mkdir()
    with pytest.raises(UsageError, match="the last counter cannot be read"), reserve_counter(tmp_path, lambda: 1):
        pass

"""Sending one command to one device, and waiting for the answer that its own key signed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from agent import clock, durable_files
from agent.errors import Refused, StorageError, UsageError
from agent.fleet.keyring import Key, Keyring
from agent.transport.packets import NO_SUBSCRIBERS, Delivery, Outgoing, Receipt
from agent.wire import jws, topics
from agent.wire.commands import COMMANDS, check_args
from agent.wire.jws import Signer
from agent.wire.keys import SigningKey
from agent.wire.messages import Reply, cloud_event, encode, open_message

VALID_S = 600
COUNTER = "operator.counter"
# How long the collector may take to learn a device's new key, once an answer signed by it is here.
_REFRESH_S = 0.5


class Connection(Protocol):
    """What this uses of a Link."""

    def send(self, message: Outgoing) -> int: ...
    def receive(self, timeout_s: float) -> list[Delivery | Receipt]: ...
    def acknowledge(self, delivery: Delivery) -> None: ...


class Sent(msgspec.Struct, frozen=True):
    """A command that was sent, and its answer; None where none came, for the reason `why`."""

    device: str
    name: str
    id: str
    counter: int
    answer: Reply | None
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.answer is not None and self.answer.ok

    def document(self) -> dict[str, Any]:
        """As `fleet command --json` prints it."""
        head = {"device": self.device, "name": self.name, "id": self.id, "counter": self.counter}
        if self.answer is None:
            return {**head, "answered": False, "ok": False, "summary": self.why, "data": {}}
        got = self.answer
        return {**head, "answered": True, "ok": got.ok, "summary": got.summary, "data": got.data, "time": got.time}


def arguments(name: str, values: Sequence[str]) -> dict[str, str]:
    """`args` of a command, from what a person wrote in order. Raises UsageError."""
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; known are {', '.join(COMMANDS)}")
    known = (*COMMANDS[name].needed, *COMMANDS[name].optional)
    if len(values) > len(known):
        takes = ", ".join(known) or "nothing"
        raise UsageError(f"{name} takes {takes}; quote a schedule that has spaces")
    args = dict(zip(known, values, strict=False))
    try:
        check_args(name, args)
    except ValueError as error:
        raise UsageError(f"{error}; see `outstation fleet command --help`") from None
    return args


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of a folder at a time uses the operator's key and connection. Raises UsageError."""
    try:
        lock = os.open(folder / (COUNTER + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{folder}: commands need to write {COUNTER} there: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def next_counter(folder: Path, now_ms: Callable[[], int]) -> Iterator[int]:
    """A counter that this key never used: on the disk before it is given out; one command of a folder at a time.

    Never below the time in ms, so that a folder that was restored, or is used on two machines, goes on above what it
    used before. Raises UsageError where the file cannot be written.
    """
    path = folder / COUNTER
    with alone(folder):
        counter = max(_stored(path) + 1, now_ms())
        _store(path, counter)
        yield counter


def send(
    link: Connection,
    fleet: str,
    device: str,
    name: str,
    args: dict[str, str],
    key: SigningKey,
    counter: int,
    keyring: Keyring,
    wait_s: float,
) -> Sent:
    """Publish a command on `link`, which is subscribed to the device's replies. Raises LinkDown."""
    identity = secrets.token_hex(8)
    topic = topics.Topic(fleet, device, "cmd")
    reply_topic = str(topics.Topic(fleet, device, "reply"))
    now = clock.read().wall_us
    times = {"issued": clock.rfc3339(now), "expires": clock.rfc3339(now + VALID_S * 1_000_000)}
    head = {"v": 1, "kind": "cmd", "device": device, "id": identity, "name": name, "args": args, "counter": counter}
    payload = encode({**head, **times})
    signed = ("jws", jws.sign(key, str(topic), payload))
    event = cloud_event(topic, f"{device}/cmd/{identity}", times["issued"])
    # The broker keeps it no longer than the device would obey it.
    correlation = identity.encode()
    token = link.send(
        Outgoing(str(topic), payload, (signed, *event), False, VALID_S, correlation, response_topic=reply_topic)
    )
    answers = _Answers(device, identity, reply_topic, keyring)
    answer, why = _wait(link, token, answers, wait_s)
    return Sent(device, name, identity, counter, answer, why)


class _Answers:
    """Tells the one answer that counts; keeps one whose key the collector may still be learning."""

    def __init__(self, device: str, identity: str, topic: str, keyring: Keyring) -> None:
        self._device, self._identity, self._topic, self._keyring = device, identity, topic, keyring
        # Keys that count as the command leaves: the answer to `rotate-key` is signed by the one before.
        self._known: dict[str, Signer] = {}
        self._unknown: list[Delivery] = []
        self.refused = ""

    def take(self, delivery: Delivery) -> Reply | None:
        if delivery.retained or delivery.topic != self._topic or delivery.correlation != self._identity.encode():
            return None
        try:
            body = open_message(delivery.topic, delivery.payload, delivery.tokens, self._find).body
        except Refused as refused:
            self.refused = str(refused)
            if refused.reason == "unknown key" and len(self._unknown) < 10:
                self._unknown.append(delivery)
            return None
        return body if isinstance(body, Reply) and body.id == self._identity else None

    def again(self) -> Reply | None:
        """Whether one that could not be verified can be now."""
        waiting, self._unknown = self._unknown, []
        if waiting:
            self._keyring.refresh()
        return next((found for one in waiting if (found := self.take(one)) is not None), None)

    def _find(self, kid: str) -> Signer | None:
        signer = self._keyring.find(kid)
        if isinstance(signer, Key) and signer.through is None and not signer.revoked:
            self._known[kid] = signer
        return self._known.get(kid, signer)


def _wait(link: Connection, token: int, answers: _Answers, wait_s: float) -> tuple[Reply | None, str]:
    end = time.monotonic() + wait_s
    while (left := end - time.monotonic()) > 0:
        for event in link.receive(min(left, _REFRESH_S)):
            if isinstance(event, Delivery):
                link.acknowledge(event)
                if (found := answers.take(event)) is not None:
                    return found, ""
            elif event.token == token and event.code == NO_SUBSCRIBERS:
                return None, "The device is not connected: nobody received the command, and it is gone."
            elif event.token == token and not event.taken:
                return None, f"The broker refused the command: {event.reason}; check its access list."
        if (found := answers.again()) is not None:
            return found, ""
    seen = f" An answer came that did not verify: {answers.refused}." if answers.refused else ""
    return (
        None,
        f"No answer within {wait_s:g} s; whether it was obeyed is not known, see `outstation fleet watch`.{seen}",
    )


def _stored(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise UsageError(f"{path}: the last counter cannot be read: {error.strerror}; see who owns the file") from None
    except ValueError as error:
        raise UsageError(
            f"{path}: holds no counter ({error}), and devices refuse one that is not above the last; write the highest "
            "that was used into it (docs/commands.md has the query), or delete it where no clock was ever ahead"
        ) from None


def _store(path: Path, counter: int) -> None:
    try:
        durable_files.write(path, f"{counter}\n".encode(), 0o600)
    except StorageError as error:
        raise UsageError(f"a counter must be on the disk before it is used: {error}") from None

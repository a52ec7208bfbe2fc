"""Remote commands: send one to a device, and wait for the reply that its own key signed."""

from __future__ import annotations

import contextlib
import difflib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from outstation.fleet.database.keyring import DeviceKey, Keyring
from outstation.foundation import clock, durable_files, input_files
from outstation.foundation.errors import LinkDown, MessageRefused, StorageError, UsageError
from outstation.protocol.transport import sealing
from outstation.protocol.transport.packets import (
    NO_SUBSCRIBERS,
    BrokerLink,
    IncomingMessage,
    OutgoingMessage,
    PublishReceipt,
)
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire import jws, topics
from outstation.protocol.wire.commands import COMMANDS, check_args
from outstation.protocol.wire.jws import Signer, encode
from outstation.protocol.wire.keys import SigningKey, encryption_key_of
from outstation.protocol.wire.messages import ReplyPayload
from outstation.protocol.wire.topics import cloudevent_properties
from outstation.protocol.wire.verification import verify_message

VALID_S = 600
PUBLISH_TIMEOUT_S = 10.0
COUNTER_FILE = "operator.counter"
# How often keys are read again while a reply is waiting whose key the collector has not stored yet.
_REFRESH_S = 0.5


class CommandResult(msgspec.Struct, frozen=True):
    """A sent command and its reply; None if no reply arrived, with the reason."""

    device: str
    name: str
    id: str
    counter: int
    reply: ReplyPayload | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.reply is not None and self.reply.ok

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `fleet command --json`."""
        head = {"device": self.device, "name": self.name, "id": self.id, "counter": self.counter}
        if self.reply is None:
            return {**head, "answered": False, "ok": False, "summary": self.reason, "data": {}}
        reply = self.reply
        members = {"ok": reply.ok, "summary": reply.summary, "data": reply.data, "time": reply.time}
        return {**head, "answered": True, **members}


def parse_arguments(name: str, values: Sequence[str]) -> dict[str, str]:
    """Return the `args` of a command from positional values. Raises UsageError."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"unknown command {name!r}; known commands are {', '.join(COMMANDS)}{hint}")
    names = (*COMMANDS[name].required, *COMMANDS[name].optional)
    if len(values) > len(names):
        accepted = ", ".join(names) or "no arguments"
        raise UsageError(f"{name} accepts {accepted}; quote a value that has spaces")
    args = dict(zip(names, values, strict=False))
    try:
        check_args(name, args)
    except ValueError as error:
        raise UsageError(f"{error}; see `outstation fleet command --help`") from None
    return args


@contextlib.contextmanager
def lock_operator(folder: Path) -> Iterator[None]:
    """Allow one process per folder to use the operator's key and connection. Raises UsageError."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(durable_files.lock(folder / f"{COUNTER_FILE}.lock"))
        except OSError as error:
            problem = f"cannot write {COUNTER_FILE}, which each command needs: {error.strerror}"
            raise UsageError(f"{folder}: {problem}") from None
        yield


@contextlib.contextmanager
def reserve_counter(folder: Path, now_ms: Callable[[], int]) -> Iterator[int]:
    """Reserve a counter that this key never used, for one command of a folder at a time.

    The counter is on the disk before it is used. It is at least the time in ms, so a folder that was restored, or is
    used on two machines, continues above the counters used before. Raises UsageError if the file cannot be written.
    """
    path = folder / COUNTER_FILE
    with lock_operator(folder):
        try:
            counter = max(int(input_files.read_text(path, "ascii")) + 1, now_ms())
        except FileNotFoundError:
            counter = now_ms()
        except OSError as error:
            raise UsageError(f"{path}: the last counter cannot be read: {error.strerror}; check its owner") from None
        except ValueError as error:
            raise UsageError(
                f"{path}: holds no counter ({error}), and devices refuse a counter that is not above the last; write "
                "the highest used counter into it (docs/reference/remote-commands.md has the query), or delete it if "
                "no clock was ever ahead"
            ) from None
        try:
            durable_files.write(path, f"{counter}\n".encode(), 0o600)
        except StorageError as error:
            raise UsageError(f"the counter must be on the disk before it is used: {error}") from None
        yield counter


def send(
    link: BrokerLink,
    fleet: str,
    device: str,
    name: str,
    args: dict[str, str],
    key: SigningKey,
    counter: int,
    keyring: Keyring,
    wait_s: float,
) -> CommandResult:
    """Publish a command on `link`, which must be subscribed to the device's replies. Raises LinkDown."""
    identity = secrets.token_hex(8)
    topic = topics.Topic(fleet, device, "cmd")
    reply_topic = str(topics.Topic(fleet, device, "reply"))
    now = clock.read().wall_us
    times = {"issued": clock.to_rfc3339(now), "expires": clock.to_rfc3339(now + VALID_S * 1_000_000)}
    head = {"v": 1, "kind": "cmd", "device": device, "id": identity, "name": name, "args": args, "counter": counter}
    reply_key = X25519PrivateKey.generate()
    payload = encode({**head, **times, "reply_key": encryption_key_of(reply_key).text})
    signed = ("jws", jws.sign(key, str(topic), payload))
    event = cloudevent_properties(topic, f"{device}/cmd/{identity}", times["issued"])
    # The broker must not keep the command longer than the device would obey it.
    correlation = identity.encode()
    token = link.send(
        OutgoingMessage(str(topic), payload, (signed, *event), False, VALID_S, correlation, response_topic=reply_topic)
    )
    reply, reason = _ReplyMatcher(identity, reply_topic, keyring, Opener([reply_key])).wait(link, token, wait_s)
    return CommandResult(device, name, identity, counter, reply, reason)


def send_retained(link: BrokerLink, messages: Sequence[OutgoingMessage]) -> None:
    """Send retained messages and wait until the broker has them all. Raises LinkDown, also on a refusal."""
    waiting = {link.send(message): message.topic for message in messages}
    end = time.monotonic() + PUBLISH_TIMEOUT_S
    while waiting:
        left = end - time.monotonic()
        if left <= 0:
            late = ", ".join(sorted(waiting.values()))
            raise LinkDown(f"the broker did not accept {late} within {PUBLISH_TIMEOUT_S:g} s")
        for receipt in link.receive(left):
            if not isinstance(receipt, PublishReceipt) or receipt.token not in waiting:
                continue
            target = waiting.pop(receipt.token)
            if not receipt.is_accepted:
                raise LinkDown(
                    f"the broker refused {target}: {receipt.reason}; its access list must let the operator write there "
                    "(`outstation fleet init` of this version writes one that does)"
                )


class _ReplyMatcher:
    """Finds the reply to one command; holds replies whose key the collector may not have stored yet."""

    def __init__(self, identity: str, topic: str, keyring: Keyring, opener: Opener) -> None:
        self._identity, self._topic, self._keyring, self._opener = identity, topic, keyring, opener
        # Keys valid when the command was sent: the reply to `rotate-key` is signed with the former key.
        self._trusted_signers: dict[str, Signer] = {}
        self._unverified: list[IncomingMessage] = []
        self.refusal = ""

    def wait(self, link: BrokerLink, token: int, wait_s: float) -> tuple[ReplyPayload | None, str]:
        """Return the reply to the command that was sent as `token`, or the reason why there is none."""
        end, is_over = time.monotonic() + wait_s, False
        while not is_over:
            left = end - time.monotonic()
            # The last look comes after the end: a process that was stopped meanwhile has not read its reply.
            is_over = left <= 0
            for event in link.receive(max(0.0, min(left, _REFRESH_S))):
                if isinstance(event, IncomingMessage):
                    link.acknowledge(event)
                    if (reply := self.match_reply(event)) is not None:
                        return reply, ""
                elif event.token == token and event.code == NO_SUBSCRIBERS:
                    return None, "The device is not connected; it never receives this command."
                elif event.token == token and not event.is_accepted:
                    return None, f"The broker refused the command: {event.reason}; check its access list."
            if (reply := self.retry_unverified()) is not None:
                return reply, ""
        refused = f" A reply did not verify: {self.refusal}." if self.refusal else ""
        late = f"No reply within {wait_s:g} s; the device may have executed it, see `outstation fleet devices watch`."
        return None, late + refused

    def match_reply(self, delivery: IncomingMessage) -> ReplyPayload | None:
        if delivery.retained or delivery.topic != self._topic or delivery.correlation != self._identity.encode():
            return None
        try:
            if delivery.sealed:
                delivery = sealing.open_message(delivery, self._opener)
            body = verify_message(delivery.topic, delivery.payload, delivery.tokens, self._find).body
        except MessageRefused as refused:
            self.refusal = str(refused)
            if refused.reason == "unknown key" and len(self._unverified) < 10:
                self._unverified.append(delivery)
            return None
        return body if isinstance(body, ReplyPayload) and body.id == self._identity else None

    def retry_unverified(self) -> ReplyPayload | None:
        """Read the keys again, and return the reply if one that did not verify does now."""
        waiting, self._unverified = self._unverified, []
        if waiting:
            self._keyring.refresh()
        return next((reply for delivery in waiting if (reply := self.match_reply(delivery)) is not None), None)

    def _find(self, kid: str) -> Signer | None:
        signer = self._keyring.find(kid)
        if isinstance(signer, DeviceKey) and signer.last_seq is None and not signer.revoked:
            self._trusted_signers[kid] = signer
        return self._trusted_signers.get(kid, signer)

"""Registrar: answers the enrolment requests of invited devices over MQTT.

It runs while the operator waits for devices: the collector, which reads messages of every client, never uses the
fleet's certificate authority.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from hmac import compare_digest
from pathlib import Path
from typing import NamedTuple

from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import broker_access, invitations, join_tokens, pki
from outstation.fleet.enrolment.enrol import check_request, enrol
from outstation.fleet.enrolment.invitations import OpenInvitation
from outstation.foundation import clock, durable_files, input_files
from outstation.foundation.errors import LinkDown, MessageRefused, UsageError
from outstation.protocol.documents import enrolment_request
from outstation.protocol.documents.enrolment_request import EnrolmentRequest
from outstation.protocol.transport import tls
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import invitation

LOCK = "registrar.lock"
# An honest device sends no wrong request; a token cannot be guessed in as many.
MAX_REFUSED = 20
_MIN_INTERVAL_S, _REFRESH_S, _RETRY_S, _REPORT_S = 1.0, 2.0, 2.0, 60.0


class InvitationEvent(NamedTuple):
    """Step of an invitation: answered, joined, refused, expired or withdrawn; `reply` goes to the device.

    Without a device: the registrar waits for the broker, or ignored messages.
    """

    device: str
    state: str
    detail: str = ""
    reply: bytes | None = None
    steps: tuple[str, ...] = ()


class Registrar:
    """Answers requests of invited devices. It is given messages and times, and does not know the broker connection."""

    def __init__(self, folder: Path, config: FleetConfig, store: FleetStore) -> None:
        self._folder, self._config, self._store = folder, config, store
        self.invitations: dict[str, OpenInvitation] = {}
        self.ignored = self._reported = 0
        self._next_report_s = 0.0
        self._refused: dict[str, int] = {}
        self._read_s: dict[str, float] = {}
        self._answers: dict[str, bytes] = {}

    def refresh(self, now_us: int, boot_s: float) -> list[InvitationEvent]:
        """Read the open invitations again, withdraw those that have expired, and report what was ignored.

        Ignored messages are reported at most once a minute: a flood must not fill the terminal.
        """
        self.invitations = {opened.account: opened for opened in invitations.list_open(self._folder)}
        ended = [opened for opened in self.invitations.values() if opened.expires_us <= now_us]
        events = [self._withdraw(opened, "expired", "") for opened in ended]
        if boot_s < self._next_report_s or not (report := self.report_ignored()):
            return events
        self._next_report_s = boot_s + _REPORT_S
        return [*events, *report]

    def report_ignored(self) -> list[InvitationEvent]:
        """Report the messages that were ignored since the last report."""
        count, self._reported = self.ignored - self._reported, self.ignored
        if not count:
            return []
        return [InvitationEvent("", "ignored", f"{count} messages without an open invitation, too large or too often")]

    def handle(self, account: str, payload: bytes, now_us: int, boot_s: float) -> InvitationEvent | None:
        """Handle what an account sent; None for what is ignored: it costs no signature and no database."""
        opened = self.invitations.get(account)
        if opened is None or opened.expires_us <= now_us or len(payload) > enrolment_request.MAX_BYTES:
            self.ignored += 1
            return None
        answer = self._answers.get(account)
        if answer is not None and compare_digest(payload, invitation.build_receipt(opened.token, answer)):
            return self._withdraw(opened, "joined", "")
        if boot_s - self._read_s.get(account, -_MIN_INTERVAL_S) < _MIN_INTERVAL_S:
            self.ignored += 1
            return None
        self._read_s[account] = boot_s
        home = self._folder / "devices" / opened.device
        try:
            request = enrolment_request.parse(payload)
            check_request(self._config, opened.device, request)
            join_tokens.authenticate(home, request, None, now_us)
        except (MessageRefused, UsageError) as error:
            return self._refuse(opened, str(error))
        content, event = self._enrol(opened, request)
        self._answers[account] = invitation.seal_answer(opened.token, payload, content)
        return event._replace(reply=self._answers[account])

    def _enrol(self, opened: OpenInvitation, request: EnrolmentRequest) -> tuple[bytes, InvitationEvent]:
        """Return the content of the answer to a request that the device proved to be its own."""
        with tempfile.TemporaryDirectory() as made:
            bundle = Path(made) / "enrolment.tar.gz"
            try:
                done = enrol(self._folder, self._config, self._store, opened.device, request=request, bundle=bundle)
            except UsageError as error:
                return invitation.REFUSAL + str(error).encode(), InvitationEvent(opened.device, "refused", str(error))
            content = invitation.FILES + input_files.read_bytes(bundle)
        return content, InvitationEvent(opened.device, "answered", done.key.kid, steps=tuple(done.revoked.steps))

    def _refuse(self, opened: OpenInvitation, problem: str) -> InvitationEvent:
        refused = self._refused[opened.account] = self._refused.get(opened.account, 0) + 1
        if refused < MAX_REFUSED:
            return InvitationEvent(opened.device, "refused", problem)
        detail = f"{refused} wrong requests: the broker, or somebody with the code, tries to join in its place"
        return self._withdraw(opened, "withdrawn", detail)

    def _withdraw(self, opened: OpenInvitation, state: str, detail: str) -> InvitationEvent:
        outcome = invitations.withdraw(self._folder, self._config, opened)
        counts: tuple[dict[str, object], ...] = (self.invitations, self._refused, self._read_s, self._answers)  # type: ignore[assignment]
        for known in counts:
            known.pop(opened.account, None)
        return InvitationEvent(opened.device, state, detail, steps=outcome.steps)


def serve(registrar: Registrar, config: FleetConfig, folder: Path) -> Iterator[InvitationEvent]:
    """Answer requests until no invitation is open; yield what happened, and why the broker cannot be reached.

    Raises UsageError if another process answers.
    """
    assert config.ca is not None
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    # Its key is on the disk only until the connection is made.
    issued = authority.issue_client(broker_access.REGISTRAR, config.fleet.name, timedelta(days=1))
    files = {"cert_file": issued.certificate, "tls_key_file": issued.key}
    try:
        with durable_files.lock(folder / LOCK, wait=False):
            now = clock.read()
            yield from registrar.refresh(now.wall_us, now.boot_s)
            while registrar.invitations:
                try:
                    with tls.client_files(config.broker, files) as broker:
                        link = Link(
                            broker, broker_access.REGISTRAR,
                            subscribe=[invitation.build_topic(config.fleet.name, "+", "request")],
                        )  # fmt: skip
                    with contextlib.closing(link):
                        yield from _answer(registrar, link)
                except LinkDown as down:
                    yield InvitationEvent("", "waits", str(down))
                    time.sleep(_RETRY_S)
                    now = clock.read()
                    yield from registrar.refresh(now.wall_us, now.boot_s)
    except BlockingIOError:
        raise UsageError(
            "another `fleet invite` answers requests already; with --no-wait this one leaves it to it"
        ) from None


def _answer(registrar: Registrar, link: Link) -> Iterator[InvitationEvent]:
    """Answer requests that come through a link until no invitation is open. Raises LinkDown."""
    refresh_s = 0.0
    while registrar.invitations:
        now = clock.read()
        if now.boot_s >= refresh_s:
            refresh_s = now.boot_s + _REFRESH_S
            yield from registrar.refresh(now.wall_us, now.boot_s)
        for message in link.receive(0.5):
            if not isinstance(message, IncomingMessage):
                continue
            link.acknowledge(message)
            now = clock.read()
            account = invitation.parse_account(message.topic)
            event = registrar.handle(account, message.payload, now.wall_us, now.boot_s)
            if event is not None and event.reply is not None:
                topic = message.topic.removesuffix("request") + "answer"
                link.send(OutgoingMessage(topic, event.reply, content_type=invitation.CONTENT_TYPE))
            if event is not None:
                yield event

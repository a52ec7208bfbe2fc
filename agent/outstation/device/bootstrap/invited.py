"""Enrolment with an invitation: make the device's keys, ask over MQTT, and authenticate the operator's answer."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from outstation.device.bootstrap import credentials
from outstation.device.bootstrap.device import KEY_FILE, TLS_KEY_FILE
from outstation.device.config import BrokerConfig, check_broker
from outstation.foundation.errors import ConfigError, LinkDown, UsageError, explain
from outstation.protocol.documents import enrolment_request
from outstation.protocol.transport import tls
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire import invitation
from outstation.protocol.wire.invitation import Invitation
from outstation.protocol.wire.keys import PublicKey

# More come only from an attacker who withholds the true answer.
_MAX_FORGED = 10
_REPEAT_S, _RETRY_S, _CONFIRM_S = 5.0, 2.0, 10.0


def make_request(folder: Path, fleet: str, device: str, token: str | None) -> tuple[bytes, PublicKey]:
    """Make the device's keys in `folder`, unless they are there, and return a request and the public signing key.

    Raises UsageError, and ValueError for a token that cannot be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: {explain(error)}") from None
    key, tls_key = (
        credentials.load_or_generate(path, write_public=path.name == KEY_FILE)
        for path in (folder / KEY_FILE, folder / TLS_KEY_FILE)
    )
    return enrolment_request.build(fleet, device, key, tls_key, token), key.public


def parse_code(code: str, url: str | None) -> tuple[Invitation, BrokerConfig]:
    """Return the invitation and its broker, at another address with `url`. Raises UsageError."""
    try:
        invited = invitation.parse(code)
        broker = BrokerConfig(url=url or invited.broker)
        check_broker("--broker", broker)
    except ValueError as problem:
        raise UsageError(f"--code: {problem}") from None
    except ConfigError as error:
        raise UsageError(f"--broker: {error.problem}") from None
    if not broker.tls:
        raise UsageError(f"--broker: {broker.shown_url} is not encrypted; an invitation is for mqtts://")
    return invited, broker


def ask(invited: Invitation, broker: BrokerConfig, request: bytes, wait_s: float) -> bytes:
    """Send the request until the operator's side answers; return the answer, whose content is an enrolment file.

    Answers that the operator's side did not make are ignored. Raises UsageError for a refusal, and without an answer
    after `wait_s` or `_MAX_FORGED` others.
    """
    deadline, problem, forged = time.monotonic() + wait_s, "", 0
    while time.monotonic() < deadline:
        try:
            with contextlib.closing(_connect(invited, broker, [invited.answer_topic])) as link:
                problem, send_s = "", 0.0
                while (now := time.monotonic()) < deadline:
                    if now >= send_s:
                        link.send(OutgoingMessage(invited.request_topic, request, content_type=invitation.CONTENT_TYPE))
                        send_s = now + _REPEAT_S
                    for message in link.receive(0.5):
                        if not isinstance(message, IncomingMessage):
                            continue
                        link.acknowledge(message)
                        content = invitation.open_answer(invited.token, request, message.payload)
                        if content is None:
                            forged += 1
                            deadline = now if forged == _MAX_FORGED else deadline
                        elif content.startswith(invitation.REFUSAL):
                            reason = content.removeprefix(invitation.REFUSAL).decode(errors="replace")
                            raise UsageError(f"the operator's side refused: {reason}")
                        else:
                            return message.payload
        except LinkDown as down:
            problem = f": {down}"
            time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
    hint = "is `outstation fleet invite` running there, and the code still valid?"
    if forged:
        hint = f"{forged} answers were not made with this code: somebody at the broker forges them; {hint}"
    raise UsageError(f"{broker.shown_url}: no answer within {wait_s:g} s{problem}; {hint}")


def read_answer(answer: bytes) -> bytes:
    """Return the enrolment file in an authenticated answer."""
    return answer[invitation.MAC_BYTES :].removeprefix(invitation.FILES)


def confirm(invited: Invitation, broker: BrokerConfig, answer: bytes) -> bool:
    """Tell the operator's side that the device has the answer, so that the invitation ends; False if it cannot."""
    try:
        with contextlib.closing(_connect(invited, broker, [])) as link:
            receipt = invitation.build_receipt(invited.token, answer)
            link.send(OutgoingMessage(invited.request_topic, receipt, content_type=invitation.CONTENT_TYPE))
            deadline = time.monotonic() + _CONFIRM_S
            while time.monotonic() < deadline:
                if any(isinstance(event, PublishReceipt) for event in link.receive(0.5)):
                    return True
    except LinkDown:
        pass
    return False


def _connect(invited: Invitation, broker: BrokerConfig, topics: list[str]) -> Link:
    """Connect with the account of the invitation. Raises LinkDown."""
    with tls.client_files(broker, invited.client_files) as settings:
        return Link(settings, invited.account, subscribe=topics)

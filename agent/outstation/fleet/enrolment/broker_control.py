"""Control of a running broker: access changes through Mosquitto's dynamic-security plugin, at once and for good.

The broker owns its file `dynamic-security.json` while it runs, and writes it after each change. A broker that cannot be
reached gets its changes in the file. `broker-pending.json` lists changes that no broker has confirmed: the next change
that reaches it brings them along. One that the broker refuses holds up no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from outstation.fleet.config import ClientCertificate, FleetConfig
from outstation.fleet.enrolment import broker_access
from outstation.fleet.enrolment.broker_access import CONTROL_TOPIC, AccessChange, Document
from outstation.fleet.enrolment.pki import CertificateAuthority
from outstation.foundation import decoders, durable_files, input_files
from outstation.foundation.errors import LinkDown, StorageError
from outstation.protocol.transport import tls
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage

ACCESS_FILE = "dynamic-security.json"
PENDING_FILE = "broker-pending.json"
PID_FILE = "mosquitto.pid"
RESPONSE_TOPIC = f"{CONTROL_TOPIC}/response"
_TIMEOUT_S = 5.0
# For a file of tens of thousands of devices.
_REPLY_TIMEOUT_S = 30.0
# For a broker whose clock differs; the key is erased at once.
_TAKEOVER_LIFETIME = timedelta(hours=1)


def write_access_file(path: Path, document: Document) -> None:
    """Write the plugin's file; it stays with the user that runs the broker. Raises StorageError."""
    owner = path.stat() if path.exists() else None
    durable_files.write(path, json.dumps(document, indent=1).encode(), 0o600)
    if owner is not None and owner.st_uid != os.geteuid():
        os.chown(path, owner.st_uid, owner.st_gid)


class AccessOutcome(NamedTuple):
    """Effect of a change at the broker, and the steps left to the operator, also for earlier changes."""

    is_in_force: bool
    steps: tuple[str, ...] = ()


def apply(folder: Path, config: FleetConfig, change: AccessChange) -> AccessOutcome:
    """Put a change in force at the broker, with those that wait.

    A broker without TLS has no access rules. Raises StorageError if the change cannot be recorded.
    """
    if config.broker_admin is None:
        return AccessOutcome(True)
    with _lock(folder):
        return _apply_pending(folder, config, config.broker_admin, change)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Allow one process per folder to change the rules: they share the file and the administrator's connection."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(durable_files.lock(folder / f"{PENDING_FILE}.lock"))
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written: {error.strerror}; see who owns the folder") from error
        yield


def _apply_pending(folder: Path, config: FleetConfig, admin: ClientCertificate, change: AccessChange) -> AccessOutcome:
    pending = [*(other for other in _load_pending(folder) if other.client != change.client), change]
    # A link that fails midway costs no revocation its turn.
    pending.sort(key=lambda waiting: waiting.access != "none")
    _save_pending(folder, pending)
    path = folder / "broker" / ACCESS_FILE
    fleet = config.fleet.name
    try:
        refused = _control(config.broker_for(admin), fleet, pending)
    except LinkDown as error:
        return AccessOutcome(False, _write_pending(path, fleet, pending, str(error)))
    _save_pending(folder, list(refused))
    # The file of a broker on this machine has the change by now, and may be readable to the broker's user alone. Of a
    # broker elsewhere it is the copy from which that one can be set up again.
    with contextlib.suppress(OSError, StorageError, ValueError):
        _edit_file(path, fleet, [waiting for waiting in pending if waiting not in refused])
    return AccessOutcome(change not in refused, tuple(_describe_refusal(*entry) for entry in refused.items()))


def _save_pending(folder: Path, pending: Sequence[AccessChange]) -> None:
    if pending:
        durable_files.write(folder / PENDING_FILE, msgspec.json.encode(pending), 0o600)
    else:
        durable_files.remove(folder / PENDING_FILE)


def _describe_refusal(change: AccessChange, reason: str) -> str:
    return (
        f"The broker refused to change the access of {change.client}: {reason}. The next change of any client tries it "
        "again. If it stays refused, stop the broker, repeat the command, and start the broker: the rules are then "
        "written to its file."
    )


def reload(folder: Path) -> bool:
    """Let the broker of `folder` read its revocation list; False if it does not run here, or as another user."""
    try:
        pid = int(input_files.read_text((folder / "broker" / PID_FILE), "ascii"))
        # After a crash another process may have the number.
        if input_files.read_text(Path(f"/proc/{pid}/comm")).strip() != "mosquitto":
            return False
        # The signal ends a broker that starts and does not catch it yet.
        deadline = time.monotonic() + _TIMEOUT_S
        while not _catches(pid, signal.SIGHUP):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError):
        return False
    return True


def _catches(pid: int, number: signal.Signals) -> bool:
    """Return True if a process has a handler for a signal; see SigCgt in proc_pid_status(5). Raises OSError."""
    lines = input_files.read_text(Path(f"/proc/{pid}/status")).splitlines()
    masks = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(next(masks, 0) >> (number - 1) & 1)


def end_session(config: FleetConfig, client: str, authority: CertificateAuthority) -> None:
    """End the session of a client, open or not, by taking it over with a certificate in its name.

    Raises LinkDown and StorageError.
    """
    certificate = authority.issue_client(client, config.fleet.name, _TAKEOVER_LIFETIME)
    files = {"cert_file": certificate.certificate, "tls_key_file": certificate.key}
    with tls.client_files(config.broker, files) as broker:
        # A clean start discards the former session, and this one ends with its connection.
        Link(broker, client, timeout_s=_TIMEOUT_S).close()


def _control(broker: BrokerConfig, fleet: str, changes: Iterable[AccessChange]) -> dict[AccessChange, str]:
    """Put changes in force, and return those that the broker refused, with its reasons. Raises LinkDown."""
    refused = {}
    with Link(broker, broker_access.ADMIN, subscribe=[RESPONSE_TOPIC], timeout_s=_TIMEOUT_S) as link:
        for change in changes:
            query = {"command": "getClient", "username": change.client}
            if broker_access.is_in_force(change, find_reply(request(link, [query]))):
                continue
            responses = request(link, [*broker_access.build_creation(change, fleet), query])
            if not broker_access.is_in_force(change, find_reply(responses)):
                responses = request(link, [*broker_access.build_commands(change, fleet), query])
            if not broker_access.is_in_force(change, find_reply(responses)):
                errors = "; ".join(response["error"] for response in responses if "error" in response)
                refused[change] = errors or "it confirmed the change, and lists another access"
    return refused


def request(link: Link, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send commands to the plugin, and return its responses in their order. Raises LinkDown."""
    link.send(OutgoingMessage(CONTROL_TOPIC, json.dumps({"commands": commands}).encode()))
    deadline = time.monotonic() + _REPLY_TIMEOUT_S
    while time.monotonic() < deadline:
        for event in link.receive(0.2):
            if isinstance(event, IncomingMessage):
                link.acknowledge(event)
                responses: list[dict[str, Any]] = json.loads(event.payload)["responses"]
                return responses
            if not event.is_accepted:
                raise LinkDown(f"the broker refused a message on the control topic: {event.reason}")
    raise LinkDown("the broker did not answer on the control topic; does it load the dynamic-security plugin?")


def find_reply(responses: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    client: dict[str, Any] | None = responses[-1].get("data", {}).get("client")
    return client


def _write_pending(path: Path, fleet: str, pending: Sequence[AccessChange], reason: str) -> tuple[str, ...]:
    """Write the changes to the file of a broker that confirmed none, and return the steps."""
    problem = f"The broker did not confirm the change of its access rules: {reason}."
    try:
        _edit_file(path, fleet, pending)
    except (OSError, StorageError, ValueError) as error:
        return (
            f"{problem} Its file {path} could not be written either ({error}): repeat the command as its owner, or "
            "while the broker can be reached.",
        )
    return (
        f"{problem} {path} has the change: if the broker runs elsewhere, copy it to its `plugin_opt_config_file`; then "
        "restart the broker. Or repeat this command while the broker can be reached.",
    )


def _edit_file(path: Path, fleet: str, changes: Iterable[AccessChange]) -> None:
    document = json.loads(input_files.read_bytes(path))
    if broker_access.edit_document(document, fleet, changes):
        write_access_file(path, document)


def _load_pending(folder: Path) -> list[AccessChange]:
    path = folder / PENDING_FILE
    try:
        return decoders.from_json(input_files.read_bytes(path), list[AccessChange])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        hint = "remove it, and repeat the last `fleet enrol` and `fleet devices revoke`"
        raise StorageError(f"{path}: changes for the broker cannot be read: {error}; {hint}") from error

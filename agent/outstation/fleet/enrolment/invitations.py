"""Invitations: codes with which devices enrol over MQTT, and their accounts at the broker.

Each invitation has an account at the broker that may do nothing but ask for this enrolment. It ends with the device's
receipt, when it expires, after too many wrong requests, or with the next invitation of the device.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from outstation.fleet.config import FleetConfig
from outstation.fleet.enrolment import broker_control, join_tokens, pki
from outstation.fleet.enrolment.broker_access import AccessChange
from outstation.fleet.enrolment.broker_control import AccessOutcome
from outstation.fleet.enrolment.enrol import device_folder
from outstation.foundation import decoders, durable_files, input_files
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import invitation
from outstation.protocol.wire.invitation import Invitation

FILE = "invitation.json"


class OpenInvitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Invitation that no device has used yet; `expires_us`: wall-clock time."""

    device: str
    account: str
    token: str
    expires_us: int


def create(folder: Path, config: FleetConfig, device: str, now_us: int, valid_us: int) -> tuple[str, AccessOutcome]:
    """Invite `device` in place of an earlier invitation; return its code and the effect at the broker.

    Raises UsageError for a name that is taken, and for a fleet whose broker has no accounts.
    """
    if config.ca is None or config.broker_admin is None:
        raise UsageError(
            f"the broker {config.broker.shown_url} has no access rules, so nobody can be let in for one request; "
            "use `fleet devices token`, or make the fleet with an mqtts:// broker"
        )
    home = device_folder(folder, device)
    if (former := _load(home)) is not None:
        withdraw(folder, config, former)
    token = join_tokens.create(home, now_us + valid_us)
    account = f"_join-{secrets.token_hex(8)}"
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    key = invitation.derive_tls_key(token).private.public_key()
    certificate = authority.certify_client(account, config.fleet.name, key, timedelta(microseconds=valid_us))
    record = OpenInvitation(device, account, token, now_us + valid_us)
    durable_files.write(home / FILE, msgspec.json.encode(record), 0o600)
    made = Invitation(
        config.fleet.name, device, config.broker.url, account, token,
        authority.certificate.public_bytes(Encoding.DER),
        x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER),
    )  # fmt: skip
    return made.code, broker_control.apply(folder, config, AccessChange(account, "joining"))


def withdraw(folder: Path, config: FleetConfig, opened: OpenInvitation) -> AccessOutcome:
    """End an invitation: its account goes from the broker, which ends the account's connection."""
    outcome = broker_control.apply(folder, config, AccessChange(opened.account, "removed"))
    durable_files.remove(folder / "devices" / opened.device / FILE)
    return outcome


def list_open(folder: Path) -> list[OpenInvitation]:
    """Return the open invitations, also expired ones."""
    records = (_load(path.parent) for path in sorted((folder / "devices").glob(f"*/{FILE}")))
    return [opened for opened in records if opened is not None]


def _load(home: Path) -> OpenInvitation | None:
    try:
        return decoders.from_json(input_files.read_bytes(home / FILE), OpenInvitation)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{home / FILE}: cannot be read: {error}; delete it, and invite the device again") from None

"""Viewers' broker: a second Mosquitto that copies the fleet's messages, for any number of readers.

At the fleet's broker the name in a certificate is the client id, so that nobody throws a device off by taking its id.
Mosquitto has no pattern for client ids, so a viewer has one connection there. This broker knows no device: a viewer may
take any id, as often as it likes, with its certificate or with a user name and password. What it takes in comes through
one connection with the access of a viewer, and nothing goes back: an intruder here has read the fleet's messages.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import msgspec

from outstation.fleet.config import FleetConfig
from outstation.fleet.enrolment import broker_access, broker_config, broker_control, pki
from outstation.fleet.enrolment.broker_access import AccessChange
from outstation.fleet.enrolment.broker_control import ACCESS_FILE
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import LinkDown, StorageError, UsageError
from outstation.protocol.transport.mqtt import Link

# Its own client at the fleet's broker.
BRIDGE = "viewers"
# 144 bits: no iterations of its hash are needed.
_HASH_ITERATIONS = 101
_SECRETS = ("password", "salt", "iterations")
_TIMEOUT_S = 5.0

_CONFIG = """\
# Mosquitto 2 for the viewers of the fleet {fleet}. Start with: mosquitto -c {folder}/mosquitto.conf
# It runs beside the fleet's broker, or on any machine that reaches it. The user that runs it must own this folder.

# Retained messages come again from the fleet's broker.
persistence false
max_queued_messages 1000
max_queued_bytes 16777216
max_packet_size 1048576
log_dest stderr
log_type error
log_type warning
log_type notice

# Viewers and their passwords, which `fleet keys viewer` changes while the broker runs.
plugin {plugin}
plugin_opt_config_file {folder}/{access}

# Certificates of the fleet. Every connection may have a client id of its own.
listener {certificate_port}
cafile {home}/ca.pem
certfile {home}/server.crt
keyfile {home}/server.key
{crl}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
allow_anonymous false

# User names and passwords.
listener {password_port}
certfile {home}/server.crt
keyfile {home}/server.key
tls_version tlsv1.2
allow_anonymous false

# Messages come in and none goes out. The local client id is secret: a viewer that knew it could end the connection.
connection fleet
address {host}:{port}
bridge_cafile {home}/ca.pem
bridge_certfile {folder}/bridge.crt
bridge_keyfile {folder}/bridge.key
bridge_protocol_version mqttv50
remote_clientid {bridge}
local_clientid {secret}
notifications false
cleansession true
restart_timeout 1 30
topic {tree} in 1
"""


class ViewersBroker:
    """The folder `broker/viewers` of a fleet's folder."""

    def __init__(self, folder: Path, config: FleetConfig) -> None:
        self._fleet_folder, self._config = folder, config
        self.folder = folder.resolve() / "broker" / "viewers"
        self.conf = self.folder / "mosquitto.conf"

    @property
    def exists(self) -> bool:
        return self.conf.exists()

    def create(self) -> list[str]:
        """Write its files, unless they are there, and return the steps left to the operator. Raises UsageError."""
        if self.exists:
            return []
        config, home = self._config, self.folder.parent
        if config.ca is None:
            raise UsageError("the broker is used without TLS: every program on this machine can read it already")
        self.folder.mkdir(parents=True, exist_ok=True)
        authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
        bridge = authority.issue_client(BRIDGE, config.fleet.name)
        owner = home.stat()
        document = json.dumps(broker_access.build_viewers_document(config.fleet.name), indent=1).encode()
        port = config.broker.port
        text = _CONFIG.format(
            fleet=config.fleet.name,
            folder=self.folder,
            home=home,
            plugin=broker_config.find_plugin(),
            access=ACCESS_FILE,
            crl=broker_config.crl_setting(home),
            certificate_port=port + 1,
            password_port=port + 2,
            host=config.broker.host,
            port=port,
            bridge=BRIDGE,
            secret=secrets.token_hex(16),
            tree=broker_access.fleet_tree(config.fleet.name),
        )
        files = {"bridge.crt": bridge.certificate, "bridge.key": bridge.key, ACCESS_FILE: document}
        # Last: a folder with the config is complete.
        for name, data in (files | {self.conf.name: text.encode()}).items():
            durable_files.write(self.folder / name, data, 0o600)
            if owner.st_uid != os.geteuid():
                os.chown(self.folder / name, owner.st_uid, owner.st_gid)
        if owner.st_uid != os.geteuid():
            os.chown(self.folder, owner.st_uid, owner.st_gid)
        access = broker_control.apply(self._fleet_folder, config, AccessChange(BRIDGE, "viewer"))
        start = f"Start the viewers' broker: mosquitto -c {self.conf}"
        return [*access.steps, f"{start}; it listens on ports {port + 1} and {port + 2}, which {self.conf.name} names."]

    @property
    def ports(self) -> tuple[int, int]:
        """Ports for certificates and for passwords, as its config names them. Raises UsageError."""
        lines = [line.split() for line in input_files.read_text(self.conf).splitlines()]
        ports = [int(words[1]) for words in lines if len(words) > 1 and words[0] == "listener" and words[1].isdigit()]
        if len(ports) != 2:
            problem = f"has {len(ports)} listeners; it needs one for certificates, then one for passwords"
            raise UsageError(f"{self.conf}: {problem}")
        return ports[0], ports[1]

    def has(self, user: str) -> bool:
        """Return True if a viewer is let in here, or may be: the plugin can have left its file unreadable."""
        try:
            if not self.exists:
                return False
            document = json.loads(input_files.read_bytes(self.folder / ACCESS_FILE))
        except (OSError, ValueError):
            return True
        return broker_access.find_client(document, user) is not None

    def admit(self, user: str, password: str | None = None) -> list[str]:
        """Let a viewer in, with a new password if one is given, and return the steps left to the operator."""
        roles = [{"rolename": "viewer"}]
        secret = {} if password is None else {"password": password}
        client: dict[str, Any] = {"username": user, "roles": roles, **secret}
        commands: list[dict[str, Any]] = [
            {"command": "createClient", **client},
            {"command": "modifyClient", **client},
            {"command": "enableClient", "username": user},
        ]
        stored = {"username": user, "roles": roles, **({} if password is None else hash_password(password))}
        return self._change(user, commands, stored)

    def expel(self, user: str) -> list[str]:
        """Shut a viewer out: its password and its sessions end."""
        return self._change(user, [{"command": "deleteClient", "username": user}], None)

    def _change(self, user: str, commands: list[dict[str, Any]], stored: dict[str, Any] | None) -> list[str]:
        assert self._config.broker_admin is not None
        broker = self._config.broker_for(self._config.broker_admin)
        broker = msgspec.structs.replace(broker, url=f"mqtts://{broker.host}:{self.ports[0]}")
        query = {"command": "getClient", "username": user}
        steps = []
        try:
            responses = [broker_control.RESPONSE_TOPIC]
            with Link(broker, broker_access.ADMIN, subscribe=responses, timeout_s=_TIMEOUT_S) as link:
                reply = broker_control.find_reply(broker_control.request(link, [*commands, query]))
            if (reply is not None) != (stored is not None):
                raise LinkDown("it did not make the change")
        except LinkDown as problem:
            steps = [
                f"The viewers' broker did not confirm the change: {problem}. {self.folder / ACCESS_FILE} has it: "
                "restart the viewers' broker."
            ]
        # A broker that runs here has written the file, too, and may have left it unreadable. Of one elsewhere, this is
        # the copy to set it up again.
        with contextlib.suppress(*() if steps else (OSError, StorageError, ValueError)):
            self._edit_file(user, stored)
        return steps

    def _edit_file(self, user: str, stored: dict[str, Any] | None) -> None:
        path = self.folder / ACCESS_FILE
        document = json.loads(input_files.read_bytes(path))
        present = broker_access.find_client(document, user) or {}
        secret = {name: present[name] for name in _SECRETS if name in present}
        document["clients"] = [client for client in document["clients"] if client["username"] != user]
        document["clients"] += [] if stored is None else [secret | stored]
        broker_control.write_access_file(path, document)


def hash_password(password: str) -> dict[str, Any]:
    """Return the members of a client in the plugin's file: PBKDF2 with SHA-512 (RFC 8018)."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _HASH_ITERATIONS)
    encoded = {"password": base64.b64encode(digest).decode(), "salt": base64.b64encode(salt).decode()}
    return {**encoded, "iterations": _HASH_ITERATIONS}

"""Mosquitto 2 config, as `fleet init` writes it, with a reason for each line."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from outstation.protocol.transport.broker_config import BrokerConfig

_PLUGIN = "mosquitto_dynamic_security.so"

_COMMON = """\
# Mosquitto 2 for the fleet {fleet}. Start with: mosquitto -c {folder}/mosquitto.conf
# The user that runs the broker must own this folder: chown -R mosquitto: {folder}

# Retained messages and queued acknowledgements survive a restart. Devices do not rely on it:
# they keep a message until the collector acknowledges it.
persistence true
persistence_location {folder}/data/
autosave_interval 60
# For `fleet devices revoke`, which lets a broker on its own machine read the revocation list.
pid_file {folder}/mosquitto.pid

# Send small replies at once; without it a publisher that waits for each PUBACK stalls 40 ms.
set_tcp_nodelay true
# Messages in flight to one client: the collector commits that many at once.
max_inflight_messages 500
# Queue limits while the collector is away. Devices keep the rest, and send it again.
max_queued_messages 100000
max_queued_bytes 268435456
# Size of one message; the devices' own limit is 120 kB.
max_packet_size 1048576
# Drop sessions of clients that do not return.
persistent_client_expiration 14d
log_dest stderr
log_type error
log_type warning
log_type notice
"""

_TLS = """
# Who may subscribe, publish and receive: a list of clients and roles, which `fleet enrol`, `revoke` and `collector`
# change while the broker runs. An `acl_file` would not check subscriptions: any device could join the collectors'
# shared subscription, and take messages from them.
plugin {plugin}
plugin_opt_config_file {folder}/dynamic-security.json

listener {port}
cafile {folder}/ca.pem
certfile {folder}/server.crt
keyfile {folder}/server.key
# Revoked certificates, from `fleet devices revoke` and `fleet enrol --replace`. Mosquitto reads the list at its start
# and on SIGHUP, which they send it and which ends no open connection; if the file is unreadable then, Mosquitto accepts
# every certificate.
{crl}
tls_version tlsv1.2
# Only clients with a certificate of this fleet connect ...
require_certificate true
allow_anonymous false
# ... under the name in its CN, which the access rules use ...
use_identity_as_username true
# ... and as their client id: otherwise a device could disconnect another one by taking its id.
# Cost: one connection per certificate. A second `fleet devices watch` with the operator's certificate ends the first;
# commands use their own certificate, `commander`, and wait for each other.
use_username_as_clientid true
"""

_PLAIN = """
# No TLS and no user names: for one machine only. Any program on it can publish; signatures still prove the sender.
listener {port} {host}
allow_anonymous true
"""


def render_config(broker: BrokerConfig, fleet: str, folder: Path) -> str:
    """Return the text of mosquitto.conf; `folder` is its folder on the broker's machine."""
    listener = _TLS if broker.tls else _PLAIN
    values = {"fleet": fleet, "folder": folder, "port": broker.port, "host": broker.host}
    values["plugin"] = find_plugin()
    return (_COMMON + listener).format(**values, crl=crl_setting(folder))


def find_plugin() -> Path:
    """Return the path of Mosquitto's dynamic-security plugin; where this machine's system has it if it is missing."""
    multiarch = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "")
    folders = [multiarch, *map(Path, ("/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/homebrew/lib"))]
    return next((path for folder in folders if (path := folder / _PLUGIN).exists()), multiarch / _PLUGIN)


def crl_setting(folder: Path) -> str:
    return f"crlfile {folder}/crl.pem"

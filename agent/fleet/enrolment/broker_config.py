"""Mosquitto 2 config and access list, as `fleet init` writes them, with a reason for each line."""

from __future__ import annotations

from pathlib import Path

from agent.config import BrokerConfig
from agent.wire.topics import KINDS, ROOT

_COMMON = """\
# Mosquitto 2 for the fleet {fleet}. Start with: mosquitto -c {folder}/mosquitto.conf
# The user that runs the broker must own this folder: chown -R mosquitto: {folder}

# Retained messages and queued acknowledgements survive a restart. Devices do not rely on it:
# they keep a message until the collector acknowledges it.
persistence true
persistence_location {folder}/data/
autosave_interval 60

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
listener {port}
cafile {folder}/ca.pem
certfile {folder}/server.crt
keyfile {folder}/server.key
# Revoked certificates, from `fleet revoke` and `fleet enrol --replace`. Mosquitto reads the list at its start and on
# SIGHUP, which ends no open connection; if the file is unreadable then, Mosquitto accepts every certificate.
{crl}
tls_version tlsv1.2
# Only clients with a certificate of this fleet connect ...
require_certificate true
allow_anonymous false
# ... under the name in its CN, which the access list uses as %u ...
use_identity_as_username true
# ... and as their client id: otherwise a device could disconnect another one by taking its id.
# Cost: one connection per certificate. A second `fleet watch` with the operator's certificate ends the first;
# commands use their own certificate, `commander`, and wait for each other.
use_username_as_clientid true
acl_file {folder}/acl
"""

_PLAIN = """
# No TLS and no user names: for one machine only. Any program on it can publish; signatures still prove the sender.
listener {port} {host}
allow_anonymous true
"""

_ACL_HEAD = """\
# %u is the name in the client's certificate: a device id, or a role. A client may subscribe to `#` and to topics
# of others, but the broker delivers nothing from them.
"""


def render_config(broker: BrokerConfig, fleet: str, folder: Path) -> str:
    """Return the text of mosquitto.conf; `folder` is its folder on the broker's machine."""
    listener = _TLS if broker.tls else _PLAIN
    values = {"fleet": fleet, "folder": folder, "port": broker.port, "host": broker.host}
    return (_COMMON + listener).format(**values, crl=crl_setting(folder))


def collector_acl(fleet: str, name: str) -> list[str]:
    base = f"{ROOT}/{fleet}"
    return [f"user {name}", f"topic read {base}/#", f"topic write {base}/+/ack"]


def crl_setting(folder: Path) -> str:
    return f"crlfile {folder}/crl.pem"


def has_crl_setting(conf: str) -> bool:
    return any(line.split()[:1] == ["crlfile"] for line in conf.splitlines())


def render_acl(fleet: str) -> str:
    """Return the text of the ACL file: devices by pattern, then the roles."""
    base = f"{ROOT}/{fleet}"
    subtree = {kind: f"{base}/%u/{kind.name}" + ("/+" if kind.per_task else "") for kind in KINDS.values()}
    lines = [f"pattern write {topic}" for kind, topic in subtree.items() if not kind.to_device]
    lines += [f"pattern read {topic}" for kind, topic in subtree.items() if kind.to_device]
    lines += ["# Trust document, and desired state of the fleet and of groups. Mosquitto warns that no %u is in them."]
    lines += [f"pattern read {base}/{topic}" for topic in ("_all/trust", "_all/desired", "_group/desired/+")]
    lines += ["", *collector_acl(fleet, "collector")]
    for role in ("operator", "commander"):
        lines += ["", f"user {role}", f"topic read {base}/#"]
        written = ("_all/trust", "+/cmd", "+/desired", "_group/desired/+")
        lines += [f"topic write {base}/{topic}" for topic in written]
    return _ACL_HEAD + "\n".join(lines) + "\n"

"""Config and access list for Mosquitto 2, written by `fleet init` with a reason beside each line."""

from __future__ import annotations

from pathlib import Path

from agent.config import BrokerConfig
from agent.wire.topics import KINDS, ROOT

_COMMON = """\
# Mosquitto 2 for the fleet {fleet}. Start with: mosquitto -c {folder}/mosquitto.conf
# The user that runs the broker must own this folder: chown -R mosquitto: {folder}

# Retained messages and waiting acknowledgements survive a restart. Devices do not rely on it:
# they keep a message until the collector itself says that it is stored.
persistence true
persistence_location {folder}/data/
autosave_interval 60

# Small answers leave at once; without it a publisher that waits for each PUBACK stalls 40 ms.
set_tcp_nodelay true
# How many messages may be under way to one client: the collector commits that many at once.
max_inflight_messages 500
# While the collector is away. More stays on the devices, which send it again.
max_queued_messages 100000
max_queued_bytes 268435456
# One message; the devices' own limit is 120 kB.
max_packet_size 1048576
# Sessions of clients that never come back.
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
# Certificates that connect no more: `fleet revoke` and `fleet enrol --replace` put them there. Read at the start and on
# SIGHUP, which ends no connection that is open; where it cannot be read then, everybody is let in.
{crl}
tls_version tlsv1.2
# Only clients with a certificate of this fleet connect ...
require_certificate true
allow_anonymous false
# ... under the name in its CN, which the access list uses as %u ...
use_identity_as_username true
# ... and as their client id: else one device could throw another off by taking its id.
# Price: one connection per certificate. A second `fleet watch` with the operator's ends the first; commands
# have a certificate of their own, `commander`, and wait for each other.
use_username_as_clientid true
acl_file {folder}/acl
"""

_PLAIN = """
# No TLS, no names: for one machine only. Any program on it can publish; signatures still tell what is genuine.
listener {port} {host}
allow_anonymous true
"""

_ACL_HEAD = """\
# %u is the name in the client's certificate: a device id, or a role. `#` and others' topics can be
# subscribed to, but nothing is delivered from them.
"""


def render_config(broker: BrokerConfig, fleet: str, folder: Path) -> str:
    """The text of mosquitto.conf; `folder` is where it and its files are on the broker's machine."""
    listener = _TLS if broker.tls else _PLAIN
    values = {"fleet": fleet, "folder": folder, "port": broker.port, "host": broker.host}
    return (_COMMON + listener).format(**values, crl=crl_setting(folder))


def collector_acl(fleet: str, name: str) -> list[str]:
    """The lines of the ACL file for one that collects."""
    base = f"{ROOT}/{fleet}"
    return [f"user {name}", f"topic read {base}/#", f"topic write {base}/+/ack"]


def crl_setting(folder: Path) -> str:
    """The line that names the list of revoked certificates."""
    return f"crlfile {folder}/crl.pem"


def has_crl_setting(conf: str) -> bool:
    """Whether a config has such a line."""
    return any(line.split()[:1] == ["crlfile"] for line in conf.splitlines())


def render_acl(fleet: str) -> str:
    """The text of the ACL file: devices by pattern, then the roles."""
    base = f"{ROOT}/{fleet}"
    subtree = {kind: f"{base}/%u/{kind.name}" + ("/+" if kind.per_task else "") for kind in KINDS.values()}
    lines = [f"pattern write {topic}" for kind, topic in subtree.items() if not kind.to_device]
    lines += [f"pattern read {topic}" for kind, topic in subtree.items() if kind.to_device]
    lines += ["# For all devices, and for groups of them. Mosquitto warns that there is no %u; none is needed.",
              f"pattern read {base}/_all/desired", f"pattern read {base}/_group/desired/+"]  # fmt: skip
    lines += ["", *collector_acl(fleet, "collector")]
    for role in ("operator", "commander"):
        lines += ["", f"user {role}", f"topic read {base}/#"]
        lines += [f"topic write {base}/+/cmd", f"topic write {base}/+/desired", f"topic write {base}/_group/desired/+"]
    return _ACL_HEAD + "\n".join(lines) + "\n"

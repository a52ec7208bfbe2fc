"""Command `outstation init`: write a device's config and key."""

from __future__ import annotations

import gzip
import io
import json
import re
import socket
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent import config, durable_files, input_files
from agent.bootstrap.device import KEY_FILE, TLS_KEY_FILE
from agent.cli.output import echo, emit, json_option
from agent.errors import UsageError
from agent.names import is_name
from agent.quantities import parse_duration
from agent.wire import keys

if TYPE_CHECKING:
    from agent.cli.proposal.stream import ProposedStream

_TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
_MEMBERS = {
    "outstation.toml": 0o640,
    "ca.pem": 0o644,
    "device.crt": 0o644,
    TLS_KEY_FILE: 0o600,
    KEY_FILE: 0o600,
    "root.json": 0o644,
}
_MAX_MEMBER_BYTES = 1 << 20

TEMPLATE = """\
# Outstation, one device. Sizes and durations carry their unit: "512 MiB", "10 s", "72 h".

[device]
id = "{device}"              # a-z 0-9 - _ . , 1-64 characters; a level of every topic
fleet = "{fleet}"
data_dir = "{data_dir}"
# groups = ["roof"]                   # this device takes part in rollouts for these groups

[broker]
url = "mqtt://127.0.0.1:1883"  # mqtts:// anywhere but on this machine
# ca_file = "ca.pem"
# cert_file = "device.crt"
# tls_key_file = "device-tls.key"
max_message_bytes = 120_000    # AWS IoT Core's limit less a margin

[collector]
key = "{collector}"            # from `outstation fleet init`: the key that signs acknowledgements
delivery = "collector"         # or "broker": delete when the broker confirms; a power cut there loses messages

[operators]
keys = []                      # public keys that sign commands, and bundles

[buffer]
max_size = "1 GiB"
commit_every = "1 s"           # longest wait of a producer; each commit writes about 28 KB to flash
keep_readings = "24 h"         # after use; sooner when space is short
keep_messages = "48 h"         # after delivery, in case the collector is restored from a backup; sooner likewise
when_full = "evict"            # the least important data goes, and that is declared; or "refuse": intake rejects rows

# A stream holds the readings of one sensor or file. type: f32 (default), f64, i64, category. optional: may be missing.
[streams.host]
fields = [
  {{ name = "load1", min = 0 }},
  {{ name = "memory", unit = "%", min = 0, max = 100 }},
  {{ name = "disk", unit = "%", min = 0, max = 100 }},
]
source = {{ kind = "host", poll_interval = "10 s" }}  # socket | files | host | replay

# A task runs a bundle over a stream.
# [tasks.exercise]
# stream = "watch"
# bundle = "exercise"          # name in the bundle store, or a path
# schedule = "every 60 s"      # "every ...", a cron expression, or "when 500 rows"
# deadline = "2 s"             # longest time of a batch; after a late one the next are smaller
# publish = "all"              # all | changes | summary, or {{ below_score = 0.6 }}
#
# [[tasks.exercise.alerts]]    # an alert on what the model says; `outstation check` explains it
# name = "fall"
# label = "falling"            # or labels, score, value, anomaly, unchanged
# for = "3 of 5"               # or a duration: "10 min"
# severity = "critical"        # info | warning | critical
# summary = "{{device}}: {{label}} at {{time}}"
"""


@click.command(epilog="Example: outstation init /etc/outstation --from pi-07.tar.gz")
@click.argument("folder", default=".", metavar="[DIR]", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    help="Enrolment file that `fleet enrol` made; or a table or mqtt://HOST, from which a stream is proposed.",
)
@click.option("--topic", help="With --from mqtt://HOST: topic filter of the messages.")
@click.option("--listen", default="30 s", show_default=True, help="With --topic: how long to listen.")
@click.option("--id", "device", help="Device id; the default is the host name.")
@click.option("--data-dir", help="Folder of the store; the default is DIR/data, or that of the enrolment file.")
@json_option
def init(
    folder: Path,
    source: str | None,
    topic: str | None,
    listen: str,
    device: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Write a commented outstation.toml and a device key to DIR.

    From a table, or messages of a broker, a stream is proposed: its fields, with units and ranges to check.
    """
    file = folder / "outstation.toml"
    if file.exists():
        raise UsageError(f"{file}: exists already; edit it, or move it away first")
    proposed = _propose(source, topic, listen)
    enrolment = Path(source) if source is not None and proposed is None else None
    if enrolment is not None:
        members = _read_enrolment(enrolment)
        _check_keys(enrolment, folder, members)
    else:
        text = _fill_template(device) + (f"\n{proposed.toml}" if proposed is not None else "")
        members = {file.name: text.encode()}
    if data_dir is not None:
        # A JSON string is also a TOML string.
        line = f"data_dir = {json.dumps(data_dir)}".encode()
        members[file.name] = re.sub(rb"(?m)^data_dir *=.*$", lambda _: line, members[file.name], count=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in members.items():
            durable_files.write_new(folder / name, content, _MEMBERS[name])
    except FileExistsError as error:
        raise UsageError(f"{error.filename}: exists already; move it away first") from None
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    conf = config.load(file)
    path = folder / KEY_FILE
    key = keys.load_private(path) if path.exists() else keys.generate(path)
    document = {"file": str(file), "device": conf.device.id, "key": key.public.text, "thumbprint": key.public.kid}
    notes: list[str] = []
    if proposed is not None:
        notes = [f"Proposed stream {proposed.name}: check its units and ranges.", *proposed.notes]
    shown = document | ({"notes": notes} if notes else {})
    emit(shown, as_json, lambda: _print(document, notes, enrolled=enrolment is not None))


def _fill_template(device: str | None) -> str:
    name = device or re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())[:64].strip("-") or "device-1"
    if not is_name(name):
        raise UsageError(f"--id {name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    return TEMPLATE.format(device=name, fleet="home", data_dir="data", collector="")


def _propose(source: str | None, topic: str | None, listen: str) -> ProposedStream | None:
    """Return the stream that a table or a broker's messages propose; None for another source. Raises UsageError."""
    is_broker = source is not None and "://" in source
    if (topic is not None) != is_broker:
        raise UsageError("--topic and --from mqtt://HOST belong together, such as --topic zigbee2mqtt/+")
    if source is None or (not is_broker and Path(source).suffix.lower() not in _TABLE_SUFFIXES):
        return None
    # Libraries of tables and of the broker, which the other ways do not need.
    from agent.cli.proposal import stream

    if not is_broker:
        return stream.propose_from_file(Path(source))
    try:
        seconds = float(parse_duration(listen))
    except ValueError as problem:
        raise UsageError(f"--listen {listen!r}: {problem}") from None
    return stream.propose_from_broker(source, topic or "", seconds)


def _print(document: dict[str, str], notes: Sequence[str], *, enrolled: bool) -> None:
    echo(f"{document['file']} written")
    echo(f"device      {document['device']}")
    echo(f"key         {document['key']}")
    echo(f"thumbprint  {document['thumbprint']}")
    for note in notes:
        echo(note)
    if enrolled:
        echo(f"Next: outstation check -c {document['file']}")
    else:
        echo(f"Next: outstation fleet enrol {document['device']} --key {document['key']}  (on the collector)")


def _check_keys(enrolment: Path, folder: Path, members: dict[str, bytes]) -> None:
    """Check that the keys that `outstation join` made in `folder` are those that `members` were issued for."""
    if KEY_FILE not in members and not (folder / KEY_FILE).exists():
        hint = "name the folder in which `outstation join` or `outstation init` made it"
        raise UsageError(f"{enrolment}: has no {KEY_FILE}, and {folder} has none either; {hint}")
    tls_key = folder / TLS_KEY_FILE
    if "device.crt" not in members or TLS_KEY_FILE in members:
        return
    from cryptography import x509

    try:
        certified = x509.load_pem_x509_certificate(members["device.crt"]).public_key()
    except ValueError as error:
        raise UsageError(
            f"{enrolment}: device.crt cannot be read as a certificate: {error}; ask for it again"
        ) from None
    if certified != keys.load_private(tls_key).private.public_key():
        raise UsageError(f"{enrolment}: answers another request than that of the keys in {folder}; ask for it again")


def _read_enrolment(enrolment: Path) -> dict[str, bytes]:
    """Return the members of an enrolment file by name. Raises UsageError, also for unknown members."""
    members = {}
    try:
        # To its end first: only there does gzip check that the file is complete.
        with input_files.open_regular(enrolment) as packed, gzip.open(packed) as file:
            content = file.read(_MAX_MEMBER_BYTES * len(_MEMBERS))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                inside = archive.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER_BYTES else None
                if member.name not in _MEMBERS or inside is None:
                    raise UsageError(f"{enrolment}: {member.name!r} does not belong in an enrolment file")
                members[member.name] = inside.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"{enrolment}: not readable as an enrolment file: {error}") from None
    if "outstation.toml" not in members:
        raise UsageError(f"{enrolment}: no outstation.toml in it; make it with `outstation fleet enrol --bundle-out`")
    return members

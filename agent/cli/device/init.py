"""`outstation init`: a device's config and key."""

from __future__ import annotations

import gzip
import io
import json
import re
import socket
import tarfile
import zlib
from pathlib import Path

import click

from agent import config, durable_files
from agent.bootstrap.device import KEY_FILE
from agent.cli.output import emit, json_option
from agent.errors import UsageError
from agent.names import is_name
from agent.wire import keys

_MEMBERS = {
    "outstation.toml": 0o640,
    "ca.pem": 0o644,
    "device.crt": 0o644,
    "device-tls.key": 0o600,
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
# groups = ["roof"]                   # a roll-out for a group is for this device, too

[broker]
url = "mqtt://127.0.0.1:1883"  # mqtts:// anywhere but on this machine
# ca_file = "ca.pem"
# cert_file = "device.crt"
# tls_key_file = "device-tls.key"
max_message_bytes = 120_000    # AWS IoT Core's limit less a margin

[collector]
key = "{collector}"            # from `outstation fleet init`: who may acknowledge
delivery = "collector"         # or "broker": delete on the broker's word, which a power cut there breaks

[operators]
keys = []                      # who may sign commands, and bundles

[buffer]
max_size = "1 GiB"
commit_every = "1 s"           # the longest a producer waits; each commit costs about 28 KB of flash writes
keep_readings = "24 h"         # after use; sooner when space is short
keep_messages = "48 h"         # after the collector has them, in case it is restored from a backup; sooner likewise
when_full = "evict"            # then the least important goes, declared; or "refuse": producers are turned away

# A stream is what one sensor or file gives. type: f32 (default), f64, i64, category. optional = true: may be missing.
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
# deadline = "2 s"             # how long a batch may take; after a late one the next are smaller
# publish = "all"              # all | changes | summary, or {{ below_score = 0.6 }}
"""


@click.command(epilog="Example: outstation init /etc/outstation --from pi-07.tar.gz")
@click.argument("folder", default=".", metavar="[DIR]", type=click.Path(path_type=Path))
@click.option(
    "--from", "enrolment", type=click.Path(path_type=Path), help="The file `fleet enrol` made for this device."
)
@click.option("--id", "device", help="Device id; default this machine's host name.")
@click.option("--data-dir", help="Where readings are kept; default DIR/data, or what the enrolment file says.")
@json_option
def init(folder: Path, enrolment: Path | None, device: str | None, data_dir: str | None, as_json: bool) -> None:
    """Write a commented outstation.toml and make the device key in DIR."""
    file = folder / "outstation.toml"
    if file.exists():
        raise UsageError(f"{file}: is there already; edit it, or move it away first")
    members = _read_enrolment(enrolment) if enrolment is not None else {file.name: _fill_template(device).encode()}
    if data_dir is not None:
        members[file.name] = _replace_data_dir(members[file.name].decode(), data_dir).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in members.items():
            durable_files.write_new(folder / name, content, _MEMBERS[name])
    except FileExistsError as error:
        raise UsageError(f"{error.filename}: is there already; move it away first") from None
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    conf = config.load(file)
    path = folder / KEY_FILE
    key = keys.load_private(path) if path.exists() else keys.generate(path)
    document = {"file": str(file), "device": conf.device.id, "key": key.public.text, "thumbprint": key.public.kid}
    emit(document, as_json, lambda: _print(document, enrolled=enrolment is not None))


def _fill_template(device: str | None) -> str:
    name = device or re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())[:64].strip("-") or "device-1"
    if not is_name(name):
        raise UsageError(f"--id {name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    return TEMPLATE.format(device=name, fleet="home", data_dir="data", collector="")


def _replace_data_dir(text: str, data_dir: str) -> str:
    # A JSON string is a TOML string.
    line = f"data_dir = {json.dumps(data_dir)}"
    return re.sub(r"^data_dir *=.*$", lambda _: line, text, count=1, flags=re.MULTILINE)


def _print(document: dict[str, str], *, enrolled: bool) -> None:
    click.echo(f"{document['file']} written")
    click.echo(f"device      {document['device']}")
    click.echo(f"key         {document['key']}")
    click.echo(f"thumbprint  {document['thumbprint']}")
    if enrolled:
        click.echo(f"Next: outstation check -c {document['file']}")
    else:
        click.echo(f"Next: outstation fleet enrol {document['device']} --key {document['key']}   (where the fleet is)")


def _read_enrolment(enrolment: Path) -> dict[str, bytes]:
    """The members of an enrolment file by name, known ones only. Raises UsageError."""
    members = {}
    try:
        # Read to its end first: only there does gzip say that all of it came.
        with gzip.open(enrolment) as file:
            content = file.read(_MAX_MEMBER_BYTES * len(_MEMBERS))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                inside = archive.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER_BYTES else None
                if member.name not in _MEMBERS or inside is None:
                    raise UsageError(f"{enrolment}: {member.name!r} does not belong into an enrolment file")
                members[member.name] = inside.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"{enrolment}: not readable as an enrolment file: {error}") from None
    if "outstation.toml" not in members:
        raise UsageError(f"{enrolment}: no outstation.toml in it; make it with `outstation fleet enrol --bundle-out`")
    return members

"""`outstation init`: a device's config and key."""

from __future__ import annotations

import re
import socket
import tarfile
from pathlib import Path

import click

from agent import config
from agent.cli.output import emit, json_option
from agent.cli.wiring import KEY_FILE
from agent.errors import UsageError
from agent.wire import keys

_MEMBERS = {"outstation.toml": 0o640, "ca.pem": 0o644, "device.crt": 0o644, "device-tls.key": 0o600, KEY_FILE: 0o600}
_LARGEST = 1 << 20

TEMPLATE = """\
# Outstation, one device. Sizes and durations carry their unit: "512 MiB", "10 s", "72 h".

[device]
id = "{device}"              # a-z 0-9 - _ . , 1-64 characters; a level of every topic
fleet = "{fleet}"
data_dir = "{data_dir}"

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

# A stream is what one sensor or file gives. type: f32 (default), f64, i64, category. optional = true: may be missing.
[streams.host]
fields = [
  {{ name = "load1", min = 0 }},
  {{ name = "memory", unit = "%", min = 0, max = 100 }},
  {{ name = "disk", unit = "%", min = 0, max = 100 }},
]
source = {{ kind = "host", every = "10 s" }}  # socket | files | host | replay

# A task runs a bundle over a stream.
# [tasks.exercise]
# stream = "watch"
# bundle = "exercise"          # name in the bundle store, or a path
# schedule = "every 60 s"      # "every ...", a cron expression, or "when 500 rows"
# publish = "all"              # all | changes | summary, or {{ below = 0.6 }}
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
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "outstation.toml"
    if file.exists():
        raise UsageError(f"{file}: is there already; edit it, or move it away first")
    if enrolment is not None:
        _unpack(enrolment, folder)
    else:
        name = device or re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower()).strip("-") or "device-1"
        text = TEMPLATE.format(device=name, fleet="home", data_dir=data_dir or "data", collector="")
        file.write_text(text, encoding="utf-8")
    conf = config.load(file)
    path = folder / KEY_FILE
    key = keys.load_private(path) if path.exists() else keys.generate(path)
    document = {"file": str(file), "device": conf.device.id, "key": key.public.text, "thumbprint": key.public.kid}
    emit(document, as_json, lambda: _print(document))


def _print(document: dict[str, str]) -> None:
    click.echo(f"{document['file']} written")
    click.echo(f"device      {document['device']}")
    click.echo(f"key         {document['key']}")
    click.echo(f"thumbprint  {document['thumbprint']}")
    click.echo(f"Next: outstation fleet enrol {document['device']} --key {document['key']}   (where the fleet is)")


def _unpack(enrolment: Path, folder: Path) -> None:
    """The members of an enrolment file, by their known names only. Raises UsageError."""
    try:
        with tarfile.open(enrolment, "r:gz") as archive:
            for member in archive:
                mode = _MEMBERS.get(member.name)
                content = archive.extractfile(member) if member.isreg() and member.size <= _LARGEST else None
                if mode is None or content is None:
                    raise UsageError(f"{enrolment}: {member.name!r} does not belong into an enrolment file")
                keys.write_new(folder / member.name, content.read(), mode)
    except FileExistsError as error:
        raise UsageError(f"{error.filename}: is there already; move it away first") from None
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UsageError(f"{enrolment}: not readable as an enrolment file: {error}") from None
    if not (folder / "outstation.toml").exists():
        raise UsageError(f"{enrolment}: no outstation.toml in it; make it with `outstation fleet enrol --bundle-out`")

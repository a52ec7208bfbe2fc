"""Command `outstation init`: write a device's config and key."""

from __future__ import annotations

import re
import shlex
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.device import config
from outstation.device.bootstrap import credentials
from outstation.device.bootstrap.device import KEY_FILE
from outstation.device.bootstrap.joining import CONFIG_FILE, DEVICE_FILES, check_config, set_data_dir
from outstation.foundation import durable_files
from outstation.foundation.cli.options import DURATION, PATH, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.errors import ConfigError, UsageError, explain
from outstation.foundation.names import is_name
from outstation.foundation.owner import give_files

if TYPE_CHECKING:
    from outstation.device.cli.proposal.stream import ProposedStream

_TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
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
key = ""                       # `outstation join` brings it: the key that signs acknowledgements
delivery = "collector"         # or "broker" without a fleet: `outstation init --standalone` says what that loses

[operators]
keys = []                      # public keys that sign commands, and bundles

[buffer]
max_size = "1 GiB"
commit_every = "1 s"           # longest wait of a producer; each commit writes 4 KB to flash, and more each minute
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
source = {{ kind = "host", poll_interval = "10 s" }}  # socket | mqtt | files | exec | host | replay

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


# With a stream and a task, 12 lines that are not empty.
STANDALONE_TEMPLATE = """\
[device]
id = "{device}"
fleet = "{fleet}"
data_dir = "{data_dir}"

# Without a fleet. `outstation model config BUNDLE` prints a stream and a task to add here.
[collector]
delivery = "broker"  # done when the broker confirms: what the broker loses then is lost
"""
_LOSSES = """\
Without a fleet the broker confirms delivery. What it loses afterwards is lost, and nobody notices: no collector checks
signatures, finds gaps or keeps results. There are no remote commands and no updates of models from a fleet.
`outstation join` moves this device and its data into a fleet later."""
_BROKER_SECTION = """
[broker]
url = "{broker}"
"""
DEFAULT_BROKER, _FLEET = "mqtt://127.0.0.1:1883", "home"


@click.command(epilog="Example: outstation init /etc/outstation --standalone")
@click.argument("folder", default=".", metavar="[DIR]", type=PATH)
@click.option("--standalone", is_flag=True, help="A short config for one device without a fleet.")
@click.option("--broker", metavar="URL", help=f"With --standalone: the broker; default {DEFAULT_BROKER}.")
@click.option("--from", "source", metavar="SOURCE", help="Propose a stream from this table, or from mqtt://HOST.")
@click.option("--topic", metavar="FILTER", help="With --from mqtt://HOST: topics of the messages.")
@click.option(
    "--listen", "listen_s", type=DURATION, default="30 s", show_default=True, help="With --topic: how long to listen."
)
@click.option("--id", "device", help="Device id; the default is the host name.")
@click.option("--data-dir", help="Folder of the store; the default is DIR/data.")
@json_option
def init(
    folder: Path,
    standalone: bool,
    broker: str | None,
    source: str | None,
    topic: str | None,
    listen_s: float,
    device: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Write an outstation.toml and a device key to DIR: commented, or short with --standalone.

    With --standalone, the broker confirms delivery, and the command lists the drawbacks. With --from, the config has a
    proposed stream: its fields, with units and ranges to check.
    """
    file = folder / CONFIG_FILE
    if broker is not None and not standalone:
        raise UsageError("--broker belongs to --standalone; a device of a fleet gets its broker by `outstation join`")
    if file.exists():
        raise UsageError(f"{file}: exists already; edit it, or move it away first")
    name = device or re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())[:64].strip("-") or "device-1"
    if not is_name(name):
        raise UsageError(f"--id {name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")
    if broker is not None:
        _check_broker(broker)
    proposed = _propose(source, topic, listen_s)
    template = STANDALONE_TEMPLATE if standalone else TEMPLATE
    text = _fill(template, name, _FLEET, "data" if data_dir is None else data_dir, broker or DEFAULT_BROKER)
    notes: list[str] = []
    if proposed is not None:
        text += f"\n{proposed.toml}"
        check_config(str(source), text)
        notes = [f"Proposed stream {proposed.name}: check its units and ranges.", *proposed.notes]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The config comes last: a killed call can be repeated.
        key = credentials.load_or_generate(folder / KEY_FILE)
        durable_files.write_new(file, text.encode(), 0o640)
    except FileExistsError as error:
        raise UsageError(f"{error.filename}: exists already; move it away first, or name another folder") from None
    except OSError as error:
        raise UsageError(f"{error.filename}: {explain(error)}; name a folder that can be made") from None
    conf = config.load(file)
    give_files(folder, conf.data_dir, DEVICE_FILES)
    document: dict[str, Any] = {
        "file": str(file),
        "device": conf.device.id,
        "key": key.public.text,
        "thumbprint": key.public.kid,
    }
    document |= {"notes": notes} if notes else {}
    lines = [f"{file} written"]
    lines += [f"{label:<12}{document[label]}" for label in ("device", "key", "thumbprint")]
    lines += notes
    lines += _LOSSES.splitlines() if standalone else []
    request = f"outstation request {shlex.quote(str(folder))} --fleet FLEET --id {name}"
    lines.append(f"Next: outstation check -c {shlex.quote(str(file))}" if standalone else f"Next: {request}")
    emit(document, as_json, lambda: echo("\n".join(lines)))


def _propose(source: str | None, topic: str | None, listen_s: float) -> ProposedStream | None:
    """Return the stream that a table or a broker's messages propose; None without a source. Raises UsageError."""
    is_broker = source is not None and "://" in source
    if (topic is not None) != is_broker:
        raise UsageError("--topic and --from mqtt://HOST belong together, such as --topic zigbee2mqtt/+")
    if source is None:
        return None
    # Libraries of tables and of the broker, which the other ways do not need.
    from outstation.device.cli.proposal import stream

    if not is_broker:
        if Path(source).suffix.lower() not in _TABLE_SUFFIXES:
            raise UsageError(f"--from {source}: give a table ({', '.join(_TABLE_SUFFIXES)}) or mqtt://HOST")
        return stream.propose_from_file(Path(source))
    return stream.propose_from_broker(source, topic or "", listen_s)


def is_untouched(text: str) -> bool:
    """Return True if `text` is a config as this command writes it, for whatever device, folder and broker."""
    try:
        document = tomllib.loads(text)
        device, broker = document["device"], document.get("broker", {}).get("url", DEFAULT_BROKER)
        values = (device["id"], device["fleet"], device["data_dir"], broker)
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return any(text == _fill(template, *map(str, values)) for template in (TEMPLATE, STANDALONE_TEMPLATE))


def _fill(template: str, device: str, fleet: str, data_dir: str, broker: str) -> str:
    filled = template.format(device=device, fleet=fleet, data_dir="data")
    if template == STANDALONE_TEMPLATE and broker != DEFAULT_BROKER:
        filled += _BROKER_SECTION.format(broker=broker)
    return filled if data_dir == "data" else set_data_dir(filled, data_dir)


def _check_broker(url: str) -> None:
    try:
        config.check_broker("--broker", config.BrokerConfig(url=url))
    except ConfigError as error:
        raise UsageError(f"--broker: {error.problem}") from None

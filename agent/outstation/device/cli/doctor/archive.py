"""Support archive: diagnostics of a device, without its secrets, readings, labels and names of files.

Only what is listed here goes in: numbers that count, times, and texts of keys that hold neither secrets nor data.
"""

from __future__ import annotations

import io
import json
import platform
import sys
import tarfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from outstation import __version__
from outstation.device import status
from outstation.device.config import Config
from outstation.device.store.store import Store
from outstation.foundation import clock, durable_files
from outstation.foundation.errors import OutstationError, UsageError, explain

WITHHELD = "(withheld)"
_MAX_ALERTS = 50
# Keys whose texts say how the device is set up. All other texts are withheld, also of keys to come.
_CONFIG_TEXTS = frozenset(
    {
        *("kind", "name", "type", "unit", "schedule", "publish", "when_full", "duplicates", "delivery", "confinement"),
        *("id", "fleet", "stream", "format", "throttled", "seasonality", "on_deviation", "severity", "for", "field"),
        *("private", "allow", "hash", "messages", "class_field", "security"),
    }
)
# Statistics and sentences of these members come from readings.
_STATUS_MEMBERS = ("device", "fleet", "log", "clock", "outbox", "store", "condition", "throttle")
_STREAM_MEMBERS = ("stream", "rows", "kept_from", "duplicate_rows", "late_rows", "step_rows", "out_of_order_rows")
_PROGRAM_MEMBERS = ("source_restarts", "program_restarts", "program_silences", "program_floods", "program_losses")
_TASK_MEMBERS = ("task", "stream", "schedule", "row", "backlog", "windows", "bundle", "site_reference", "late_batches")
_ALERT_MEMBERS = ("task", "time", "alert", "subject", "state", "severity")
_LIBRARIES = ("numpy", "msgspec", "paho-mqtt", "ai-edge-litert", "tflite-runtime", "cryptography", "pyarrow", "psutil")


def write(
    path: Path, conf: Config, checks: Sequence[Mapping[str, Any]], wear: Mapping[str, Any], journal: Mapping[str, Any]
) -> list[str]:
    """Write the archive, readable by its owner only; return the names of its members. Raises UsageError."""
    members = {
        "machine.json": _describe_machine(),
        "checks.json": [{"name": check["name"], "state": check["state"]} for check in checks],
        "config.json": withhold_texts(msgspec.to_builtins(conf, enc_hook=float)),
        "flash.json": wear,
        "journal.json": journal,
        **_describe_store(conf),
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, document in members.items():
            content = json.dumps(document, indent=1, default=str).encode()
            info = tarfile.TarInfo(f"outstation-support/{name}")
            info.size, info.mtime, info.mode = len(content), clock.read().wall_us // 1_000_000, 0o600
            archive.addfile(info, io.BytesIO(content))
    try:
        durable_files.write(path, packed.getvalue(), 0o600)
    except OSError as error:
        raise UsageError(f"{path}: {explain(error)}; name a file that this user can write") from None
    return list(members)


def withhold_texts(value: Any, key: str = "") -> Any:
    """Return a config without texts that are not known to be harmless; numbers stay."""
    if isinstance(value, str):
        return value if key in _CONFIG_TEXTS else WITHHELD
    if isinstance(value, Mapping):
        return {name: withhold_texts(member, str(name)) for name, member in value.items()}
    if isinstance(value, Sequence):
        return [withhold_texts(member, key) for member in value]
    return value


def _describe_machine() -> dict[str, Any]:
    try:
        model = Path("/proc/device-tree/model").read_text(encoding="ascii", errors="replace").strip("\0\n ")
    except OSError:
        model = ""
    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "outstation": __version__,
        "python": sys.version.split()[0],
        "kernel": platform.release(),
        "processor": platform.machine(),
        "model": model,
        "libraries": libraries,
        "time": clock.now_rfc3339(),
    }


def _describe_store(conf: Config) -> dict[str, Any]:
    """Return status, counters and alerts without anything derived from readings; without a store, the problem."""
    try:
        with Store.open_read_only(conf.data_dir) as store:
            document = status.build_document(conf, store)
            counters, alerts = store.counters(), store.recent_alerts(_MAX_ALERTS)
    except OutstationError as problem:
        return {"store.json": {"problem": type(problem).__name__}}
    totals = {name: value for name, value in document.items() if isinstance(value, int)}
    streams = [
        {name: s[name] for name in (*_STREAM_MEMBERS, *_PROGRAM_MEMBERS) if name in s} for s in document["streams"]
    ]
    return {
        "status.json": {name: document[name] for name in _STATUS_MEMBERS}
        | totals
        | {
            "streams": streams,
            "tasks": [{name: task[name] for name in _TASK_MEMBERS if name in task} for task in document["tasks"]],
        },
        "counters.json": counters,
        "alerts.json": [{name: alert.get(name) for name in _ALERT_MEMBERS} for alert in alerts],
    }

"""Erasure of a device's data: the marker file that keeps a wiped device from starting, and the deletion of files.

Flash memory may keep deleted data: where that matters, encrypt or destroy the medium.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from outstation.device.bundles import history
from outstation.device.config import Config
from outstation.foundation import clock, durable_files, input_files
from outstation.foundation.errors import StorageError, UsageError

log = logging.getLogger("outstation")

MARKER = "wiped"
_PRESERVED = frozenset({MARKER, "lock", "bundles"})


def read_marker(data_dir: Path) -> dict[str, Any] | None:
    """Return the marker's members, or None if nothing was wiped. Raises StorageError if it cannot be read."""
    path = data_dir / MARKER
    try:
        return dict(json.loads(input_files.read_bytes(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}; the daemon cannot tell whether this device was wiped, and does nothing: "
            "check the disk and the folder's permissions"
        ) from error
    except (ValueError, TypeError):
        return {"state": "wiping"}


def describe_marker(data_dir: Path, marker: Mapping[str, Any]) -> str:
    left = [str(path) for path in marker.get("left", [])]
    still = f" These could not be deleted, do it by hand: {', '.join(left)}." if left else ""
    return (
        f"{data_dir}: this device was wiped by an operator at {marker.get('time', 'a time not known')}; it does not "
        f"start again.{still} To use it anew, enrol it with a new key (`outstation fleet enrol --replace`) and delete "
        f"{data_dir / MARKER}"
    )


def require_unwiped(data_dir: Path) -> None:
    """Raise UsageError if the device was wiped, or StorageError if that cannot be read."""
    marker = read_marker(data_dir)
    if marker is not None:
        raise UsageError(describe_marker(data_dir, marker))


def erase(data_dir: Path, preserved: Collection[Path], keys: Iterable[Path]) -> dict[str, Any]:
    """Delete the daemon's files in `data_dir`, and `keys`, but not `preserved`; return the marker's members.

    May be called again after a crash. Files that cannot be deleted are listed in the marker.
    """
    time = clock.now_rfc3339()
    _write_marker(data_dir, {"state": "wiping", "time": time})
    excluded = {path.resolve() for path in preserved}
    doomed = [path for path in data_dir.iterdir() if path.name not in _PRESERVED and path.name != MARKER + ".new"]
    doomed += [history.copies_folder(data_dir), data_dir / "bundles" / ".fetched", *keys]
    left = [str(path) for path in doomed if path.resolve() not in excluded and not _delete(path)]
    durable_files.fsync(data_dir)
    marker = {"state": "wiped", "time": time, "left": left}
    _write_marker(data_dir, marker)
    log.warning("%s", describe_marker(data_dir, marker))
    return marker


def installation_files(file: Path, conf: Config) -> list[Path]:
    """Return files of the installation, which must stay even if they lie in the data folder."""
    listed = [conf.broker.ca_file, conf.broker.cert_file, conf.broker.tls_key_file]
    if conf.updates is not None:
        listed += [conf.updates.ca_file, conf.updates.root]
    return [file, *(Path(path) for path in listed if path)]


def _delete(path: Path) -> bool:
    import shutil

    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s: cannot be deleted: %s", path, error.strerror)
        return False
    with contextlib.suppress(OSError):
        durable_files.fsync(path.parent)
    return True


def _write_marker(data_dir: Path, content: dict[str, Any]) -> None:
    durable_files.write(data_dir / MARKER, json.dumps(content).encode() + b"\n")

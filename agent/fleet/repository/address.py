"""Repository URL for devices: section [repository] of `fleet.toml`."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from urllib.parse import urlsplit

from agent import durable_files
from agent.errors import UsageError
from agent.fleet import config as fleet_config


def write(folder: Path, url: str) -> None:
    """Add section [repository]. Raises UsageError for an invalid URL or if a different one is set."""
    known = fleet_config.load(folder).repository
    path = folder / fleet_config.FILE
    if known is not None and known.url != url:
        raise UsageError(f"{path}: repository.url is {known.url!r} already; edit it in that file")
    if known is not None:
        return
    _check_url(url)
    added = f"\n[repository]\nurl = {json.dumps(url)}   # where devices find this folder's repository/\n"
    mode = stat.S_IMODE(path.stat().st_mode)
    durable_files.write(path, path.read_bytes().rstrip(b"\n") + b"\n" + added.encode(), mode)


def _check_url(url: str) -> None:
    if "://" not in url:
        if not Path(url).is_absolute():
            raise UsageError(f"--url {url}: neither https://HOST/PATH nor an absolute path of a folder on the devices")
        return
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username or parts.password:
        raise UsageError(f"--url {url}: not a URL of the form https://HOST[:PORT]/PATH without user, query or fragment")

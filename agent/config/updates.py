"""Section [updates]: the repository that bundles are fetched from, and what a fetch may cost."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from agent.errors import ConfigError
from agent.quantities import Duration, Size

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_TIME = r"([01]\d|2[0-3]):([0-5]\d)"
_WINDOW = re.compile(rf"{_TIME}-{_TIME}", re.ASCII)
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 60.0, 30 * 86_400.0
# Below that the least rate of `agent.device.rollout.fetch.transport` could not be told from a rate that was asked for.
_MIN_RATE = 1024
# What a bundle may be at most when unpacked (agent.model.bundle.bundle): no archive of use is larger.
_MAX_BUNDLE_BYTES = 256 << 20


class UpdatesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`url` is http(s):// or a folder. `root` is the first trusted root, given at enrolment. Rates are per second."""

    url: str
    ca_file: str | None = None
    root: str = "root.json"
    poll_interval: Duration = Duration(6 * 3600.0)
    window: str | None = None
    max_rate: Size | None = None
    max_size: Size = Size(64 << 20)
    allow_plaintext: bool = False

    @property
    def is_folder(self) -> bool:
        return "://" not in self.url

    @property
    def is_local(self) -> bool:
        """Whether no other device asks the same server."""
        return self.is_folder or urlsplit(self.url).hostname in _LOOPBACK

    @property
    def window_minutes(self) -> tuple[int, int] | None:
        """Beginning and end of the window in minutes of the device's local day; the end may be before the beginning."""
        found = _WINDOW.fullmatch(self.window or "")
        return found and (int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4]))


def check(file: str, updates: UpdatesConfig) -> None:
    """Raises ConfigError for what cannot work or would fetch in the clear."""
    if not updates.is_folder:
        _check_url(file, updates)
    elif not updates.url:
        raise ConfigError(file, "updates.url", "is empty; give https://HOST/PATH or a folder")
    if updates.window is not None and (
        updates.window_minutes is None or updates.window_minutes[0] == updates.window_minutes[1]
    ):
        raise ConfigError(
            file, "updates.window", f'{updates.window!r} is no time of day, as "01:00-05:00"; omit it for always'
        )
    if not _MIN_INTERVAL_S <= updates.poll_interval <= _MAX_INTERVAL_S:
        raise ConfigError(file, "updates.poll_interval", "must be between 60 s and 30 d")
    if updates.max_rate is not None and updates.max_rate < _MIN_RATE:
        raise ConfigError(file, "updates.max_rate", f"must be at least {_MIN_RATE} B; omit it for no limit")
    if not 0 < updates.max_size <= _MAX_BUNDLE_BYTES:
        raise ConfigError(file, "updates.max_size", f"must be above 0 and at most {_MAX_BUNDLE_BYTES >> 20} MiB")


def with_absolute_paths(updates: UpdatesConfig, base: Path) -> UpdatesConfig:
    """With paths that hold wherever the agent is started."""
    return msgspec.structs.replace(
        updates,
        url=str(base / updates.url) if updates.is_folder else updates.url.rstrip("/"),
        root=str(base / updates.root),
        ca_file=None if updates.ca_file is None else str(base / updates.ca_file),
    )


def _check_url(file: str, updates: UpdatesConfig) -> None:
    try:
        parts = urlsplit(updates.url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        usable = usable and not (parts.query or parts.fragment or parts.username or parts.password)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            file, "updates.url", f"{updates.url!r} is neither https://HOST[:PORT]/PATH, http://…, nor a folder"
        )
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not updates.allow_plaintext:
        raise ConfigError(
            file, "updates.url", f"{updates.url} would fetch in the clear; use https://, or set allow_plaintext = true"
        )

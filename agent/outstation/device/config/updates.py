"""Section [updates]: TUF repository of bundles, and limits of a download."""

from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from outstation.foundation.config.quantities import Duration, Size
from outstation.foundation.config.toml_files import Section
from outstation.foundation.day_window import DayWindow
from outstation.foundation.errors import ConfigError
from outstation.foundation.text import mask_password

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 60.0, 30 * 86_400.0
# A lower limit would look like a stalled server to `outstation.device.rollout.fetch.transport`.
_MIN_RATE = 1024
# Limit of an unpacked bundle (outstation.ml.model.bundle.bundle): no useful archive is larger.
_MAX_BUNDLE_BYTES = 256 << 20


class UpdatesConfig(Section, frozen=True):
    """Source of bundles, and limits of a download.

    ```toml
    [updates]
    url = "https://models.example.org/repository"
    window = "01:00-05:00"
    max_rate = "100 KiB"
    ```

    Without this section the device fetches no bundles. See [updates on the device](updates.md).
    """

    url: str
    """TUF repository: `https://…`, or a folder."""
    ca_file: str | None = None
    """CA that signed the server's certificate."""
    root: str = "root.json"
    """First trusted TUF root, given at enrolment."""
    poll_interval: Duration = Duration(6 * 3600.0)
    """Interval of checks for new metadata."""
    window: str | None = None
    """Time of day for downloads, local time: `"01:00-05:00"`."""
    max_rate: Size | None = None
    """Download rate limit per second, as `"100 KiB"`."""
    max_size: Size = Size(64 << 20)
    """Largest bundle archive."""
    allow_plaintext: bool = False
    """Allow `http://` to another machine: downloads are still verified, but others on the network can see them."""

    @property
    def is_folder(self) -> bool:
        return "://" not in self.url

    @property
    def is_local(self) -> bool:
        """True for a folder or a server on loopback, which no other device uses."""
        return self.is_folder or urlsplit(self.url).hostname in _LOOPBACK

    @property
    def day_window(self) -> DayWindow | None:
        """Download window. Raises ValueError."""
        return None if self.window is None else DayWindow.parse(self.window)


def check(file: str, updates: UpdatesConfig) -> None:
    """Check the section. Raises ConfigError, also for unencrypted remote downloads."""
    if not updates.is_folder:
        try:
            parts = urlsplit(updates.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
            usable = usable and not (parts.query or parts.fragment or parts.username or parts.password)
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(
                file,
                "updates.url",
                f"{mask_password(updates.url)!r} is neither https://HOST[:PORT]/PATH, http://…, nor a folder",
            )
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not updates.allow_plaintext:
            raise ConfigError(
                file, "updates.url", f"{updates.url} is not encrypted; use https://, or set allow_plaintext = true"
            )
    elif not updates.url:
        raise ConfigError(file, "updates.url", "is empty; set https://HOST/PATH or a folder")
    try:
        _ = updates.day_window
    except ValueError as problem:
        raise ConfigError(file, "updates.window", f"{problem}; omit it for no window") from None
    if not _MIN_INTERVAL_S <= updates.poll_interval <= _MAX_INTERVAL_S:
        raise ConfigError(file, "updates.poll_interval", "must be between 60 s and 30 d")
    if updates.max_rate is not None and updates.max_rate < _MIN_RATE:
        raise ConfigError(file, "updates.max_rate", f"must be at least {_MIN_RATE} B; omit it for no limit")
    if not 0 < updates.max_size <= _MAX_BUNDLE_BYTES:
        raise ConfigError(file, "updates.max_size", f"must be above 0 and at most {_MAX_BUNDLE_BYTES >> 20} MiB")


def with_absolute_paths(updates: UpdatesConfig, base: Path) -> UpdatesConfig:
    """Return the section with its paths resolved against `base`."""
    return msgspec.structs.replace(
        updates,
        url=str(base / updates.url) if updates.is_folder else updates.url.rstrip("/"),
        root=str(base / updates.root),
        ca_file=None if updates.ca_file is None else str(base / updates.ca_file),
    )

"""Names of fleets, devices, streams and tasks. Each is also a topic level and a file name."""

from __future__ import annotations

import re

from outstation.foundation.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def is_name(text: str) -> bool:
    """Return True if `text` is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit."""
    return _NAME.fullmatch(text) is not None


def check_name(file: str, key: str, name: str) -> None:
    """Check that `name` is valid as a topic level. Raises ConfigError."""
    if not is_name(name):
        raise ConfigError(file, key, f"{name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")

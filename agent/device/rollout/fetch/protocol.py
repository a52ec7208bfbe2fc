"""What the daemon asks the child that fetches, and what that answers: one JSON document each."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.device.rollout.fetch.compatibility import DeviceProfile
from agent.device.rollout.fetch.version_floors import VersionFloors

# Larger answers are not read.
MAX_RESPONSE_BYTES = 1 << 20
# In this time LEAST_BYTES must come, or a server is given up.
STALL_TIMEOUT_S, MIN_STALL_BYTES = 30.0, 4096


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the repository and, where `path` is given, the download of that target.

    `folder` keeps the metadata, `into` gets archives. `time_s`: epoch s, the latest that is known to have passed.
    `seconds` it may take in all; `max_rate` bytes a second. `parent` is the process it must not outlive.
    """

    url: str
    ca_file: str | None
    root_file: str
    metadata_dir: str
    download_dir: str
    parent_pid: int
    trusted_time_s: float
    floors: VersionFloors
    timeout_s: float
    max_size: int
    max_rate: int | None = None
    stall_timeout_s: float = STALL_TIMEOUT_S
    path: str | None = None
    digest: str = ""
    profile: DeviceProfile | None = None


class SignedTarget(msgspec.Struct, frozen=True):
    """What signed metadata say of an archive; `custom` is its member `outstation`."""

    path: str
    length: int
    sha256: str
    custom: dict[str, Any]


class FetchResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`error` is the name of what went wrong, "" where nothing did. `floors` hold in either case.

    `file` is the verified archive, once it is on the disk; `received` counts the bytes of it that came now.
    """

    error: str = ""
    detail: str = ""
    floors: VersionFloors
    target: SignedTarget | None = None
    file: str | None = None
    received: int = 0

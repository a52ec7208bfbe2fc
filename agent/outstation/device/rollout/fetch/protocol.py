"""Protocol between the daemon and the fetch worker: one JSON document each way."""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.device.rollout.fetch.compatibility import DeviceProfile
from outstation.device.rollout.fetch.version_floors import VersionFloors

# A larger response is not read.
MAX_RESPONSE_BYTES = 1 << 20
# A server that sends fewer bytes in this time is given up.
STALL_TIMEOUT_S, MIN_STALL_BYTES = 30.0, 4096


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A metadata refresh and, with `path`, the download of that target.

    `trusted_time_s` is the latest time known to have passed, epoch s. `timeout_s` bounds the whole request; `max_rate`
    is in bytes per second. The worker ends with the process `parent_pid`.
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
    """Signed metadata of an archive. `custom` is the member `outstation` of the target's custom metadata."""

    path: str
    length: int
    sha256: str
    custom: dict[str, Any]


class FetchResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a request. `error` is the name of an error, or "". `floors` are valid in either case.

    `file` is the verified archive once it is durable; `received` counts the bytes downloaded by this request.
    """

    error: str = ""
    detail: str = ""
    floors: VersionFloors
    target: SignedTarget | None = None
    file: str | None = None
    received: int = 0

"""The child that fetches: one request on stdin, one answer on stdout. It owns what a hostile repository can reach.

In this order, each only where those before it went well: the limits, the metadata, their floors, the metadata on the
disk, the fit, the download. Nothing here is taken for granted by the daemon until it has written the floors itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import resource
import shutil
import signal
import sys
from pathlib import Path

import msgspec

from agent.device.rollout.fetch import compatibility, transport
from agent.device.rollout.fetch import version_floors as floors
from agent.device.rollout.fetch.download import Download
from agent.device.rollout.fetch.protocol import FetchRequest, FetchResponse, SignedTarget
from agent.device.rollout.fetch.version_floors import VersionFloors
from agent.errors import FetchFailed

_MAX_ROOT_BYTES = 512_000
_MEMORY_BYTES = 192 << 20
_CPU_S = 300
# Metadata that are written on the way; python-tuf's largest are 2 MB.
_MIN_FILE_BYTES = 8 << 20
_PR_SET_PDEATHSIG = 1
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "armv7l": 314, "armv6l": 314, "i686": 289, "riscv64": 30}
_IOPRIO_IDLE = 3 << 13


def handle_request(request: FetchRequest) -> FetchResponse:
    """What the child does, but for its limits."""
    known, target, download = request.floors, None, None
    try:
        anchor = _read_root(Path(request.root_file))
        known = known.for_anchor(hashlib.sha256(anchor).hexdigest())
        with contextlib.closing(
            transport.open_transport(request.url, request.ca_file, _make_limiter(request))
        ) as repository:
            known, target, name = _refresh_metadata(request, anchor, known, repository)
            if target is None:
                return FetchResponse(floors=known)
            download = Download(repository, name, target, Path(request.download_dir))
            _check_target(request, target, download.missing_bytes)
            return FetchResponse(floors=known, target=target, file=str(download.run()), received=download.received)
    except _MetadataRejected as stopped:
        known, failure = stopped.floors, stopped.failure
    except FetchFailed as problem:
        failure = problem
    except OSError as error:
        failure = FetchFailed("OSError", f"{error.filename or request.metadata_dir}: {error.strerror}")
    received = download.received if download else 0
    return FetchResponse(error=failure.error, detail=failure.detail, floors=known, target=target, received=received)


class _MetadataRejected(Exception):
    """The metadata were refused; what holds of them all the same."""

    def __init__(self, failure: FetchFailed, floors: VersionFloors) -> None:
        super().__init__(failure)
        self.failure, self.floors = failure, floors


def _refresh_metadata(
    request: FetchRequest, anchor: bytes, known_floors: VersionFloors, repository: transport.Transport
) -> tuple[VersionFloors, SignedTarget | None, str]:
    """The metadata, verified, above their floors and on the disk. Raises FetchFailed, _Stopped, OSError."""
    from agent.device.rollout.fetch import tuf_client

    folder = Path(request.metadata_dir) / known_floors.anchor[:16]
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if not other.name.startswith(folder.name):
            shutil.rmtree(other, ignore_errors=True)
    with tuf_client.working_copy(folder) as work:
        look = tuf_client.TufClient(anchor, work, repository, request.trusted_time_s)
        try:
            look.refresh()
            known_floors = floors.raise_floors(known_floors, look.observed_floors(), look.expires_s())
            found = look.find_target(request.path) if request.path else (None, "")
            known_floors = floors.raise_floors(known_floors, look.observed_floors(), look.expires_s())
        except FetchFailed as failure:
            # Keys that were revoked stay so, whatever else is wrong. Raises FetchFailed below its floor.
            known_floors = floors.raise_floors(known_floors, look.root_floor(), None)
            if failure.error != floors.ROLLBACK_ERROR:
                tuf_client.commit_working_copy(folder)
            raise _MetadataRejected(failure, known_floors) from failure
        tuf_client.commit_working_copy(folder)
    return known_floors, *found


def _check_target(request: FetchRequest, target: SignedTarget, missing_bytes: int) -> None:
    """Raises FetchFailed for an archive that is not to be downloaded."""
    if target.length > request.max_size:
        raise FetchFailed(
            "TooLarge", f"{target.path} has {target.length} bytes, [updates] max_size allows {request.max_size}"
        )
    if request.digest and target.custom.get("digest") != request.digest:
        raise FetchFailed("Unfit", f"{target.path} is of another bundle than the one that is wanted ({request.digest})")
    if request.profile is not None and (
        why := compatibility.find_incompatibility(target.custom, target.length, missing_bytes, request.profile)
    ):
        raise FetchFailed("Unfit", f"{target.path}: {why}")


def _read_root(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_ROOT_BYTES)
    except OSError as error:
        raise FetchFailed(
            "NoRoot", f"[updates] root {path}: {error.strerror}; copy the repository's first root.json there"
        ) from error


def _make_limiter(request: FetchRequest) -> transport.TransferLimiter:
    return transport.TransferLimiter(request.timeout_s, request.max_rate, request.stall_timeout_s)


def _apply_limits(request: FetchRequest) -> None:
    """Die with the daemon, give way to it, and use no more than a fetch needs."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.parent_pid:
        raise SystemExit(1)
    with contextlib.suppress(OSError):
        os.nice(19)
    if (call := _IOPRIO_SET.get(platform.machine())) is not None:
        libc.syscall(call, 1, 0, _IOPRIO_IDLE)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + _MEMORY_BYTES,
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_FSIZE: max(_MIN_FILE_BYTES, request.max_size + 1),
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=FetchRequest)
    _apply_limits(request)
    sys.stdout.buffer.write(msgspec.json.encode(handle_request(request)))


if __name__ == "__main__":
    main()

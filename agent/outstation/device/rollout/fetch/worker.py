"""Fetch worker: a child process that reads one request on stdin and writes one response to stdout.

A hostile repository can reach this process only. Its steps, each only after the previous one succeeded: resource
limits, metadata, version floors, durable metadata, compatibility, download. The daemon trusts the response only after
it has stored the floors itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import shutil
import signal
import sys
from pathlib import Path

import msgspec

from outstation.device.rollout.fetch import compatibility, transport, version_floors
from outstation.device.rollout.fetch.download import Download
from outstation.device.rollout.fetch.protocol import FetchRequest, FetchResponse, SignedTarget
from outstation.device.rollout.fetch.version_floors import VersionFloors
from outstation.foundation import decoders, input_files
from outstation.foundation.errors import FetchFailed
from outstation.protocol.wire import root_metadata

_MAX_ROOT_BYTES = 512_000
_MEMORY_BYTES = 192 << 20
_CPU_S = 300
# Room for metadata files; python-tuf's largest are 2 MB.
_MIN_FILE_BYTES = 8 << 20
_PR_SET_PDEATHSIG = 1
# By processor and by the bits of this program: a 64-bit kernel names itself to 32-bit programs too.
_IOPRIO_SET = {
    ("x86_64", 64): 251,
    ("aarch64", 64): 30,
    ("aarch64", 32): 314,
    ("armv8l", 32): 314,
    ("armv7l", 32): 314,
    ("riscv64", 64): 30,
}
_IOPRIO_IDLE = 3 << 13


def handle_request(request: FetchRequest) -> FetchResponse:
    """Refresh the metadata and download the target, without setting resource limits."""
    floors, target, download = request.floors, None, None
    try:
        path = Path(request.root_file)
        try:
            with input_files.open_regular(path) as file:
                anchor = file.read(_MAX_ROOT_BYTES)
        except OSError as error:
            raise FetchFailed(
                "MissingRoot", f"[updates] root {path}: {error.strerror}; copy the repository's first root.json there"
            ) from error
        floors = floors.for_anchor(root_metadata.hash_anchor(anchor))
        limiter = transport.TransferLimiter(request.timeout_s, request.max_rate, request.stall_timeout_s)
        with contextlib.closing(transport.open_transport(request.url, request.ca_file, limiter)) as repository:
            floors, target, name = _refresh_metadata(request, anchor, floors, repository)
            if target is None:
                return FetchResponse(floors=floors)
            download = Download(repository, name, target, Path(request.download_dir))
            _check_target(request, target, download.missing_bytes)
            return FetchResponse(floors=floors, target=target, file=str(download.run()), received=download.received)
    except _MetadataRejected as rejected:
        floors, failure = rejected.floors, rejected.failure
    except FetchFailed as problem:
        failure = problem
    except OSError as error:
        failure = FetchFailed("OSError", f"{error.filename or request.metadata_dir}: {error.strerror}")
    received = download.received if download else 0
    return FetchResponse(error=failure.error, detail=failure.detail, floors=floors, target=target, received=received)


class _MetadataRejected(Exception):
    """The metadata were rejected; `floors` are valid all the same."""

    def __init__(self, failure: FetchFailed, floors: VersionFloors) -> None:
        super().__init__(failure)
        self.failure, self.floors = failure, floors


def _refresh_metadata(
    request: FetchRequest, anchor: bytes, floors: VersionFloors, repository: transport.Transport
) -> tuple[VersionFloors, SignedTarget | None, str]:
    """Verify the metadata, raise the floors and commit the metadata to disk; then find the requested target.

    Raises FetchFailed, _MetadataRejected, OSError.
    """
    from outstation.device.rollout.fetch import tuf_client

    folder = Path(request.metadata_dir) / root_metadata.repository_folder(floors.anchor)
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if not other.name.startswith(folder.name):
            shutil.rmtree(other, ignore_errors=True)
    with tuf_client.working_copy(folder) as work:
        client = tuf_client.TufClient(anchor, work, repository, request.trusted_time_s)
        try:
            client.refresh()
            floors = version_floors.raise_floors(floors, client.observed_floors(), client.expires_s())
            target, name = client.find_target(request.path) if request.path else (None, "")
            floors = version_floors.raise_floors(floors, client.observed_floors(), client.expires_s())
        except FetchFailed as failure:
            # Revoked keys stay revoked, whatever else is wrong. Raises FetchFailed for a root below its floor.
            floors = version_floors.raise_floors(floors, client.root_floor(), None)
            if failure.error != version_floors.ROLLBACK_ERROR:
                tuf_client.commit_working_copy(folder)
            raise _MetadataRejected(failure, floors) from failure
        tuf_client.commit_working_copy(folder)
    return floors, target, name


def _check_target(request: FetchRequest, target: SignedTarget, missing_bytes: int) -> None:
    """Raise FetchFailed for an archive that must not be downloaded."""
    if target.length > request.max_size:
        raise FetchFailed(
            "TooLarge", f"{target.path} has {target.length} bytes; [updates] max_size is {request.max_size}"
        )
    if request.digest and target.custom.get("digest") != request.digest:
        raise FetchFailed("Incompatible", f"{target.path} holds another bundle than the desired one ({request.digest})")
    if request.profile is not None and (
        problem := compatibility.find_incompatibility(target.custom, target.length, missing_bytes, request.profile)
    ):
        raise FetchFailed("Incompatible", f"{target.path}: {problem}")


def _apply_limits(request: FetchRequest) -> None:
    """End with the daemon, run at the lowest priority, and limit memory, CPU time, file size and descriptors."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.parent_pid:
        raise SystemExit(1)
    with contextlib.suppress(OSError):
        os.nice(19)
    bits = 64 if sys.maxsize > 2**32 else 32
    if (call := _IOPRIO_SET.get((platform.machine(), bits))) is not None:
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
    request = decoders.from_json(sys.stdin.buffer.read(), FetchRequest)
    _apply_limits(request)
    sys.stdout.buffer.write(msgspec.json.encode(handle_request(request)))


if __name__ == "__main__":
    main()

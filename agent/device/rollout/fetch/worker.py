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
from agent.device.rollout.fetch.protocol import Answer, Request, Target
from agent.device.rollout.fetch.version_floors import Floors
from agent.errors import FetchFailed

_MOST_ROOT = 512_000
_MEMORY = 192 << 20
_CPU_S = 300
# Metadata that are written on the way; python-tuf's largest are 2 MB.
_LEAST_FILE = 8 << 20
_PR_SET_PDEATHSIG = 1
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "armv7l": 314, "armv6l": 314, "i686": 289, "riscv64": 30}
_IDLE = 3 << 13


def run(request: Request) -> Answer:
    """What the child does, but for its limits."""
    known, target, download = request.floors, None, None
    try:
        anchor = _anchor(Path(request.root))
        known = known.of(hashlib.sha256(anchor).hexdigest())
        with contextlib.closing(transport.of(request.url, request.ca_file, _pace(request))) as repository:
            known, target, name = _look(request, anchor, known, repository)
            if target is None:
                return Answer(floors=known)
            download = Download(repository, name, target, Path(request.into))
            _check(request, target, download.missing)
            return Answer(floors=known, target=target, file=str(download.run()), received=download.received)
    except _Stopped as stopped:
        known, failure = stopped.floors, stopped.failure
    except FetchFailed as problem:
        failure = problem
    except OSError as error:
        failure = FetchFailed("OSError", f"{error.filename or request.folder}: {error.strerror}")
    received = download.received if download else 0
    return Answer(error=failure.error, detail=failure.detail, floors=known, target=target, received=received)


class _Stopped(Exception):
    """The metadata were refused; what holds of them all the same."""

    def __init__(self, failure: FetchFailed, floors: Floors) -> None:
        super().__init__(failure)
        self.failure, self.floors = failure, floors


def _look(
    request: Request, anchor: bytes, known: Floors, repository: transport.Source
) -> tuple[Floors, Target | None, str]:
    """The metadata, verified, above their floors and on the disk. Raises FetchFailed, _Stopped, OSError."""
    from agent.device.rollout.fetch import tuf_client

    folder = Path(request.folder) / known.anchor[:16]
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if not other.name.startswith(folder.name):
            shutil.rmtree(other, ignore_errors=True)
    with tuf_client.copied(folder) as work:
        look = tuf_client.Repository(anchor, work, repository, request.time_s)
        try:
            look.refresh()
            known = floors.raised(known, look.seen(), look.expires_s())
            found = look.find(request.path) if request.path else (None, "")
            known = floors.raised(known, look.seen(), look.expires_s())
        except FetchFailed as failure:
            # Keys that were revoked stay so, whatever else is wrong. Raises FetchFailed below its floor.
            known = floors.raised(known, look.root(), None)
            if failure.error != floors.BELOW:
                tuf_client.commit(folder)
            raise _Stopped(failure, known) from failure
        tuf_client.commit(folder)
    return known, *found


def _check(request: Request, target: Target, missing: int) -> None:
    """Raises FetchFailed for an archive that is not to be downloaded."""
    if target.length > request.max_size:
        raise FetchFailed(
            "TooLarge", f"{target.path} has {target.length} bytes, [updates] max_size allows {request.max_size}"
        )
    if request.digest and target.custom.get("digest") != request.digest:
        raise FetchFailed("Unfit", f"{target.path} is of another bundle than the one that is wanted ({request.digest})")
    if request.here is not None and (why := compatibility.why_not(target.custom, target.length, missing, request.here)):
        raise FetchFailed("Unfit", f"{target.path}: {why}")


def _anchor(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_ROOT)
    except OSError as error:
        raise FetchFailed(
            "NoRoot", f"[updates] root {path}: {error.strerror}; copy the repository's first root.json there"
        ) from error


def _pace(request: Request) -> transport.Pace:
    return transport.Pace(request.seconds, request.max_rate, request.patience_s)


def _limit(request: Request) -> None:
    """Die with the daemon, give way to it, and use no more than a fetch needs."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.parent:
        raise SystemExit(1)
    with contextlib.suppress(OSError):
        os.nice(19)
    if (call := _IOPRIO_SET.get(platform.machine())) is not None:
        libc.syscall(call, 1, 0, _IDLE)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + _MEMORY,
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_FSIZE: max(_LEAST_FILE, request.max_size + 1),
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    _limit(request)
    sys.stdout.buffer.write(msgspec.json.encode(run(request)))


if __name__ == "__main__":
    main()

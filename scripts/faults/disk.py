"""What can be done to a disk from outside: a card that forgets unsynced bytes, system calls that fail, flipped bits.

The card is an ext4 in a file, mounted as the device's data folder. A power cut is EXT4_IOC_SHUTDOWN: from then on
nothing reaches the medium, and what lay in the page cache only is gone at the next mount.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from agent.testing.process import wait_until
from scripts.faults.world import DEVICE, World

# _IOR('X', 125, __u32) of linux/fs/ext4/ext4.h.
_SHUTDOWN = 0x8004587D
_LEAVE_JOURNAL, _DROP_JOURNAL = 1, 2
_PATIENCE_S = 10.0
_BALLAST = "ballast"
_MOUNTS = Path("/proc/self/mountinfo")


class Card(msgspec.Struct, frozen=True):
    """The card of a world; `of` finds it again."""

    image: Path
    mount_point: Path

    @staticmethod
    def in_world(world: World) -> Card:
        return Card(world.folder / "card.ext4", world.device.data_dir)

    def make(self, mib: int) -> None:
        with self.image.open("wb") as file:
            file.truncate(mib << 20)
        # No blocks kept back for root, who is who fills it.
        _run("mkfs.ext4", "-qF", "-m", "0", "-e", "remount-ro", str(self.image))
        self.mount_point.mkdir(parents=True, exist_ok=True)
        self.mount()

    def mount(self) -> None:
        """As a machine that boots does: check, then mount."""
        # 1: errors were corrected.
        _run("fsck.ext4", "-p", str(self.image), good=(0, 1))
        # A loop device of its own each time: `-o loop` would take one that is still there.
        device = _run("losetup", "--find", "--show", str(self.image)).strip()
        try:
            # commit: ext4 writes nothing on its own initiative meanwhile, so that what nobody synced is really gone.
            _run("mount", "-o", "noatime,commit=300", device, str(self.mount_point))
        finally:
            # It goes when it is unmounted.
            _run("losetup", "--detach", device)

    def unmount(self) -> None:
        wait_until("the card can be unmounted", lambda: self._unmounted(), _PATIENCE_S)

    def cut(self, *, journal: bool) -> None:
        """The power goes, with ext4's journal written out just before (`journal`) or lost as well.

        End every writer first: a flush that is under way while this happens reports success and may do nothing.
        """
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _LEAVE_JOURNAL if journal else _DROP_JOURNAL))
        finally:
            os.close(descriptor)
        # A copy: where somebody's mount namespace holds the dead file system, it lives on, and writes when it ends.
        copy = self.image.with_suffix(".copy")
        _run("cp", "--sparse=always", str(self.image), str(copy))
        copy.rename(self.image)
        self.unmount()
        self.mount()

    def fail(self) -> None:
        """ext4 finds an error and makes itself read-only; a new mount heals it."""
        source = _run("findmnt", "-no", "SOURCE", str(self.mount_point)).strip()
        (Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error").write_text("1")

    def fill(self) -> None:
        """Take all room that is left."""
        with (self.mount_point / _BALLAST).open("ab") as file, contextlib.suppress(OSError):
            while room := self._room():
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room)

    def free(self) -> None:
        (self.mount_point / _BALLAST).unlink(missing_ok=True)

    def _room(self) -> int:
        usage = os.statvfs(self.mount_point)
        return usage.f_bavail * usage.f_frsize

    def _unmounted(self) -> bool:
        if self._mounted():
            subprocess.run(["umount", str(self.mount_point)], capture_output=True, check=False)
        return not self._mounted()

    def _mounted(self) -> bool:
        # os.path.ismount says no where a dead card answers with an error.
        return any(line.split()[4] == str(self.mount_point) for line in _MOUNTS.read_text().splitlines())


def on_card(mib: int = 64) -> Callable[[World], Callable[[], None]]:
    """For `Setting.prepare`: the device's data folder is a card of its own."""

    def prepare(world: World) -> Callable[[], None]:
        card = Card.in_world(world)
        card.make(mib)
        return card.unmount

    return prepare


def no_card() -> str | None:
    """Why there can be no card on this machine."""
    if os.geteuid() != 0:
        return "mounting an ext4 of its own needs root"
    lacking = [name for name in ("mkfs.ext4", "fsck.ext4", "mount", "findmnt", "losetup") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not found; install e2fsprogs and mount"
    return None if Path("/dev/loop-control").exists() else "this kernel has no loop devices"


def no_strace() -> str | None:
    """Why system calls cannot be made to fail on this machine."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    return None if os.geteuid() == 0 else "attaching strace to a running process needs root"


@contextlib.contextmanager
def tampered(world: World, calls: str, how: str, *, files: Sequence[Path] = ()) -> Iterator[None]:
    """While the block runs, the running daemon's system calls `calls` (on `files` only) fare as strace's `how` says."""
    pid = world.device.pid
    where = [word for file in files for word in ("-P", str(file))]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", *where, "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until("strace holds every thread", lambda: _traced(pid) or tracer.poll() is not None, _PATIENCE_S)
        yield
    finally:
        tracer.terminate()
        try:
            tracer.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.communicate()


def database_files(world: World) -> list[Path]:
    """What SQLite writes, there now or later."""
    return [world.device.data_dir / name for name in ("outstation.db", "outstation.db-wal")]


def stored_files(world: World) -> list[Path]:
    """Every file of the data folder that is written while the daemon runs."""
    files = {path for path in world.device.data_dir.iterdir() if path.is_file() and path.name not in ("lock", _BALLAST)}
    return sorted(files.union(database_files(world)))


def results(world: World) -> int:
    """How many results the collector has."""
    [(count,)] = world.fleet.query("SELECT count(*) FROM results WHERE device = ?", DEVICE)
    return int(count)


def flip_bit(file: Path, bit: int) -> None:
    """Turn bit number `bit` of the file."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ (1 << bit % 8)]))


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


@contextlib.contextmanager
def memory_cgroup(world: World) -> Iterator[Callable[[int], None]]:
    """The daemon in a cgroup of its own; what is yielded sets the most bytes it may take from now on."""
    group = cgroup_parent() / f"outstation-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(world.device.pid))
        yield lambda most: _limit(group, most)
    finally:
        with contextlib.suppress(OSError):
            (group / "memory.limit_in_bytes").write_text("-1")
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
        wait_until("the cgroup can go", lambda: _removed(group), _PATIENCE_S)


def cgroup_parent() -> Path:
    """This process's memory cgroup, version 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    return Path("/sys/fs/cgroup/memory")


def no_cgroup() -> str | None:
    if os.access(cgroup_parent() / "memory.limit_in_bytes", os.R_OK) and os.access(cgroup_parent(), os.W_OK):
        return None
    return "no memory cgroup (version 1) that this user may divide"


def _limit(group: Path, most: int) -> None:
    # EBUSY: it holds more than that already and nothing can be taken back; the next page is refused all the same.
    with contextlib.suppress(OSError):
        (group / "memory.limit_in_bytes").write_text(str(most))


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def _traced(pid: int) -> bool:
    try:
        threads = [task / "status" for task in Path(f"/proc/{pid}/task").iterdir()]
        return all("TracerPid:\t0\n" not in status.read_text() for status in threads)
    except OSError:
        return not Path(f"/proc/{pid}").exists()


def _run(*command: str, good: Sequence[int] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in good, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout

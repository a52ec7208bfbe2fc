"""Disk faults injected from outside: lost unsynced writes, failing system calls and bit flips.

The card is an ext4 file system in a file, mounted as the device's data folder. A power cut is EXT4_IOC_SHUTDOWN: no
later write reaches the medium, and data only in the page cache are lost at the next mount.
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

from outstation.workbench.testing.patience import wait_until
from scripts.faults.world import DEVICE, World

# _IOR('X', 125, __u32) of linux/fs/ext4/ext4.h.
_SHUTDOWN = 0x8004587D
_LEAVE_JOURNAL, _DROP_JOURNAL = 1, 2
_PATIENCE_S = 10.0
_BALLAST = "ballast"
_MOUNTS = Path("/proc/self/mountinfo")


class Card(msgspec.Struct, frozen=True):
    """Memory card of a world."""

    image: Path
    mount_point: Path

    @staticmethod
    def in_world(world: World) -> Card:
        return Card(world.folder / "card.ext4", world.device.data_dir)

    def make(self, mib: int) -> None:
        with self.image.open("wb") as file:
            file.truncate(mib << 20)
        # No blocks are reserved for root, because root fills the disk.
        _run("mkfs.ext4", "-qF", "-m", "0", "-e", "remount-ro", str(self.image))
        self.mount_point.mkdir(parents=True, exist_ok=True)
        self.mount()

    def mount(self) -> None:
        """Check the file system, then mount it, as a booting machine does."""
        # 1: errors were corrected.
        _run("fsck.ext4", "-p", str(self.image), good=(0, 1))
        # Each mount gets its own loop device; `-o loop` would reuse one that still exists.
        device = _run("losetup", "--find", "--show", str(self.image)).strip()
        try:
            # The commit interval stops ext4 from writing on its own, so that unsynced data are really lost.
            _run("mount", "-o", "noatime,commit=300", device, str(self.mount_point))
        finally:
            # The loop device is released with the mount.
            _run("losetup", "--detach", device)

    def unmount(self) -> None:
        wait_until("the card can be unmounted", lambda: self._unmounted(), _PATIENCE_S)

    def cut(self, *, journal: bool) -> None:
        """Cut the power, with ext4's journal written just before (`journal`) or lost too.

        Stop every writer first: a flush in progress at this moment reports success and may write nothing.
        """
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _LEAVE_JOURNAL if journal else _DROP_JOURNAL))
        finally:
            os.close(descriptor)
        # Use a copy: the dead file system lives on in any mount namespace that holds it, and writes when that ends.
        copy = self.image.with_suffix(".copy")
        _run("cp", "--sparse=always", str(self.image), str(copy))
        copy.rename(self.image)
        self.unmount()
        self.mount()

    def fail(self) -> None:
        """Put ext4 into its error state, which makes it read-only until the next mount."""
        source = _run("findmnt", "-no", "SOURCE", str(self.mount_point)).strip()
        (Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error").write_text("1")

    def fill(self) -> None:
        """Use all free space."""
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
        # os.path.ismount returns False if a dead card responds with an error.
        return any(line.split()[4] == str(self.mount_point) for line in _MOUNTS.read_text().splitlines())


def on_card(mib: int = 64) -> Callable[[World], None]:
    """Mount a card as the device's data folder; for `Setting.prepare`."""

    def prepare(world: World) -> None:
        card = Card.in_world(world)
        card.make(mib)
        world.undo.callback(card.unmount)

    return prepare


def no_card() -> str | None:
    """Return the reason why this machine cannot mount a card, or None."""
    if os.geteuid() != 0:
        return "mounting an ext4 of its own needs root"
    lacking = [name for name in ("mkfs.ext4", "fsck.ext4", "mount", "findmnt", "losetup") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not found; install e2fsprogs and mount"
    return None if Path("/dev/loop-control").exists() else "this kernel has no loop devices"


def no_strace() -> str | None:
    """Return the reason why this machine cannot inject system call errors, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    return None if os.geteuid() == 0 else "attaching strace to a running process needs root"


@contextlib.contextmanager
def tampered(world: World, calls: str, how: str, *, files: Sequence[Path] = ()) -> Iterator[None]:
    """Apply strace's injection `how` to the daemon's system calls `calls` (on `files` only) during the block."""
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
    """Return the files that commits are written to, existing or not."""
    return [world.device.data_dir / name for name in ("outstation.db", "outstation.db-wal", "journal")]


def stored_files(world: World) -> list[Path]:
    """Return every file of the data folder that is written while the daemon runs."""
    files = {path for path in world.device.data_dir.iterdir() if path.is_file() and path.name not in ("lock", _BALLAST)}
    return sorted(files.union(database_files(world)))


def results(world: World) -> int:
    """Return the number of results at the collector."""
    [(count,)] = world.fleet.query("SELECT count(*) FROM results WHERE device = ?", DEVICE)
    return int(count)


def flip_bit(file: Path, bit: int) -> None:
    """Flip bit number `bit` of the file."""
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
    """Run the daemon in its own cgroup, and yield a function that sets its memory limit in bytes."""
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
    """Return this process's memory cgroup, version 1."""
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
    # EBUSY: usage exceeds the limit and no page can be reclaimed; the next allocation fails anyway.
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

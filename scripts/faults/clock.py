"""Controlled clocks of the device: wall clock, time synchronization state and boot identity.

libfaketime shifts the daemon's wall clock and leaves the boot-time clock alone. A simulated boot has a new boot id,
mounted over the kernel's, and a boot-time clock that restarts in its own namespaces. A file (`vouched-by` in `launch`)
replaces the time service; it changes atomically with the wall clock.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import msgspec

from scripts.faults.world import World

_LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
_PATIENCE_S = 5.0
_NOW = "now"
# A typical error bound of a time service.
ERROR_US = 20_000
_BIND = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


class Clock(msgspec.Struct, frozen=True):
    """Clocks of a world's device: `show` works at any time, `boot` while the device is down."""

    world: World

    @staticmethod
    def in_world(world: World) -> Clock:
        return Clock(world)

    @property
    def _folder(self) -> Path:
        return self.world.folder / "clock"

    @property
    def _runs(self) -> Path:
        return self._folder / "runs"

    def make(self, zone: str) -> None:
        """Create correct, synchronized clocks in the local time of `zone`."""
        self._folder.mkdir()
        self.show(0.0)
        environment = (
            f"LD_PRELOAD={library()}",
            f"FAKETIME_TIMESTAMP_FILE={self._folder / _NOW / 'wall'}",
            *("FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_DISABLE_SHM=1", "NO_FAKE_STAT=1"),
            f"TZ={zone}",
        )
        flaws = (f"vouched-by={self._folder / _NOW}", f"noted-runs={self._runs}")
        launcher = ("-m", "scripts.faults.launch", *flaws, "--")
        self.world.device.set_launcher(launcher, ("env", *environment))

    def show(self, ahead_s: float, *, error_us: int | None = ERROR_US) -> None:
        """Set wall time to true time + `ahead_s`; `error_us` is the error bound, or None if unsynchronized."""
        face = self._folder / str(len(list(self._folder.iterdir())))
        face.mkdir()
        (face / "wall").write_text(f"{ahead_s:+.6f}\n", encoding="ascii")
        if error_us is not None:
            (face / "vouched").write_text(f"{error_us}\n", encoding="ascii")
        link = self._folder / "next"
        link.symlink_to(face.name)
        # Change both atomically, so that the daemon never observes a state between.
        link.replace(self._folder / _NOW)

    def runs(self, task: str) -> int:
        """Return how often the daemon has run `task` since the start of the world."""
        lines = self._runs.read_text(encoding="ascii").split() if self._runs.exists() else []
        return lines.count(task)

    def boot(self, up_s: float = 10.0) -> None:
        """Make the next start of the daemon happen on a machine that booted `up_s` seconds ago."""
        boot_id = self._folder / "boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
        back = round(time.clock_gettime(time.CLOCK_BOOTTIME) - up_s)
        shifted = (f"--boottime=-{back}", f"--monotonic=-{back}")
        device = self.world.device
        environment = device.prefix[device.prefix.index("env") :]
        spaces = ("unshare", "--mount", "--time", *shifted, "sh", "-c", _BIND, str(boot_id))
        device.set_launcher(device.launcher, (*spaces, *environment))


def library() -> Path | None:
    """Return the path of libfaketime."""
    libraries = [path for pattern in _LIBRARIES for path in sorted(Path("/").glob(pattern[1:]))]
    return libraries[0] if libraries else None


def no_clock() -> str | None:
    """Return the reason why this machine cannot set the clock of a single process, or None."""
    return None if library() is not None else "libfaketime is not installed (Debian package faketime)"


def no_boot() -> str | None:
    """Return the reason why this machine cannot simulate a boot, or None."""
    if (reason := no_clock()) is not None:
        return reason
    if os.geteuid() != 0:
        return "a boot id and a boot-time clock of its own need root"
    if shutil.which("unshare") is None:
        return "unshare is not installed (Debian package util-linux)"
    command = ["unshare", "--mount", "--time", "--boottime=-1", "cat", "/proc/uptime"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    return None if done.returncode == 0 else "this kernel has no time namespaces"

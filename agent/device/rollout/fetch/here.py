"""What there is on this device for another bundle: fields, memory and disk."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import psutil

from agent import __version__
from agent.config import Config
from agent.device.rollout.fetch.compatibility import DeviceProfile
from agent.model.inference import runtime

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def measure_profile(conf: Config, task: str) -> DeviceProfile:
    """As of now, for a bundle of `task`."""
    stream = conf.tasks[task].stream
    return DeviceProfile(
        stream=stream,
        fields={field.name: field.type for field in conf.streams[stream].fields},
        agent=__version__,
        runtime=runtime.RUNTIME_NAME,
        free_memory=_available_memory(),
        free_disk=shutil.disk_usage(conf.data_dir).free,
    )


def _available_memory() -> int:
    """Bytes that are free, in the machine and in the service's own limits (cgroup v2)."""
    found = [int(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        for group in (_CGROUP_ROOT / own, *(_CGROUP_ROOT / own).parents):
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / "memory.max").read_text(encoding="ascii"))
                found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, min(found))

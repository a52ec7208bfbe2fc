"""Fetch requests: what the daemon tells the fetch worker about the repository, the time and this device."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import psutil

from outstation import __version__
from outstation.device.config import Config, UpdatesConfig
from outstation.device.rollout.fetch.compatibility import DeviceProfile
from outstation.device.rollout.fetch.protocol import FetchRequest
from outstation.device.rollout.fetch.version_floors import VersionFloors
from outstation.ml.model.inference.runtime_name import runtime_name

# In the data folder.
DOWNLOAD_DIR, METADATA_DIR = "bundles/.fetched", "updates"
_METADATA_TIMEOUT_S = 300.0
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def build_metadata_request(conf: Config, updates: UpdatesConfig, floors: VersionFloors, time_us: int) -> FetchRequest:
    return FetchRequest(
        url=updates.url,
        ca_file=updates.ca_file,
        root_file=updates.root,
        metadata_dir=str(conf.data_dir / METADATA_DIR),
        download_dir=str(conf.data_dir / DOWNLOAD_DIR),
        parent_pid=os.getpid(),
        trusted_time_s=time_us / 1e6,
        floors=floors,
        timeout_s=_METADATA_TIMEOUT_S,
        max_size=int(updates.max_size),
        max_rate=None if updates.max_rate is None else int(updates.max_rate),
    )


def measure_profile(conf: Config, task: str) -> DeviceProfile:
    """Return the resources that this device has now for a bundle of `task`."""
    stream = conf.tasks[task].stream
    # The machine's free memory, or the service's own limit (cgroup v2) if that is lower.
    available = [int(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        for group in (_CGROUP_ROOT / own, *(_CGROUP_ROOT / own).parents):
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / "memory.max").read_text(encoding="ascii"))
                available.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return DeviceProfile(
        stream=stream,
        fields={field.name: field.type for field in conf.streams[stream].fields},
        agent=__version__,
        runtime=runtime_name(),
        free_memory=max(0, min(available)),
        free_disk=shutil.disk_usage(conf.data_dir).free,
    )

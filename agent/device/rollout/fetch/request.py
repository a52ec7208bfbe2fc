"""What the child that fetches is asked, but for the bundle."""

from __future__ import annotations

import os

from agent import clock
from agent.clock import ClockReading
from agent.config import Config, UpdatesConfig
from agent.device.machine.timekeeping import FLOOR, SYNCED
from agent.device.rollout.fetch.protocol import FetchRequest
from agent.device.rollout.fetch.version_floors import VersionFloors
from agent.device.store.store import Store

# In the data folder.
DOWNLOAD_DIR, METADATA_DIR = "bundles/.fetched", "updates"
_METADATA_TIMEOUT_S = 300.0


def build_metadata_request(conf: Config, updates: UpdatesConfig, floors: VersionFloors, time_us: int) -> FetchRequest:
    """A look at the metadata and nothing else."""
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


def trusted_time_us(store: Store, now: ClockReading) -> int:
    """The latest that is known to have passed: a clock that shows less, and that nobody vouches for, is wrong."""
    seen = (int(store.get_meta(name, "0")) for name in (FLOOR, SYNCED))
    return now.wall_us if now.quality == "synced" else max(now.wall_us, clock.BUILD_FLOOR_US, *seen)

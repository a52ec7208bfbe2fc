"""What the child that fetches is asked, but for the bundle."""

from __future__ import annotations

import os

from agent import clock
from agent.clock import Now
from agent.config import Config, Updates
from agent.device.machine.timekeeping import FLOOR, SYNCED
from agent.device.rollout.fetch.protocol import Request
from agent.device.rollout.fetch.version_floors import Floors
from agent.device.store.store import Store

# In the data folder.
FETCHED, METADATA = "bundles/.fetched", "updates"
_LOOK_S = 300.0


def look(conf: Config, updates: Updates, known: Floors, time_us: int) -> Request:
    """A look at the metadata and nothing else."""
    return Request(
        url=updates.url,
        ca_file=updates.ca_file,
        root=updates.root,
        folder=str(conf.data_dir / METADATA),
        into=str(conf.data_dir / FETCHED),
        parent=os.getpid(),
        time_s=time_us / 1e6,
        floors=known,
        seconds=_LOOK_S,
        max_size=int(updates.max_size),
        max_rate=None if updates.max_rate is None else int(updates.max_rate),
    )


def latest_us(store: Store, now: Now) -> int:
    """The latest that is known to have passed: a clock that shows less, and that nobody vouches for, is wrong."""
    seen = (int(store.meta(name, "0")) for name in (FLOOR, SYNCED))
    return now.wall_us if now.quality == "synced" else max(now.wall_us, clock.BUILD_FLOOR_US, *seen)

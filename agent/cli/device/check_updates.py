"""`outstation check`: whether bundles could be fetched now, by a real look at the repository that changes nothing."""

from __future__ import annotations

import tempfile
import time

import msgspec

from agent import clock
from agent.config import Config, Updates
from agent.device.rollout.fetch import request as asking
from agent.device.rollout.fetch import version_floors
from agent.device.rollout.fetch.child import Child
from agent.device.store.store import Store
from agent.errors import FetchFailed, OutstationError

_PATIENCE_S = 20.0


def look(conf: Config, updates: Updates) -> str:
    """What the repository shows, in a sentence. Raises OutstationError."""
    now = clock.read()
    try:
        store = Store(conf.data_dir, read_only=True)
    except OutstationError:
        known, time_us = version_floors.Floors(), max(now.wall_us, clock.BUILD_FLOOR_US)
    else:
        known, time_us = version_floors.load(store), asking.latest_us(store, now)
        store.close()
    with tempfile.TemporaryDirectory(prefix="outstation-") as folder:
        request = asking.look(conf, updates, known, time_us)
        child = Child(msgspec.structs.replace(request, folder=folder, seconds=_PATIENCE_S), clock.boot_seconds())
        try:
            while not child.ended(clock.boot_seconds()):
                time.sleep(0.02)
        except BaseException:
            child.end()
            raise
        answer = child.answer()
    if answer.error:
        raise FetchFailed(answer.error, answer.detail)
    versions = {role: floor.version for role, floor in answer.floors.roles.items()}
    expires = clock.rfc3339(round((answer.floors.expires_s or 0.0) * 1e6))[:10]
    return f"{updates.url}, root {versions['root']}, timestamp {versions['timestamp']}, holds until {expires}"

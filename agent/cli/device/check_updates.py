"""`outstation check`: whether bundles could be fetched now, by a real look at the repository that changes nothing."""

from __future__ import annotations

import tempfile
import time

import msgspec

from agent import clock
from agent.config import Config, UpdatesConfig
from agent.device.rollout.fetch import request as asking
from agent.device.rollout.fetch import version_floors
from agent.device.rollout.fetch.child import FetchProcess
from agent.device.store.store import Store
from agent.errors import FetchFailed, OutstationError

_TIMEOUT_S = 20.0


def inspect_repository(conf: Config, updates: UpdatesConfig) -> str:
    """What the repository shows, in a sentence. Raises OutstationError."""
    now = clock.read()
    try:
        store = Store.open_read_only(conf.data_dir)
    except OutstationError:
        known, time_us = version_floors.VersionFloors(), max(now.wall_us, clock.BUILD_FLOOR_US)
    else:
        known, time_us = version_floors.load(store), asking.trusted_time_us(store, now)
        store.close()
    with tempfile.TemporaryDirectory(prefix="outstation-") as folder:
        request = asking.build_metadata_request(conf, updates, known, time_us)
        child = FetchProcess(
            msgspec.structs.replace(request, metadata_dir=folder, timeout_s=_TIMEOUT_S), clock.boot_seconds()
        )
        try:
            while not child.has_ended(clock.boot_seconds()):
                time.sleep(0.02)
        except BaseException:
            child.kill_and_wait()
            raise
        answer = child.read_response()
    if answer.error:
        raise FetchFailed(answer.error, answer.detail)
    versions = {role: floor.version for role, floor in answer.floors.roles.items()}
    expires = clock.to_rfc3339(round((answer.floors.expires_s or 0.0) * 1e6))[:10]
    return f"{updates.url}, root {versions['root']}, timestamp {versions['timestamp']}, holds until {expires}"

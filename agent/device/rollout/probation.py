"""A bundle on probation that ended the agent is taken back at once, and not after a second time like any other.

On probation it runs apart and cannot; it is loaded into the agent only when it settles, before that is committed.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from agent import clock
from agent.clock import ClockReading
from agent.config import Config
from agent.device.bundles.crash_marker import CrashMarker
from agent.device.bundles.rollout_state import load_state
from agent.device.store import retention
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.errors import StorageFull

log = logging.getLogger("outstation.updates")


def roll_back_after_crash(
    conf: Config, store: Store, author: MessageLog, marker: CrashMarker, now: ClockReading
) -> bool:
    """At a start: take back the bundle on probation that the process before died of; whether it did."""
    left = marker.previous_run
    if left is None or left.task not in conf.tasks:
        return False
    old = load_state(store, left.task)
    if old is None or old.phase != "canary" or old.desired.digest != left.digest:
        return False
    # Loads all of roll-outs, which few starts need.
    from agent.device.rollout import transitions

    why = "the agent ended while it loaded this bundle, which had been on probation"
    at_s = retention.uptime_s(store.get_meta(retention.UPTIME, ""), store.boot, now)
    at = {"since": clock.to_rfc3339(now.wall_us), "since_s": at_s}
    new = replace(
        old, phase="rolled_back", reason="crash", detail=why, numbers={}, late=False, previous_history="", **at
    )
    log.error("task %s: %s", left.task, why)
    try:
        with store.transaction(vital=True) as tx:
            transitions.record(tx, author, left.task, old, new, now)
            transitions.end_canary(tx, author, left.task, old, None, new.phase, now)
    except StorageFull as full:
        log.error("task %s: %s; that its bundle ended the agent is not recorded", left.task, full)
        return False
    marker.clear()
    return True

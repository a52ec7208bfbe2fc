"""A bundle on probation that ended the agent is taken back at once, and not after a second time like any other.

On probation it runs apart and cannot; it is loaded into the agent only when it settles, before that is committed.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from agent import clock
from agent.clock import Now
from agent.config import Config
from agent.device.bundles.crash_marker import Marker
from agent.device.bundles.rollout_state import standing
from agent.device.store import retention
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.errors import StorageFull

log = logging.getLogger("outstation.updates")


def settle(conf: Config, store: Store, author: Author, marker: Marker, now: Now) -> bool:
    """At a start: take back the bundle on probation that the process before died of; whether it did."""
    left = marker.left
    if left is None or left.task not in conf.tasks:
        return False
    old = standing(store, left.task)
    if old is None or old.phase != "probation" or old.wanted.digest != left.digest:
        return False
    # Loads all of roll-outs, which few starts need.
    from agent.device.rollout import transitions

    why = "the agent ended while it loaded this bundle, which had been on probation"
    at_s = retention.uptime_s(store.meta(retention.UPTIME, ""), store.boot, now)
    at = {"since": clock.rfc3339(now.wall_us), "since_s": at_s}
    new = replace(old, phase="rolled back", reason="crash", why=why, numbers={}, late=False, past="", **at)
    log.error("task %s: %s", left.task, why)
    try:
        with store.transaction(vital=True) as tx:
            transitions.write(tx, author, left.task, old, new, now)
            transitions.end_probation(tx, author, left.task, old, None, new.phase, now)
    except StorageFull as full:
        log.error("task %s: %s; that its bundle ended the agent is not recorded", left.task, full)
        return False
    marker.clear()
    return True

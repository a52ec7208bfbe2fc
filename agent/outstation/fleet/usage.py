"""Usage of the fleet's devices, from the newest health message of each that states it."""

from __future__ import annotations

import msgspec

from outstation.fleet.database.dashboard import devices as statements
from outstation.fleet.database.dashboard.messages import to_bytes
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.foundation import decoders
from outstation.foundation.costs.usage import Usage

# A device states its usage once an hour, and its health each minute: more than an hour of messages is searched.
_SEARCHED = 70


class _Health(msgspec.Struct, frozen=True):
    usage: Usage | None = None


def load_usages(store: FleetStore, device: str | None = None) -> dict[str, Usage | None]:
    """Return the usage of each device with a key that may sign.

    None for one that has not stated it in its newest log within the last hour.
    """
    with store.snapshot() as db:
        names = sorted(name for name in statements.load_active(db) if device in (None, name))
        logs = statements.load_newest_logs(db, names)
        return {
            name: None if log is None else _find_usage(db, name, log[0]) for name, log in zip(names, logs, strict=True)
        }


def _find_usage(db: Connection, device: str, log: str) -> Usage | None:
    """Return the usage in the newest health message that states it: of all, one is decoded."""
    for _, stored in statements.load_health_history(db, device, log, _SEARCHED):
        payload = to_bytes(stored)
        if b'"usage"' in payload:
            try:
                usage = decoders.from_json(payload, _Health).usage
            except msgspec.MsgspecError:
                continue
            if usage is not None and usage.seconds > 0:
                return usage
    return None

"""What an opening found wrong, kept in the store until it is said in the log: nothing lost goes unmentioned."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from agent.device.store import meta, ranges

# Names in table meta.
FINDINGS, LAST_FINDING, CLEAN_STOP, LAST_STOP = "findings", "last finding", "clean", "last stop"


class RecoveryFinding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`what` happened, in words for people, and what is missing since.

    `seqs`: messages of log `log` that are gone; `rows`: readings by stream; `tasks`: rows whose results went with them.
    """

    summary: str
    time: str
    log: str
    quarantine: str = ""
    seqs: list[tuple[int, int]] = []
    rows: dict[str, list[tuple[int, int]]] = {}
    tasks: dict[str, list[tuple[int, int]]] = {}


class NewLogPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Why the log `old` cannot go on in this store, and which of its messages the collector has.

    - `acknowledged`: those that it was known to have, as in table meta
    - up to `common`, those up to `through` but for `missing`
    Behind `common` the collector's messages are not the ones in this store. `last`: no message
    of the old log is above it. `done`: the last old seq that was seen to.
    """

    reason: str
    old: str
    common_through: int = 0
    through: int = 0
    missing: list[tuple[int, int]] = []
    acknowledged: str = ""
    new: str = ""
    last: int = 0
    done: int = 0


NEW_LOG = "new log"
_FINDINGS_DECODER = msgspec.json.Decoder(list[RecoveryFinding])


def decode(text: str) -> list[RecoveryFinding]:
    return _FINDINGS_DECODER.decode(text) if text else []


def add(db: sqlite3.Connection, finding: RecoveryFinding) -> None:
    """Keep it, inside the caller's transaction."""
    put(db, FINDINGS, msgspec.json.encode([*decode(meta.get(db, FINDINGS, "")), finding]).decode())
    said = {"time": finding.time, "what": finding.summary, "quarantine": finding.quarantine}
    put(db, LAST_FINDING, msgspec.json.encode(said).decode())


def put(db: sqlite3.Connection, key: str, value: str) -> None:
    meta.put(db, key, value)


def missing_ranges(present: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """What of `first` … `last` is not in `kept`, in whatever order and overlap."""
    return ranges.subtract([(first, last)] if first <= last else [], ranges.union(present))

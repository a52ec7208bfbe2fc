"""Recovery findings: what an opening found wrong, stored until the log reports it, so that no loss goes unreported."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from outstation.device.store.tables import meta
from outstation.foundation import decoders, ranges

# Names in table meta: unreported findings, the last finding, how the store was closed, and the `NewLogPlan`.
FINDINGS, LAST_FINDING, CLEAN_STOP, LAST_STOP = "findings", "last finding", "clean stop", "last stop"
NEW_LOG = "new log plan"


class RecoveryFinding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Damage or loss with a summary for people.

    `seqs`: lost messages of log `log`; `rows`: lost readings by stream; `tasks`: rows with lost results.
    """

    summary: str
    time: str
    log: str
    quarantine: str = ""
    seqs: list[tuple[int, int]] = []
    rows: dict[str, list[tuple[int, int]]] = {}
    tasks: dict[str, list[tuple[int, int]]] = {}


class NewLogPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Reason why log `old` cannot continue in this store, and which of its messages the collector has.

    - `acknowledged`: seqs that it was known to have, as in table meta
    - up to `common_through`: all up to `through` except `missing`
    Behind `common_through` the collector's messages differ from those of this store. `last`: no message of the old log
    is above it. `done`: the last old seq that was processed. `joined`: the device joined a fleet, nothing is wrong.
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
    joined: bool = False


_FINDINGS_DECODER = decoders.json_decoder(list[RecoveryFinding])


def decode(text: str) -> list[RecoveryFinding]:
    return _FINDINGS_DECODER.decode(text) if text else []


def add(db: sqlite3.Connection, finding: RecoveryFinding) -> None:
    """Store a finding inside the caller's transaction."""
    meta.put(db, FINDINGS, msgspec.json.encode([*decode(meta.get(db, FINDINGS, "")), finding]).decode())
    last = {"time": finding.time, "summary": finding.summary, "quarantine": finding.quarantine}
    meta.put(db, LAST_FINDING, msgspec.json.encode(last).decode())


def missing_ranges(present: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Return the numbers in `first` … `last` that are not in `present`, which may be in any order and overlap."""
    return ranges.subtract([(first, last)] if first <= last else [], ranges.union(present))

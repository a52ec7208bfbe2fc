"""What table meta said and is gone, from what else tells it: the watermark, the outbox, readings and segments.

Where nothing tells how far the log had got, a new log begins: no seq is ever given twice.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from typing import Any

from agent.device.recovery import catch_up
from agent.device.recovery.findings import NEW_LOG
from agent.device.store import forecast, meta, retention
from agent.device.store.watermark import Mark
from agent.wire.messages import digest

_WHY = "The store was damaged where it says which log it writes and how far that had got."


def rebuild(db: sqlite3.Connection, mark: Mark | None, damaged: Collection[str]) -> None:
    """Inside the caller's transaction; `damaged`: names of values that were there, but not as written."""
    if not meta.get(db, "boot", ""):
        boots = [_greatest(db, "chunks", "boot"), _greatest(db, "segments", "boot"), mark.boot if mark else 0]
        meta.put(db, "boot", str(max(boots)))
        meta.drop(db, "boot_id")
    if not meta.get(db, retention.UPTIME, ""):
        # Both count in uptime, which begins anew.
        meta.drop(db, retention.STEPS)
        meta.drop(db, forecast.GROWTH)
    if db.execute("SELECT 1 FROM meta WHERE key = ?", (catch_up.UNPROVEN,)).fetchone() is None:
        # As far as is known nobody has confirmed any message.
        meta.put(db, catch_up.UNPROVEN, "0")
    _log(db, mark, is_begun_again=NEW_LOG in damaged)


def _log(db: sqlite3.Connection, mark: Mark | None, *, is_begun_again: bool) -> None:
    newest = _newest(db)
    known = meta.get(db, "log", "")
    log = known or (mark.log if mark else "") or newest.get("log", "")
    if not log:
        # As in a new store: nothing is left that a number could be given again to.
        for key in ("seq", "digest"):
            meta.drop(db, key)
        return
    meta.put(db, "log", log)
    seq, last = meta.get(db, "seq", ""), meta.get(db, "digest", "")
    told = {int(seq): last} if seq.isdecimal() else {0: ""}
    if mark is not None and mark.log == log:
        told[mark.seq] = mark.digest
    if newest.get("log") == log:
        told[newest["seq"]] = newest["digest"]
    most = max(told)
    acknowledged = retention.Acknowledged.from_json(meta.get(db, retention.ACKNOWLEDGED, "")).through
    # The newest message that is left need not be the last one that was written.
    is_told = bool(known and seq.isdecimal()) or (mark is not None and mark.log == log)
    is_known = is_told and most >= acknowledged and bool(told[most] or most == 0)
    meta.put(db, "seq", str(max(most, acknowledged)))
    meta.put(db, "digest", told[most])
    if not is_known or is_begun_again:
        catch_up.begin_log(db, log, _WHY)


def _newest(db: sqlite3.Connection) -> dict[str, Any]:
    """seq, log and digest of the newest message that is left; nothing where it says none."""
    row = db.execute("SELECT seq, CAST(payload AS BLOB) FROM outbox ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return {}
    try:
        return {"seq": int(row[0]), "log": str(json.loads(row[1])["log"]), "digest": digest(row[1])}
    except (ValueError, KeyError, TypeError):
        return {}


def _greatest(db: sqlite3.Connection, table: str, column: str) -> int:
    found = db.execute(f"SELECT max({column}) FROM {table} WHERE typeof({column}) = 'integer'").fetchone()[0]
    return int(found or 0)

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
from agent.device.store.watermark import WatermarkState
from agent.wire.messages import digest

_REASON = "The store was damaged where it says which log it writes and how far that had got."


def rebuild_meta(db: sqlite3.Connection, watermark_state: WatermarkState | None, damaged: Collection[str]) -> None:
    """Inside the caller's transaction; `damaged`: names of values that were there, but not as written."""
    if not meta.get(db, "boot", ""):
        boots = [
            _max_value(db, "chunks", "boot"),
            _max_value(db, "segments", "boot"),
            watermark_state.boot if watermark_state else 0,
        ]
        meta.put(db, "boot", str(max(boots)))
        meta.drop(db, "boot_id")
    if not meta.get(db, retention.UPTIME, ""):
        # Both count in uptime, which begins anew.
        meta.drop(db, retention.ACKNOWLEDGED_HISTORY)
        meta.drop(db, forecast.GROWTH)
    if db.execute("SELECT 1 FROM meta WHERE key = ?", (catch_up.UNPROVEN_FROM,)).fetchone() is None:
        # As far as is known nobody has confirmed any message.
        meta.put(db, catch_up.UNPROVEN_FROM, "0")
    _rebuild_log_head(db, watermark_state, is_plan_lost=NEW_LOG in damaged)


def _rebuild_log_head(db: sqlite3.Connection, watermark_state: WatermarkState | None, *, is_plan_lost: bool) -> None:
    newest = _newest_message(db)
    known = meta.get(db, "log", "")
    log = known or (watermark_state.log if watermark_state else "") or newest.get("log", "")
    if not log:
        # As in a new store: nothing is left that a number could be given again to.
        for key in ("seq", "digest"):
            meta.drop(db, key)
        return
    meta.put(db, "log", log)
    seq, last = meta.get(db, "seq", ""), meta.get(db, "digest", "")
    told = {int(seq): last} if seq.isdecimal() else {0: ""}
    if watermark_state is not None and watermark_state.log == log:
        told[watermark_state.seq] = watermark_state.digest
    if newest.get("log") == log:
        told[newest["seq"]] = newest["digest"]
    most = max(told)
    acknowledged = retention.AcknowledgedSeqs.from_json(meta.get(db, retention.ACKNOWLEDGED, "")).through
    # The newest message that is left need not be the last one that was written.
    is_told = bool(known and seq.isdecimal()) or (watermark_state is not None and watermark_state.log == log)
    is_known = is_told and most >= acknowledged and bool(told[most] or most == 0)
    meta.put(db, "seq", str(max(most, acknowledged)))
    meta.put(db, "digest", told[most])
    if not is_known or is_plan_lost:
        catch_up.plan_new_log(db, log, _REASON)


def _newest_message(db: sqlite3.Connection) -> dict[str, Any]:
    """seq, log and digest of the newest message that is left; nothing where it says none."""
    row = db.execute("SELECT seq, CAST(payload AS BLOB) FROM outbox ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return {}
    try:
        return {"seq": int(row[0]), "log": str(json.loads(row[1])["log"]), "digest": digest(row[1])}
    except (ValueError, KeyError, TypeError):
        return {}


def _max_value(db: sqlite3.Connection, table: str, column: str) -> int:
    found = db.execute(f"SELECT max({column}) FROM {table} WHERE typeof({column}) = 'integer'").fetchone()[0]
    return int(found or 0)

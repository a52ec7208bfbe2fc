"""Queries of the evidence export, all from one snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from outstation.fleet.database.interface import Connection, Row, fetch_dicts
from outstation.fleet.database.store import FleetStore

_EVIDENCE_KINDS = ("alerts", "audit", "quality", "shadow")


class EvidenceQueries:
    """Queries inside a snapshot `db` of the store."""

    def __init__(self, store: FleetStore, db: Connection) -> None:
        self._store, self._db = store, db

    def load_received_span(self) -> tuple[str | None, str | None, int]:
        """Return when the first and the last message arrived, and the number of messages."""
        sql = "SELECT min(received) AS first, max(received) AS last, count(*) AS n FROM messages"
        [row] = self._query(sql)
        return row["first"], row["last"], row["n"]

    def stream_messages(self) -> Iterator[Row]:
        """Return (device, log, seq, topic, payload, jws) of each message that the evidence quotes."""
        sql = "SELECT device, log, seq, topic, payload, jws FROM messages WHERE kind IN (?, ?, ?, ?)"
        return self._store.stream(f"{sql} ORDER BY device, log, seq", _EVIDENCE_KINDS)

    def stream_log(self) -> Iterator[Row]:
        """Return (device, log, seq, kind, payload) of every message, in the order of each log."""
        return self._store.stream("SELECT device, log, seq, kind, payload FROM messages ORDER BY device, log, seq")

    def stream_heads(self) -> Iterator[Row]:
        """Return (device, log, seq, payload) of the newest message of every log."""
        newest = "SELECT device, log, max(seq) AS seq FROM messages GROUP BY device, log"
        sql = f"SELECT m.device, m.log, m.seq, m.payload FROM messages m JOIN ({newest}) newest"
        return self._store.stream(f"{sql} USING (device, log, seq) ORDER BY device, log")

    def load_message(self, device: str, log: str, seq: int) -> tuple[str, bytes, str] | None:
        sql = "SELECT topic, payload, jws FROM messages WHERE device = ? AND log = ? AND seq = ?"
        row: tuple[str, bytes, str] | None = self._db.execute(sql, (device, log, seq)).fetchone()
        return row

    def load_newest_message(self, device: str, log: str, kind: str) -> Row | None:
        """Return (device, log, seq, topic, payload, jws) of the newest message of a kind in a log."""
        sql = "SELECT device, log, seq, topic, payload, jws FROM messages WHERE device = ? AND log = ? AND kind = ?"
        row: Row | None = self._db.execute(f"{sql} ORDER BY seq DESC LIMIT 1", (device, log, kind)).fetchone()
        return row

    def load_newest_health(self, device: str, log: str, limit: int) -> list[Row]:
        """Return (seq, payload) of the newest health messages of a log, newest first."""
        sql = "SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND kind = ? ORDER BY seq DESC LIMIT ?"
        return list(self._db.execute(sql, (device, log, "health", limit)))

    def stream_retention(self) -> Iterator[Row]:
        """Return (payload, jws) of the newest retention statement of each device."""
        return self._store.stream("SELECT payload, jws FROM retention WHERE state IS NOT NULL ORDER BY device")

    def load_devices(self) -> list[dict[str, Any]]:
        return self._query("SELECT device, enrolled, state, last_seen FROM devices ORDER BY device")

    def load_keys(self) -> list[dict[str, Any]]:
        columns = "kid, device, key, added, revoked, log, last_seq, made_by"
        return self._query(f"SELECT {columns} FROM keys ORDER BY device, kid")

    def load_collector_alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that the collector raised or cleared itself, oldest first."""
        columns = "device, task, alert, subject, state, severity, summary, time, id"
        return self._query(f"SELECT {columns} FROM alerts WHERE source = 'collector' ORDER BY time, log, seq")

    def count_labels(self) -> dict[tuple[str, str, str], dict[str, int]]:
        """Return (device, task, output) → source → number of labels and verdicts stored in the fleet database."""
        counts: dict[tuple[str, str, str], dict[str, int]] = {}
        sql = """
            SELECT device, task, output, source, count(*) AS n FROM labels GROUP BY device, task, output, source
            UNION ALL SELECT device, task, '', 'verdict', count(*) FROM verdicts GROUP BY device, task
            ORDER BY 1, 2, 3, 4"""
        for row in self._query(sql):
            counts.setdefault((row["device"], row["task"], row["output"]), {})[row["source"]] = row["n"]
        return counts

    def load_collector_metrics(self) -> list[dict[str, Any]]:
        columns = "device, task, output, time, metric, slice, value, low, high, n, state"
        where = "WHERE source = 'collector'"
        return self._query(f"SELECT {columns} FROM metrics {where} ORDER BY device, task, output, metric, slice")

    def load_rollouts(self) -> list[dict[str, Any]]:
        columns = "rollout, task, bundle, version, digest, topic, started, state"
        return self._query(f"SELECT {columns} FROM rollouts ORDER BY started, rollout")

    def load_decisions(self) -> Iterable[dict[str, Any]]:
        columns = "rollout, n, time, event, summary, payload, jws"
        return self._query(f"SELECT {columns} FROM decisions ORDER BY rollout, n")

    def count_phases(self) -> list[dict[str, Any]]:
        """Return (rollout, phase, reason, devices): the number of devices by their last report."""
        return self._query(
            "SELECT rollout, phase, reason, count(*) AS devices FROM (SELECT rollout, phase, reason, "
            "row_number() OVER (PARTITION BY rollout, device, task ORDER BY time DESC, seq DESC) AS nth "
            "FROM rollout_devices) reports "
            "WHERE nth = 1 GROUP BY rollout, phase, reason ORDER BY rollout, phase, reason"
        )

    def _query(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        return fetch_dicts(self._db, sql, *values)

"""Copy of a damaged store: everything readable goes into a new database, and what is missing is determined exactly."""

from __future__ import annotations

import bisect
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outstation.device.recovery import catch_up, findings, replay
from outstation.device.recovery.categories import repair_categories
from outstation.device.recovery.findings import RecoveryFinding, missing_ranges
from outstation.device.recovery.raw_pages import DamagedDatabase
from outstation.device.store import retention, watermark
from outstation.device.store.outbox import message_crc
from outstation.device.store.rows import PackedChunk, is_intact
from outstation.device.store.tables import meta, row_crc, schema
from outstation.device.store.watermark import WatermarkState
from outstation.foundation import clock
from outstation.foundation.text import is_unicode

_COMMIT_ROWS = 500
# Their losses are listed, or have a sentence of their own.
_NAMED_TABLES = {"meta", "chunks", "outbox", "source_positions", "task_state", "cursors"}
# Copied first and last; every other table is copied between them by the same rules.
_FIRST_TABLES = ("meta", "streams")
_LAST_TABLES = ("chunks", "outbox")
_CHUNK_COLUMNS = (
    *("id", "stream", "first_row", "n", "first_t", "time_bytes", "data", "crc", "boot", "clock", "segment", "boot_us"),
)
_MESSAGE_COLUMNS = ("seq", "topic", "payload", "jws", "time", "crc")
_INSERT_MESSAGE = f"INSERT INTO outbox ({', '.join(_MESSAGE_COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?)"
_COUNT_INDEXED = "SELECT count(*) FROM chunks INDEXED BY chunk_rows WHERE stream = ? AND first_row = ? AND id = ?"
_FIRST_INDEXED = "SELECT stream, min(first_row) FROM chunks INDEXED BY chunk_rows GROUP BY stream"


class StoreCopy:
    """Copy in pieces, so that memory stays small: `copy_tables`, then `complete`."""

    def __init__(self, old: DamagedDatabase, new: sqlite3.Connection, saved: WatermarkState | None) -> None:
        self._old, self._new, self._watermark_state = old, new, saved
        self._rows: dict[int, list[tuple[int, int]]] = {}
        self._first_rows: dict[int, int] = {}
        self._next_rows: dict[int, int] = {}
        self._seqs: list[tuple[int, int]] = []
        self._seq_gaps: list[tuple[int, int]] = []
        self._damaged_keys: set[str] = set()
        self._damaged_rows: Counter[str] = Counter()

    def copy_tables(self) -> None:
        names = self._new.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%sqlite_%'")
        others = sorted({name for (name,) in names.fetchall()} - {*_FIRST_TABLES, *_LAST_TABLES})
        columns = ["key", "value", "crc"]
        if not set(columns) <= set(self._old.columns("meta")):
            self._old.incomplete_tables.add("meta")
        else:
            self._insert(
                "meta", columns, self._intact_meta_rows(self._old.read_by_key("meta", columns[:1], columns[1:]))
            )
        self._copy_streams()
        for table in others:
            self._copy_table(table)
        self._copy_chunks()
        self._copy_outbox()
        if self._old.incomplete_tables & {"chunks", "outbox"}:
            self._copy_orphaned_rows()

    def complete(self, cause: str, quarantine: str, folder: Path) -> None:
        """Apply the journal in `folder`, repair what depends on lost rows, and add the finding, in one transaction."""
        new, incomplete = self._new, self._old.incomplete_tables
        new.execute("BEGIN")
        is_journal_complete = self._apply_journal(folder)
        if "meta" in incomplete:
            catch_up.rebuild_meta(new, self._watermark_state, self._damaged_keys)
        acknowledged = self._load_acknowledged()
        lost: dict[str, Any] = {
            "seqs": self._lost_seqs(acknowledged),
            "rows": {name: missing for name, missing in self._lost_rows() if missing},
        }
        if "cursors" in incomplete:
            # The watermark may be older than the last batch.
            catch_up.raise_cursors(new)
        if self._watermark_state and self._get_meta("log") in ("", self._watermark_state.log):
            lost["tasks"] = catch_up.adopt_watermark(new, self._watermark_state).cursors
        elif not self._get_meta("log"):
            catch_up.abandon_unknown_log(new)
        self._count_backlog(acknowledged)
        finding = RecoveryFinding(
            summary=self._describe_damage(cause, quarantine, is_journal_complete),
            time=clock.now_rfc3339(),
            log=self._get_meta("log"),
            quarantine=quarantine,
            **lost,
        )
        findings.add(new, finding)
        new.execute("COMMIT")

    def _apply_journal(self, folder: Path) -> bool:
        """Apply the journal in `folder`; return False if a part of it is damaged."""
        replayed = replay.replay(self._new, folder)
        for stream, first, last in replayed.chunks:
            _insert_range(self._rows.setdefault(stream, []), first, last)
            self._next_rows[stream] = max(self._next_rows.get(stream, 1), last + 1)
        if "categories" in self._old.incomplete_tables or not replayed.is_complete:
            repair_categories(self._new)
        return replayed.is_complete

    def _load_acknowledged(self) -> retention.AcknowledgedSeqs:
        try:
            return retention.AcknowledgedSeqs.from_json(self._get_meta(retention.ACKNOWLEDGED))
        except (ValueError, TypeError):
            return retention.AcknowledgedSeqs()

    def _count_backlog(self, acknowledged: retention.AcknowledgedSeqs) -> None:
        messages = size = 0
        for seq, n in self._new.execute("SELECT seq, length(payload) + length(jws) + length(topic) FROM outbox"):
            if seq not in acknowledged:
                messages, size = messages + 1, size + int(n or 0)
        meta.put(self._new, retention.BACKLOG, f"{messages} {size}")

    def _describe_damage(self, cause: str, quarantine: str, is_journal_complete: bool) -> str:
        incomplete = self._old.incomplete_tables
        summary = (
            f"The store was damaged ({cause}). Everything readable was copied into a new one; the damaged files are in "
            f"{quarantine} of the data folder."
        )
        if not is_journal_complete:
            summary += " The journal of small commits was damaged, too: some of them are lost."
        if "meta" in incomplete:
            summary += " Some values of its table meta are lost, or rebuilt from the rest."
        if "source_positions" in incomplete:
            summary += " Some source positions are lost: these sources may be read again."
        if incomplete & {"task_state", "cursors"}:
            summary += " Some state of tasks is lost."
        if self._watermark_state:
            lost_labels = catch_up.lost_labels(watermark.from_database(self._new), self._watermark_state)
            summary += catch_up.describe_lost_labels(lost_labels)
        if unread := sorted(incomplete - _NAMED_TABLES - self._damaged_rows.keys()):
            summary += f" Parts of tables could not be read: {', '.join(unread)}."
        if self._damaged_rows:
            counts = ", ".join(f"{table} {n}" for table, n in sorted(self._damaged_rows.items()))
            summary += f" Rows that are not what was written, by table: {counts}."
        return summary

    # --- tables ---

    def _columns(self, table: str) -> list[str]:
        """Return the columns that both databases have: the old one may be from before a migration."""
        theirs = self._old.columns(table)
        return [name for name in schema.columns_of(self._new, table) if name in theirs]

    def _copy_table(self, table: str) -> None:
        columns = self._columns(table)
        key = [name for name, place in schema.columns_of(self._new, table).items() if place]
        if not columns or not {*key, *({"crc"} if table in row_crc.TABLES else ())} <= set(columns):
            self._old.incomplete_tables.add(table)
            return
        definition = self._new.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
        if "WITHOUT ROWID" in definition:
            rest = [name for name in columns if name not in key]
            self._insert(table, [*key, *rest], self._old.read_by_key(table, key, rest))
        else:
            self._insert(table, columns, (row[1:] for row in self._old.read_by_rowid(table, columns, [])))

    def _insert(self, table: str, columns: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        self._new.execute("BEGIN")
        for count, row in enumerate(rows, 1):
            if table in row_crc.TABLES and not row_crc.is_row_intact(table, dict(zip(columns, row, strict=True))):
                self._old.incomplete_tables.add(table)
                self._damaged_rows[table] += 1
                continue
            if any(isinstance(value, str) and not is_unicode(value) for value in row):
                self._old.incomplete_tables.add(table)
                continue
            try:
                self._new.execute(sql, row)
            except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError):
                self._old.incomplete_tables.add(table)
            if count % _COMMIT_ROWS == 0:
                self._new.execute("COMMIT")
                self._new.execute("BEGIN")
        self._new.execute("COMMIT")

    def _intact_meta_rows(self, rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for key, *rest in rows:
            if meta.is_intact((key, *rest)):
                yield key, *rest
            else:
                self._old.incomplete_tables.add("meta")
                self._damaged_keys.add(str(key))

    def _copy_streams(self) -> None:
        """Copy names, fields and numbers; lost ones are taken from the watermark."""
        self._copy_table("streams")
        sql = "SELECT name, id, fields FROM streams"
        copied = {name: (number, watermark.fields_crc(fields)) for name, number, fields in self._new.execute(sql)}
        saved = self._watermark_state.streams if self._watermark_state else {}
        for name, (number, crc, next_row) in saved.items():
            if copied.get(name) != (number, crc):
                # The watermark has a CRC, the row of the table has none.
                self._new.execute("DELETE FROM streams WHERE name = ? OR id = ?", (name, number))
                row = (number, name, watermark.fields_placeholder(crc), next_row)
                self._new.execute("INSERT INTO streams (id, name, fields, next_row) VALUES (?, ?, ?, ?)", row)
        for number, next_row in self._new.execute("SELECT id, next_row FROM streams"):
            self._next_rows[number] = next_row if type(next_row) is int else 1
        for number, _, next_row in saved.values():
            self._next_rows[number] = max(next_row, self._next_rows.get(number, 1))

    def _copy_chunks(self) -> None:
        """Copy chunks whose CRC is right, that are where the index says, and whose rows no other chunk has."""
        for stream, first in self._old.try_query(_FIRST_INDEXED) or []:
            if type(stream) is int and type(first) is int:
                self._first_rows[stream] = first
        columns = self._columns("chunks")
        if not set(_CHUNK_COLUMNS) <= set(columns):
            self._old.incomplete_tables.add("chunks")
            return
        selected = [*_CHUNK_COLUMNS[:6], "CAST(data AS BLOB)", *_CHUNK_COLUMNS[7:]]
        rows = self._old.read_by_rowid("chunks", selected, [])
        self._insert("chunks", [*_CHUNK_COLUMNS], (row[1:] for row in rows if self._accept_chunk(row[1:])))

    def _accept_chunk(self, row: tuple[Any, ...]) -> bool:
        number, stream, first, n, first_t, time_bytes, data, crc, *clock = row
        if not all(type(value) is int for value in (stream, first, n, first_t, time_bytes, crc, *clock)):
            return False
        copied, last = self._rows.setdefault(stream, []), first + n - 1
        if stream not in self._next_rows or n < 1 or first < 1 or last >= self._next_rows[stream]:
            return False
        if _overlaps(copied, first, last) or not is_intact(
            PackedChunk(n, first_t, time_bytes, data, crc, (stream, first, *clock))
        ):
            return False
        # The CRC does not cover the row numbers; the index, in another part of the file, has them too.
        indexed = self._old.try_query(_COUNT_INDEXED, stream, first, number)
        if indexed is not None and indexed[0][0] != 1:
            return False
        _insert_range(copied, first, last)
        return True

    def _copy_outbox(self) -> None:
        last, columns = self._last_seq(), self._columns("outbox")
        if not set(_MESSAGE_COLUMNS) <= set(columns):
            self._old.incomplete_tables.add("outbox")
            self._seq_gaps = [(1, last)]
            return
        selected = [*(f"CAST({name} AS BLOB)" for name in _MESSAGE_COLUMNS[1:5]), "crc"]
        rows = self._old.read_by_rowid("outbox", selected, self._seq_gaps, last)
        messages = (message for row in rows if (message := self._accept_message(row)))
        self._insert("outbox", list(_MESSAGE_COLUMNS), messages)

    def _accept_message(self, row: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seq, *texts, crc = row
        parts = [bytes(part or b"") for part in texts]
        if message_crc(seq, *parts) != crc:
            self._seq_gaps.append((seq, seq))
            return None
        topic, token, time = (part.decode("utf-8", "surrogateescape") for part in (parts[0], parts[2], parts[3]))
        _insert_range(self._seqs, seq, seq)
        return seq, topic, parts[1], token, time, crc

    def _copy_orphaned_rows(self) -> None:
        """Copy chunks and messages that no tree leads to any more, but whose pages are intact."""
        names = schema.columns_of(self._new, "chunks")
        self._new.execute("BEGIN")
        for rowid, values in self._old.read_orphaned_rows():
            if len(values) >= 10 and isinstance(values[6], bytes):
                row = (rowid, *values[1:])
                if len(row) == len(names) and self._accept_chunk(row):
                    sql = f"INSERT OR IGNORE INTO chunks ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
                    self._new.execute(sql, row)
            elif len(values) != 6 or not all(isinstance(part, bytes) for part in values[1:5]):
                continue
            elif not _overlaps(self._seqs, rowid, rowid) and (message := self._accept_message((rowid, *values[1:]))):
                self._new.execute(_INSERT_MESSAGE, message)
        self._new.execute("COMMIT")

    # --- losses ---

    def _lost_seqs(self, acknowledged: retention.AcknowledgedSeqs) -> list[tuple[int, int]]:
        is_known = "meta" not in self._old.incomplete_tables or bool(self._get_meta(retention.ACKNOWLEDGED))
        # Messages before the first stored one may have been acknowledged, if the acknowledged seqs are lost.
        first = 1 if is_known else min((pair[0] for pair in [*self._seqs, *self._seq_gaps]), default=1)
        return missing_ranges([*self._seqs, *acknowledged.ranges], first, self._last_seq())

    def _lost_rows(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        quarantined: dict[int, list[tuple[int, int]]] = {}
        for stream, first, n in self._new.execute("SELECT stream, first_row, n FROM quarantined_rows").fetchall():
            if type(first) is int and type(n) is int and n > 0:
                quarantined.setdefault(stream, []).append((first, first + n - 1))
        for number, name in self._new.execute("SELECT id, name FROM streams").fetchall():
            copied = self._rows.get(number, [])
            last = self._next_rows.get(number, 1) - 1
            # Rows before the first known one may have been used and deleted.
            firsts = [pair[0] for pair in copied[:1]]
            if number in self._first_rows:
                firsts.append(self._first_rows[number])
            unknown = 1 if "chunks" in self._old.incomplete_tables else last + 1
            present = [*copied, *quarantined.get(number, [])]
            yield str(name), missing_ranges(present, min(firsts, default=unknown), last)

    def _last_seq(self) -> int:
        text = self._get_meta("seq")
        return max(int(text) if text.isdecimal() else 0, self._watermark_state.seq if self._watermark_state else 0)

    def _get_meta(self, key: str) -> str:
        return meta.get(self._new, key, "")


def _insert_range(ranges: list[tuple[int, int]], first: int, last: int) -> None:
    """Insert `first` … `last`, which no range holds yet, in order."""
    at = bisect.bisect(ranges, (first, last))
    if at and ranges[at - 1][1] + 1 == first:
        ranges[at - 1] = ranges[at - 1][0], last
    else:
        ranges.insert(at, (first, last))


def _overlaps(ranges: list[tuple[int, int]], first: int, last: int) -> bool:
    at = bisect.bisect(ranges, (first, last))
    return (at > 0 and ranges[at - 1][1] >= first) or (at < len(ranges) and ranges[at][0] <= last)

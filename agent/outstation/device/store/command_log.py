"""Command log: the last counter of each operator key, and the answers to commands.

A command is claimed in a commit of its own before it runs, so that it never runs twice, whatever happens. Its answer is
committed together with its effect: a claimed command without an answer was interrupted by a crash.
"""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from outstation.protocol.wire.messages import CommandPayload


# Sent answers are kept for inspection, and to recognize an id that comes twice.
_RETAINED_ANSWERS = 200


class ClaimedCommand(msgspec.Struct, frozen=True):
    """Command that is about to run; `number` is its place in the log."""

    number: int
    kid: str
    id: str
    name: str
    args: dict[str, str]
    counter: int


class CommandAnswer(msgspec.Struct, frozen=True):
    number: int
    id: str
    name: str
    ok: bool
    summary: str
    data: dict[str, Any]
    correlation: bytes | None
    reply_key: str | None

    def to_body(self) -> dict[str, Any]:
        """Return the members of a `reply` message."""
        return {"id": self.id, "name": self.name, "ok": self.ok, "summary": self.summary, "data": self.data}


class CommandLog:
    """Command log inside a `Transaction`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.has_new_counter = False

    def counters(self) -> dict[str, int]:
        """Return the last counter of each operator key, by kid, whether its command was executed or refused."""
        return {str(kid): int(n) for kid, n in self._db.execute("SELECT kid, counter FROM checked_command_counters")}

    def replace_counter(self, kid: str, counter: int) -> None:
        """Store the last counter of a key, also a lower one."""
        self._db.execute("INSERT OR REPLACE INTO command_counters (kid, counter) VALUES (?, ?)", (kid, counter))
        self.has_new_counter = True

    def claim(self, kid: str, cmd: CommandPayload, correlation: bytes | None) -> ClaimedCommand | None:
        """Claim a command; None if its id or this key's counter was used."""
        id, name, args, counter = cmd.id, cmd.name, cmd.args, cmd.counter
        used = self._db.execute("SELECT 1 FROM checked_command_answers WHERE kid = ? AND id = ?", (kid, id)).fetchone()
        if used or counter <= self.counters().get(kid, 0):
            return None
        self.replace_counter(kid, counter)
        number = self._db.execute(
            "INSERT INTO command_answers (kid, id, name, args, counter, correlation, reply_key) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (kid, id, name, json.dumps(args), counter, correlation, cmd.reply_key),
        ).lastrowid
        oldest = (number or 0) - _RETAINED_ANSWERS
        self._db.execute("DELETE FROM command_answers WHERE number <= ? AND sent = 1", (oldest,))
        return ClaimedCommand(number or 0, kid, id, name, args, counter)

    def unanswered(self) -> list[ClaimedCommand]:
        rows = self._db.execute(
            "SELECT number, kid, id, name, args, counter FROM checked_command_answers "
            "WHERE body IS NULL ORDER BY number"
        )
        return [ClaimedCommand(n, kid, id, name, json.loads(args), counter) for n, kid, id, name, args, counter in rows]

    def record_answer(self, claimed: ClaimedCommand, ok: bool, summary: str, data: dict[str, Any]) -> None:
        body = json.dumps({"ok": ok, "summary": summary, "data": data})
        self._db.execute("UPDATE command_answers SET body = ? WHERE number = ?", (body, claimed.number))

    def unsent(self, after: int) -> list[CommandAnswer]:
        """Return answers behind place `after` that no broker has confirmed."""
        rows = self._db.execute(
            "SELECT number, id, name, body, correlation, reply_key FROM checked_command_answers "
            "WHERE NOT sent AND body IS NOT NULL AND number > ? ORDER BY number LIMIT 50",
            (after,),
        )
        return [
            CommandAnswer(n, id, name, **json.loads(body), correlation=correlation, reply_key=reply_key)
            for n, id, name, body, correlation, reply_key in rows
        ]

    def mark_sent(self, through: int) -> None:
        sql = "UPDATE command_answers SET sent = 1 WHERE number <= ? AND body IS NOT NULL"
        self._db.execute(sql, (through,))

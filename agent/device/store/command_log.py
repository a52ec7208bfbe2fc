"""Commands inside a transaction: the last counter of each key, and what was answered.

A command is claimed before anything of it is done, in a commit of its own, so that whatever happens then it is never
done twice; its answer is committed with its effect. One that was claimed and has no answer was cut off by a crash.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import msgspec

# Answers are kept for a look, and to tell an id that comes twice.
_RETAINED_ANSWERS = 200


class ClaimedCommand(msgspec.Struct, frozen=True):
    """A command that was taken up; `number` is its place in the book."""

    number: int
    kid: str
    id: str
    name: str
    args: dict[str, str]
    counter: int


class CommandAnswer(msgspec.Struct, frozen=True):
    """What a command came to, on its way to the operator."""

    number: int
    id: str
    name: str
    ok: bool
    summary: str
    data: dict[str, Any]
    correlation: bytes | None

    def to_body(self) -> dict[str, Any]:
        """As a `reply` carries it."""
        return {"id": self.id, "name": self.name, "ok": self.ok, "summary": self.summary, "data": self.data}


class CommandLog:
    """Lives inside a `Transaction`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        # Whether a counter moved.
        self.has_new_counter = False

    def counters(self) -> dict[str, int]:
        """The last counter obeyed or refused of each operator key, by kid."""
        return {str(kid): int(n) for kid, n in self._db.execute("SELECT kid, counter FROM commands")}

    def claim(
        self, kid: str, id: str, name: str, args: dict[str, str], counter: int, correlation: bytes | None
    ) -> ClaimedCommand | None:
        """Take a command up; None where this key's counter was used, or its id."""
        used = self._db.execute("SELECT 1 FROM answers WHERE kid = ? AND id = ?", (kid, id)).fetchone()
        if used or counter <= self.counters().get(kid, 0):
            return None
        self._db.execute("INSERT OR REPLACE INTO commands VALUES (?, ?)", (kid, counter))
        self.has_new_counter = True
        number = self._db.execute(
            "INSERT INTO answers (kid, id, name, args, counter, correlation) VALUES (?, ?, ?, ?, ?, ?)",
            (kid, id, name, json.dumps(args), counter, correlation),
        ).lastrowid
        self._db.execute("DELETE FROM answers WHERE number <= ? AND sent = 1", ((number or 0) - _RETAINED_ANSWERS,))
        return ClaimedCommand(number or 0, kid, id, name, args, counter)

    def unanswered(self) -> list[ClaimedCommand]:
        found = self._db.execute(
            "SELECT number, kid, id, name, args, counter FROM answers WHERE body IS NULL ORDER BY number"
        )
        return [
            ClaimedCommand(n, kid, id, name, json.loads(args), counter) for n, kid, id, name, args, counter in found
        ]

    def record_answer(self, claimed: ClaimedCommand, ok: bool, summary: str, data: dict[str, Any]) -> None:
        body = json.dumps({"ok": ok, "summary": summary, "data": data})
        self._db.execute("UPDATE answers SET body = ? WHERE number = ?", (body, claimed.number))

    def unsent(self, after: int) -> list[CommandAnswer]:
        """Answers behind place `after` that no broker has confirmed."""
        found = self._db.execute(
            "SELECT number, id, name, body, correlation FROM answers "
            "WHERE sent = 0 AND body IS NOT NULL AND number > ? ORDER BY number LIMIT 50",
            (after,),
        )
        return [CommandAnswer(n, id, name, **json.loads(body), correlation=c) for n, id, name, body, c in found]

    def mark_sent(self, through: int) -> None:
        self._db.execute("UPDATE answers SET sent = 1 WHERE number <= ? AND body IS NOT NULL", (through,))

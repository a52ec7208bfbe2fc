"""The change feed: two polls of the database a second, whatever the number of browsers that listen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from outstation.fleet.dashboard.state.fleet_state import FleetState
from outstation.fleet.dashboard.state.reader import DatabaseReader
from outstation.fleet.database.interface import Connection
from outstation.foundation.errors import OutstationError

logger = logging.getLogger(__name__)

# A page that changes all the time fetches itself once a second: together they stay below two seconds.
POLL_S = 0.5
MAX_LISTENERS = 200
# A session that was ended gets no event after this time.
PING_S = 15.0
_MAX_NAMED = 50
_END = ""
_REVISIONS = """
    SELECT (SELECT count(*) FROM decisions), (SELECT max(time) FROM decisions),
           (SELECT count(*) FROM alert_handling), (SELECT max(acknowledged_at) FROM alert_handling),
           (SELECT max(muted_at) FROM alert_handling)"""


# Parts of `_REVISIONS` by the name of the change.
_PARTS = {"rollouts": slice(0, 2), "incidents": slice(2, 5)}


class ChangeFeed:
    """Keeps `state` fresh, and tells each listener what changed."""

    def __init__(self, reader: DatabaseReader, state: FleetState) -> None:
        self._reader, self.state = reader, state
        self._listeners: set[asyncio.Queue[str]] = set()
        self._revisions: Any = None
        self._event = "{}"

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(POLL_S)

    async def poll(self) -> None:
        problem, changed = "", set[str]()
        try:
            changed, revisions = await self._reader.read(self._refresh)
        except Exception as error:
            # A cell of another type must not end the poll: every page would look fresh and be old.
            expected = isinstance(error, OutstationError)
            problem = (
                str(error) if expected else f"{type(error).__name__}: {error}; `outstation fleet audit` names damage"
            )
            if not self.state.problem:
                logger.warning("%s", problem, exc_info=None if expected else error)
            # After an outage it may be another database.
            self.state.forget()
        else:
            last = self._revisions or revisions
            changed |= {name for name, part in _PARTS.items() if revisions[part] != last[part]}
            self._revisions = revisions
        if changed or problem != self.state.problem:
            self.state.problem = problem
            named = sorted(changed)[:_MAX_NAMED] if len(changed) <= _MAX_NAMED else ["*"]
            event = {"changed": named, "problem": bool(problem), "read": self.state.read_us // 1000}
            self._send(msgspec.json.encode(event).decode())

    async def listen(self, still_allowed: Callable[[], Awaitable[bool]]) -> AsyncIterator[str]:
        """Yield server-sent events until the visitor may no longer see them."""
        queue: asyncio.Queue[str] = asyncio.Queue(8)
        self._listeners.add(queue)
        loop = asyncio.get_running_loop()
        checked_s = loop.time()
        try:
            yield f"retry: 3000\ndata: {self._event}\n\n"
            while True:
                event = None
                with contextlib.suppress(TimeoutError):
                    event = await asyncio.wait_for(queue.get(), PING_S)
                # Also in a fleet where something changes all the time.
                if loop.time() - checked_s >= PING_S:
                    checked_s = loop.time()
                    if not await still_allowed():
                        return
                if event == _END:
                    return
                yield ": alive\n\n" if event is None else f"data: {event}\n\n"
        finally:
            self._listeners.discard(queue)

    def end(self) -> None:
        """End every stream: the server stops."""
        self._send(_END)

    @property
    def is_full(self) -> bool:
        return len(self._listeners) >= MAX_LISTENERS

    def _refresh(self, db: Connection) -> tuple[set[str], Any]:
        return self.state.refresh(db), tuple(db.execute(_REVISIONS).fetchone())

    def _send(self, event: str) -> None:
        self._event = event
        for queue in self._listeners:
            if queue.full():
                # A slow browser misses events, not the last one.
                queue.get_nowait()
            queue.put_nowait(event)

"""Source of another package: one that fails runs again after a while, and no other stream notices it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from outstation.device.intake.source import Source, SubmitRows
from outstation.device.store.store import Store
from outstation.foundation.backoff import Backoff
from outstation.foundation.errors import StorageError, StorageFull

log = logging.getLogger("outstation.source")

_RESTART_COUNTER = "source restarts"
_RESTART = Backoff(1.0, 60.0)
# A source that ran for this long failed for a new reason.
_STEADY_S = 60.0


class RestartedSource:
    """Source that is built anew after each failure, and so continues at its last committed position."""

    def __init__(self, name: str, build: Callable[[], Source], store: Store) -> None:
        self._name, self._build, self._store = name, build, store
        # A config that the source cannot use ends the start of the daemon.
        self._source: Source | None = build()

    async def run(self, submit_rows: SubmitRows) -> None:
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            begin = loop.time()
            problem = await self._run_once(submit_rows)
            failures = 1 if loop.time() - begin >= _STEADY_S else failures + 1
            delay = _RESTART.draw_s(failures)
            log.warning("%s: its source failed: %s; started again in %.0f s", self._name, problem, delay)
            with contextlib.suppress(StorageFull), self._store.transaction() as tx:
                tx.increment_counter(f"{_RESTART_COUNTER}.{self._name}", 1)
            await asyncio.sleep(delay)

    async def _run_once(self, submit_rows: SubmitRows) -> str:
        """Run the source to its end; return why it ended. Raises StorageError."""
        try:
            source = self._source or self._build()
            self._source = None
            await source.run(submit_rows)
        except StorageError:
            raise
        # Code of another package raises anything.
        except Exception as error:
            log.debug("%s: its source failed", self._name, exc_info=True)
            return f"{type(error).__name__}: {error}"
        return "it ended"

"""Submission queue: what a full store refuses is submitted again in its order, and later blocks wait behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from outstation.device.intake.group_commit import CommitOutcome


class SubmissionQueue:
    """Blocks of the files of one source; each is submitted at once while the store has room."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s, self._lock, self._refused = retry_s, asyncio.Lock(), 0

    async def submit(self, submit: Callable[[], Awaitable[CommitOutcome]]) -> CommitOutcome:
        """Submit a block until the store has room for it."""
        if not self._refused and not (outcome := await submit()).is_store_full:
            return outcome
        self._refused += 1
        try:
            async with self._lock:
                while (outcome := await submit()).is_store_full:
                    await asyncio.sleep(self._retry_s)
                return outcome
        finally:
            self._refused -= 1

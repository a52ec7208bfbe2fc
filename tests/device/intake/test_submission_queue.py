"""Submission queue: the order of blocks while the store is full now and then."""

from __future__ import annotations

import asyncio
from functools import partial

from outstation.device.intake.group_commit import CommitOutcome
from outstation.device.intake.sources.submission_queue import SubmissionQueue


def test_blocks_that_a_full_store_refused_are_stored_in_their_order_before_later_ones() -> None:
    stored: list[int] = []
    attempts = 0

    async def commit(block: int) -> CommitOutcome:
        nonlocal attempts
        attempts += 1
        # Of two blocks in one commit, both are refused; there is room for the third attempt.
        is_full = attempts in (1, 2, 4, 5)
        await asyncio.sleep(0)
        if not is_full:
            stored.append(block)
        return CommitOutcome(1, 0, [], is_store_full=is_full)

    async def submit_all() -> None:
        queue = SubmissionQueue(0.001)
        earlier = [asyncio.create_task(queue.submit(partial(commit, block))) for block in range(2)]
        while attempts < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        later = [asyncio.create_task(queue.submit(partial(commit, block))) for block in range(2, 6)]
        await asyncio.gather(*earlier, *later)
        await queue.submit(partial(commit, 6))

    asyncio.run(submit_all())
    assert stored == [*range(7)]
    assert attempts == 11


def test_a_cancelled_submission_does_not_hold_up_the_next_one() -> None:
    async def submit_all() -> CommitOutcome:
        queue, is_full = SubmissionQueue(0.001), True

        async def commit() -> CommitOutcome:
            await asyncio.sleep(0)
            return CommitOutcome(1, 0, [], is_store_full=is_full)

        first, second = (asyncio.create_task(queue.submit(commit)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        is_full = False
        return await second

    assert not asyncio.run(submit_all()).is_store_full

"""The feed of changes: it outlives hostile rows, and ends with the session of its listener."""

from __future__ import annotations

import asyncio

import pytest

from outstation.fleet.dashboard.state import feed as feeds
from outstation.fleet.dashboard.state.feed import ChangeFeed
from outstation.fleet.dashboard.state.fleet_state import FleetState
from outstation.fleet.dashboard.state.reader import DatabaseReader
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from tests.kit.dashboards import enrolled, health


@pytest.mark.parametrize("name", ["a\0b", "x" * 250, "<b>"])
def test_a_task_with_a_name_that_no_task_has_does_not_stop_the_feed(store: FleetStore, name: str) -> None:
    sender = enrolled(store, "pi-01", 1)
    message = health(sender, tasks={name: {"stream": "watch"}, "exercise": {"stream": "watch"}})
    store.ingest([Arrival(sender.verify(message))], [], clock.now_rfc3339())
    state = FleetState()
    with store.snapshot() as db:
        state.refresh(db)
    assert [task.name for task in state.devices["pi-01"].tasks] == ["exercise"]


def test_a_row_that_cannot_be_read_is_a_problem_and_not_the_end(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        feed = ChangeFeed(reader, FleetState())
        with monkeypatch.context() as patch:
            patch.setattr(FleetState, "refresh", refuse)
            await feed.poll()
            assert feed.state.problem
        await feed.poll()
        assert not feed.state.problem

    def refuse(*_: object) -> set[str]:
        raise OverflowError("a number of a device")

    reader = DatabaseReader(str(store.location))
    asyncio.run(run())
    reader.close()


def test_a_stream_ends_with_its_session_although_the_fleet_never_rests(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "PING_S", 0.3)

    async def run() -> list[str]:
        feed, events = ChangeFeed(reader, FleetState()), list[str]()

        async def still_allowed() -> bool:
            return len(events) < 4

        async def change() -> None:
            while True:
                feed._send("{}")
                await asyncio.sleep(0.02)

        changing = asyncio.create_task(change())
        async with asyncio.timeout(60):
            async for event in feed.listen(still_allowed):
                events.append(event)
        changing.cancel()
        return events

    reader = DatabaseReader(str(store.location))
    assert len(asyncio.run(run())) >= 4
    reader.close()

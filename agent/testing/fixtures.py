"""Pytest fixtures of the test kit. A test session asks for them by `pytest_plugins = ["agent.testing.fixtures"]`.

A test that needs a program which is not installed is skipped; where the variable CI is set it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from agent.testing.broker import MosquittoBroker
from agent.testing.fleet import LocalFleet
from agent.testing.lossy_link import LinkConditions, LossyBroker
from agent.testing.messages import MessageSender
from agent.testing.process import MissingProgram


def _skip_or_fail(missing: MissingProgram) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(str(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    try:
        yield
    except MissingProgram as missing:
        _skip_or_fail(missing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    try:
        yield
    except MissingProgram as missing:
        _skip_or_fail(missing)


@pytest.fixture
def outstation_broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    """Provide a running broker."""
    with MosquittoBroker(tmp_path) as broker:
        yield broker


@pytest.fixture
def outstation_fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    """Provide a fleet whose broker and collector run; `add_device(name)` enrols a device daemon."""
    with LocalFleet(tmp_path) as fleet:
        fleet.broker.start()
        fleet.collector.start()
        yield fleet


@pytest.fixture
def outstation_sender() -> Callable[[str], MessageSender]:
    """Provide `sender(name)`: a simulated device that signs a chained log of messages."""
    return lambda device: MessageSender(device)


@pytest.fixture
def outstation_lossy_broker() -> Callable[..., LossyBroker]:
    """Provide `broker(seed, **conditions)`: a broker in memory whose links misbehave by chance."""
    return lambda seed, **conditions: LossyBroker(seed, LinkConditions(**conditions))

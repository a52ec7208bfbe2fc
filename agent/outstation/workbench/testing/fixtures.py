"""Pytest plugin of the test kit: fixtures of brokers, simulated fleets, collectors and lossy links.

A test session loads it by `pytest_plugins = ["outstation.workbench.testing.fixtures"]` in its `conftest.py`. It has no
entry point: pytest would import `agent` in every session of the environment, also where a project has such a package of
its own.

It imports no kit before a test asks for a fixture. A test that needs a program which is not installed is skipped; where
the variable CI is set it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from outstation.workbench.testing.process import MissingProgram

if TYPE_CHECKING:
    from outstation.workbench.testing.broker import MosquittoBroker
    from outstation.workbench.testing.fleet import LocalFleet
    from outstation.workbench.testing.messages import MessageSender
    from outstation.workbench.testing.simulated_fleet import SimulatedFleet
    from outstation.workbench.testing.simulation.lossy_link import LossyBroker


def _skip_or_fail(missing: MissingProgram) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(str(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    try:
        yield
    except MissingProgram as missing:
        _skip_or_fail(missing)


pytest_runtest_call = pytest_runtest_setup


@pytest.fixture
def outstation_broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    """Provide a running broker."""
    from outstation.workbench.testing.broker import MosquittoBroker

    with MosquittoBroker(tmp_path) as broker:
        yield broker


@pytest.fixture
def outstation_fleet(tmp_path: Path) -> Iterator[Callable[..., SimulatedFleet]]:
    """Provide `fleet(devices=20, scenario=…)`: a simulated fleet on a virtual clock; its audit ends the test.

    The parameters are those of `outstation.workbench.testing.simulated_fleet.SimulatedFleet`, and `audit=False` for a
    test that damages messages on purpose.
    """
    from outstation.workbench.testing.simulated_fleet import SimulatedFleet

    audited: list[SimulatedFleet] = []
    count = 0
    with ExitStack() as stack:

        def make(*, audit: bool = True, **options: Any) -> SimulatedFleet:
            nonlocal count
            count += 1
            folder = tmp_path / f"simulated-{count}"
            fleet = stack.enter_context(closing(SimulatedFleet(folder, **options)))
            if audit:
                audited.append(fleet)
            return fleet

        yield make
        for fleet in audited:
            fleet.verify()


@pytest.fixture
def collector(tmp_path: Path, outstation_broker: MosquittoBroker) -> Iterator[LocalFleet]:
    """Provide a fleet of real processes whose broker and collector run; `add_device(name)` enrols a device daemon.

    The audit ends the test.
    """
    from outstation.workbench.testing.fleet import LocalFleet

    with LocalFleet(tmp_path, mosquitto=outstation_broker) as fleet:
        fleet.collector.start()
        yield fleet
        code, report = fleet.audit()
        assert code == 0, f"the audit fails: {report}"


@pytest.fixture
def outstation_sender() -> Callable[[str], MessageSender]:
    """Provide `sender(name)`: a simulated device that signs a chained log of messages, without code of the device."""
    from outstation.workbench.testing.messages import MessageSender

    return lambda device: MessageSender(device)


@pytest.fixture
def lossy_link() -> Callable[..., LossyBroker]:
    """Provide `broker(seed, **conditions)`: a broker in memory whose links misbehave by chance.

    Raises msgspec.ValidationError for a condition that is unknown, or no probability.
    """
    from outstation.foundation import decoders
    from outstation.workbench.testing.simulation.lossy_link import LinkConditions, LossyBroker

    return lambda seed, **conditions: LossyBroker(seed, decoders.convert(conditions, LinkConditions))

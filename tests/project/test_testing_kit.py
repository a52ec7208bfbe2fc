"""Public test kit: an application's tests get fixtures from one plugin, on real programs."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest

from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.messages import MessageSender
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import MissingProgram, find_program
from outstation.workbench.testing.simulation.lossy_link import LossyBroker


def test_a_broker_carries_a_message(outstation_broker: MosquittoBroker) -> None:
    settings = BrokerConfig(url=outstation_broker.url)
    device, application = Link(settings, "device"), Link(settings, "application", subscribe=["greeting"])
    try:
        device.send(OutgoingMessage("greeting", b"hello", (), False))
        deadline, received = time.monotonic() + 30, list[bytes]()
        while not received and time.monotonic() < deadline:
            device.receive(0.1)
            received += [event.payload for event in application.receive(0.1) if isinstance(event, IncomingMessage)]
    finally:
        device.close()
        application.close()
    assert received == [b"hello"]


def test_a_device_of_a_collectors_fleet_reports_results(collector: LocalFleet) -> None:
    device = collector.add_device("pi-01").add_replay_stream(600, 10_000.0).add_task("exercise")
    device.start_and_wait()
    wait_until("the collector has results", lambda: collector.last_result_row("pi-01") > 0)


def test_a_simulated_device_signs_a_chain(outstation_sender: Callable[[str], MessageSender]) -> None:
    sender = outstation_sender("pi-02")
    first, second = sender.results(3), sender.health()
    assert (first.seq, second.seq) == (1, 2)
    assert sender.verify(second).body.device == "pi-02"


def test_a_lossy_broker_repeats_itself_for_a_seed(lossy_link: Callable[..., LossyBroker]) -> None:
    def deliveries(seed: int) -> list[bytes]:
        broker = lossy_link(seed, loss=0.3, duplication=0.3, delay_s=1.0)
        link = broker.connect(None, "application", subscribe=["#"])
        for number in range(40):
            broker.publish(OutgoingMessage("t", str(number).encode(), (), False))
        broker.advance(2.0)
        return [event.payload for event in link.receive(0.0) if isinstance(event, IncomingMessage)]

    assert deliveries(7) == deliveries(7)
    assert deliveries(7) != deliveries(8)


@pytest.mark.parametrize("wrong", [{"loss": 1.5}, {"delay_s": -1.0}, {"lost": 0.1}])
def test_a_condition_that_is_unknown_or_no_probability_is_refused(
    lossy_link: Callable[..., LossyBroker], wrong: dict[str, float]
) -> None:
    with pytest.raises(msgspec.ValidationError):
        lossy_link(1, **wrong)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(MissingProgram, match="no-such-program is not installed: apt-get install package"):
        find_program("no-such-program", "package")

"""Encryption: a client of the broker records all that a real device publishes, and finds no planted value in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.patience import wait_until
from tests.end_to_end.test_privacy import PATIENTS, Hospital, planted
from tests.kit.commands import audit_fleet, call_outstation

pytestmark = pytest.mark.attack("privacy")

KINDS = {"results", "drift", "quality", "audit", "health", "state", "keys", "reply"}
# The owner lets everything out, so that the collector gets the planted values.
_OPEN = "[privacy]\nmin_count = 1\nvalues_in_logs = true\n"


class Recorder:
    """A client that may subscribe to everything, as the broker's operator can."""

    def __init__(self, url: str) -> None:
        self.messages: list[IncomingMessage] = []
        self._link = Link(BrokerConfig(url=url), "recorder", subscribe=["outstation/#"])
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                for event in self._link.receive(0.2):
                    if isinstance(event, IncomingMessage):
                        self._link.acknowledge(event)
                        self.messages.append(event)
            except LinkDown:
                return

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._link.close()

    def from_device(self) -> Iterator[IncomingMessage]:
        return (m for m in self.messages if m.topic.split("/")[3] not in ("ack", "cmd", "desired"))

    def kinds(self) -> set[str]:
        return {message.topic.split("/")[3] for message in self.messages}


@pytest.mark.parametrize("encrypt", [True, pytest.param(False, marks=pytest.mark.attack("privacy", control=True))])
def test_a_recording_of_all_topics_has_no_planted_value(tmp_path: Path, encrypt: bool) -> None:
    with LocalFleet(tmp_path) as fleet:
        hospital = Hospital(tmp_path, fleet, f"{_OPEN}encrypt = {str(encrypt).lower()}\n")
        recorder = Recorder(fleet.broker.url)
        hospital.feed()
        reply = call_outstation(
            "fleet", "command", "ward-1", "report", "--dir", str(fleet.home), "--wait", "90", "--json"
        )
        assert reply.returncode == 0, reply.stdout + reply.stderr
        code, audit = audit_fleet(fleet.home)
        assert (code, audit["gaps"]) == (0, [])
        wait_until("every kind is recorded", lambda: recorder.kinds() >= KINDS)
        recorder.stop()
        # Retained messages, as a client that comes later gets them.
        later = Recorder(fleet.broker.url)
        hospital.device.stop()
        later.stop()
        sent = [*recorder.from_device(), *later.from_device()]
        recorded = b"\n".join(message.payload + "".join(message.tokens).encode() for message in sent)
        assert {message.sealed for message in sent} == {encrypt}
        # The collector has the values, so they were sent.
        assert planted(hospital.everything()) >= set(PATIENTS)
        assert bool(planted(recorded)) is not encrypt
        for word in (b"ward-1", b'"seq"', b"EdDSA"):
            assert (word in recorded) is not encrypt

"""Command `outstation head`: a device's own signed statement of where its log ends, beside a daemon that writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outstation.device.bootstrap import device
from outstation.device.health import HealthReporter, quote_acknowledgement
from outstation.device.machine.timekeeping import make_clock
from outstation.device.store import retention
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.protocol.documents import log_head
from outstation.protocol.wire import jws, log_chain
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.messages import AcknowledgementRef
from outstation.workbench.testing.messages import new_key
from tests.kit.commands import call_outstation

pytestmark = pytest.mark.attack("history")


class Device:
    def __init__(self, folder: Path) -> None:
        assert call_outstation("init", str(folder), "--id", "pi-07").returncode == 0
        self.file = folder / "outstation.toml"
        file, conf = device.load_config(str(self.file))
        self.store: Store = device.open_store(conf)
        self.log: MessageLog = device.open_message_log(file, conf, self.store)

    def write(self) -> None:
        with self.store.transaction() as tx:
            self.log.append(tx, "health", None, {"streams": {}}, make_clock(self.store)())

    def head(self) -> Any:
        done = call_outstation("head", "-c", str(self.file), "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def acknowledge(self) -> AcknowledgementRef:
        """Store an acknowledgement as the uplink does once it has verified one."""
        seq, digest = self.store.log_head()
        head = {"v": 1, "kind": "ack", "device": "pi-07", "log": self.store.log_id}
        payload = encode({**head, "through": seq, "missing": [], "time": "2026-11-24T22:18:05Z", "digest": digest})
        token = jws.sign(new_key(5), "outstation/home/pi-07/ack", payload)
        with self.store.transaction() as tx:
            tx.set_meta(retention.ACKNOWLEDGEMENT, json.dumps({"payload": payload.decode(), "jws": token}))
        kid = new_key(5).public.kid
        return AcknowledgementRef(kid, self.store.log_id, seq, "2026-11-24T22:18:05Z", digest)


@pytest.fixture
def pi(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path / "pi")
    yield made
    made.store.close()


def test_the_head_is_the_newest_message_of_a_store_that_is_being_written(pi: Device) -> None:
    for seq in range(3):
        statement = pi.head()["head"]
        assert statement["seq"] == seq
        [*_, newest] = [None, *pi.store.unacknowledged_messages(0, 10)]
        assert statement["digest"] == (log_chain.digest(newest.payload) if newest else "")
        pi.write()


def test_the_head_is_signed_by_the_devices_key_and_quotes_the_collector(pi: Device) -> None:
    pi.write()
    quoted = pi.acknowledge()
    document = pi.head()
    head, signer = log_head.verify(json.dumps(document).encode())
    assert (signer.key.kid, signer.key.kid) == (pi.log.key.public.kid, document["thumbprint"])
    assert head.acknowledged == quoted
    assert (head.fleet, head.device, head.log) == ("home", "pi-07", pi.store.log_id)


def test_people_read_the_same_head(pi: Device) -> None:
    pi.write()
    text = call_outstation("head", "-c", str(pi.file)).stdout
    statement = pi.head()["head"]
    assert f"log {statement['log']}" in text
    assert statement["digest"] in text


def test_nothing_is_quoted_before_the_first_acknowledgement(pi: Device) -> None:
    assert quote_acknowledgement(pi.store) is None


def test_a_quoted_acknowledgement_costs_few_bytes(pi: Device) -> None:
    pi.write()
    quoted = pi.acknowledge()
    assert len(encode({"acknowledged": quoted})) < 230


def test_one_health_message_an_hour_quotes_the_acknowledgement(pi: Device) -> None:
    _, conf = device.load_config(str(pi.file))
    seconds = [0.0]
    reading = make_clock(pi.store)()
    reporter = HealthReporter(
        conf, pi.store, pi.log, {}, lambda: msgspec.structs.replace(reading, boot_s=reading.boot_s + seconds[0])
    )
    reporter.write_health()
    pi.acknowledge()
    for seconds[0] in (60, 120, 3000, 3700):
        reporter.write_health()
    written = [json.loads(message.payload) for message in pi.store.unacknowledged_messages(0, 10)]
    assert ["acknowledged" in body for body in written] == [False, True, False, False, True]
    assert written[1]["acknowledged"]["through"] == 1

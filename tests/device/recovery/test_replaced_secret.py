"""Lost `commitment.secret`: the device says in its log that commitments before cannot be proven."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.device.recovery.replaced_secret import report_replaced_secret
from outstation.protocol.wire.messages import AuditPayload
from scripts.kit.bundles import CLASSIFY, activated
from tests.kit.devices import NOW, Device


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path, CLASSIFY, activated(CLASSIFY))
    yield made
    made.store.close()


def events(device: Device) -> list[str]:
    return [message.body.event for message in device.messages() if isinstance(message.body, AuditPayload)]


def report(device: Device, secret: bytes, *, is_lost: bool = False) -> None:
    device.author.secret = secret
    report_replaced_secret(device.store, device.author, NOW, is_lost=is_lost)


def test_a_replaced_secret_is_reported_once_and_the_same_one_never(device: Device) -> None:
    report(device, bytes(32))
    device.restart()
    report(device, bytes(32))
    assert events(device) == []
    report(device, bytes(31) + b"\1")
    device.restart()
    report(device, bytes(31) + b"\1")
    assert events(device) == ["secret replaced"]


def test_a_secret_that_was_lost_before_the_store_knew_it_is_reported(device: Device) -> None:
    report(device, bytes(32), is_lost=True)
    assert events(device) == ["secret replaced"]

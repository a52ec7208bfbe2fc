"""Retained MQTT document of all open alerts, for dashboards and small displays."""

from __future__ import annotations

import secrets
import time

import msgspec

from outstation.foundation.errors import LinkDown
from outstation.integrations.notify.config import MqttTarget
from outstation.integrations.notify.delivery import TIMEOUT_S, SendFailed
from outstation.integrations.notify.message import Notification
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage, PublishReceipt


def check(target: MqttTarget) -> str:
    """Return a line about the target."""
    return f"retained document at {target.topic} on {target.broker.shown_url}"


def send(target: MqttTarget, message: Notification) -> None:
    """Publish the document at QoS 1, retained but for a test, and wait for the receipt. Raises SendFailed."""
    body = msgspec.json.encode(
        {
            "v": 1,
            "fleet": message.fleet,
            "sender": message.sender,
            "time": message.time,
            "open": len(message.alerts) + message.omitted,
            "severity": message.severity if message.alerts else None,
            "alerts": message.alerts,
            "omitted": message.omitted,
        }
    )
    try:
        link = Link(target.broker, f"outstation-notify-{secrets.token_hex(6)}", retains=True, timeout_s=TIMEOUT_S)
        try:
            _publish(link, target, OutgoingMessage(target.topic, body, retain=message.kind == "open"))
        finally:
            # To wait for the broker would delay the outcome, and a stop meanwhile would send the message again.
            link.close(wait_s=0.0)
    except LinkDown as down:
        raise SendFailed(str(down)) from None


def _publish(link: Link, target: MqttTarget, message: OutgoingMessage) -> None:
    token = link.send(message)
    end = time.monotonic() + TIMEOUT_S
    while (left := end - time.monotonic()) > 0:
        for event in link.receive(left):
            if isinstance(event, PublishReceipt) and event.token == token:
                if event.is_accepted:
                    return
                raise SendFailed(f"the broker refuses {target.topic}: {event.reason}; check its access list")
    raise SendFailed(f"{target.broker.shown_url}: no receipt within {TIMEOUT_S:g} s")

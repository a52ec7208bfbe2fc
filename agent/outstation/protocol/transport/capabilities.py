"""Capabilities of a broker by its CONNACK and SUBACK (MQTT 5, 3.2.2.3 and 3.9.3), and sentences on what it lacks.

Each sentence says what is missing, what follows from it, and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from outstation.foundation.errors import LinkDown

SHARED = "$share/"
# For a broker that announces none.
MAX_PACKET = 268_435_455
_RECEIVE_MAXIMUM = 65_535
# Reason codes of CONNACK and SUBACK.
_QOS_NOT_SUPPORTED, _RETAIN_NOT_SUPPORTED = 0x9B, 0x9A
_NOT_AUTHORIZED, _QUOTA_EXCEEDED, _NO_SHARED, _NO_WILDCARDS = 0x87, 0x97, 0x9E, 0xA2

_NO_QOS = (
    "the broker takes messages at QoS 0 only, which it may lose; raise its maximum QoS to 1 (Mosquitto: remove "
    "`max_qos`), or use another broker"
)
_NO_RETAIN = (
    "the broker retains nothing, so nobody learns the state of a device, its keys and its acknowledgements when they "
    "connect later; switch retained messages on (Mosquitto: remove `retain_available false`), or use another broker"
)
_NO_SHARED_SUBSCRIPTIONS = (
    "the broker has no shared subscriptions, so it would deliver nothing to collectors that share messages (RabbitMQ "
    "accepts such a subscription all the same); run one collector without --share, or use a broker that has them, such "
    "as Mosquitto"
)
_NO_WILDCARD_SUBSCRIPTIONS = (
    "the broker takes no subscription with a wildcard, and a collector needs one for the names of its devices; use "
    "another broker"
)
_REFUSED = {
    _NOT_AUTHORIZED: "the broker does not allow it; check its access list",
    _QUOTA_EXCEEDED: "the broker allows no more subscriptions; raise its limit",
    _NO_SHARED: _NO_SHARED_SUBSCRIPTIONS,
    _NO_WILDCARDS: _NO_WILDCARD_SUBSCRIPTIONS,
}


class BrokerUnsuitable(LinkDown):
    """The broker lacks what this connection needs; connecting again changes nothing before it is configured."""


class Capabilities(msgspec.Struct, frozen=True):
    """Properties of a CONNACK, with the values of MQTT 5 for absent ones. `max_packet` in bytes."""

    max_qos: int = 2
    retained: bool = True
    wildcard_subscriptions: bool = True
    shared_subscriptions: bool = True
    max_packet: int = MAX_PACKET
    receive_maximum: int = _RECEIVE_MAXIMUM
    topic_aliases: int = 0

    @classmethod
    def from_properties(cls, properties: object) -> Capabilities:
        """Read paho's properties of a CONNACK."""

        def read(name: str, default: int) -> int:
            value = getattr(properties, name, default)
            return value if isinstance(value, int) else default

        return cls(
            read("MaximumQoS", 2),
            bool(read("RetainAvailable", 1)),
            bool(read("WildcardSubscriptionAvailable", 1)),
            bool(read("SharedSubscriptionAvailable", 1)),
            read("MaximumPacketSize", MAX_PACKET),
            read("ReceiveMaximum", _RECEIVE_MAXIMUM),
            read("TopicAliasMaximum", 0),
        )

    def find_missing(self, filters: Iterable[str] = (), *, retains: bool = False) -> list[str]:
        """Return a sentence for each thing that is missing for these topic filters and, if `retains`, for retaining."""
        wanted = [*filters]
        missing = []
        if self.max_qos < 1:
            missing.append(_NO_QOS)
        if retains and not self.retained:
            missing.append(_NO_RETAIN)
        if not self.shared_subscriptions and any(topic.startswith(SHARED) for topic in wanted):
            missing.append(_NO_SHARED_SUBSCRIPTIONS)
        if not self.wildcard_subscriptions and any({"+", "#"} & {*topic.split("/")} for topic in wanted):
            missing.append(_NO_WILDCARD_SUBSCRIPTIONS)
        return missing


def describe_refused_connection(code: int, reason: str) -> str:
    """Return the words of a CONNACK's reason code, with the way out where the broker lacks something."""
    return {_QOS_NOT_SUPPORTED: _NO_QOS, _RETAIN_NOT_SUPPORTED: _NO_RETAIN}.get(code, f"refused: {reason}")


def describe_refused_subscription(topic: str, code: int, reason: str) -> str:
    """Return why a subscription at QoS 1 is of no use, "" if it was granted; `code` and `reason` of the SUBACK."""
    if code == 0:
        return f"subscription {topic} granted at QoS 0 only, so the broker may lose messages; {_NO_QOS}"
    if code < 0x80:
        return ""
    advice = f": {_REFUSED[code]}" if code in _REFUSED else ""
    return f"subscription {topic} refused: {reason}{advice}"

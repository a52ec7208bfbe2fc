"""Broker of a simulation that is a real one: links with the faults of a scenario over MQTT connections.

It has the members of `LossyBroker` that a simulation uses. The faults are on the client's side of each link.
"""

from __future__ import annotations

import select
from collections.abc import Sequence

from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.workbench.testing.simulation.lossy_link import FaultyNetwork, LinkConditions


class BrokerAir(FaultyNetwork):
    """All links to a broker."""

    def __init__(self, seed: int, conditions: LinkConditions) -> None:
        super().__init__(seed, conditions)
        self._links: dict[str, FaultyLink] = {}
        self._poll = select.poll()
        self._clients: dict[int, str] = {}

    def connect(
        self,
        broker: BrokerConfig,
        client: str,
        *,
        client_id: str = "",
        subscribe: Sequence[str] = (),
        will: OutgoingMessage | None = None,
        session_expiry_s: int = 0,
    ) -> FaultyLink:
        """Connect a client. Raises LinkDown."""
        if client in self.offline or self.happens(self.conditions_of(client).disconnect):
            raise LinkDown("simulated network: no connection")
        link = Link(
            broker, client_id or client, subscribe=subscribe, will=will, session_expiry_s=session_expiry_s, retains=True
        )
        opened = self._links[client] = FaultyLink(self, client, link)
        self._clients[link.fileno()] = client
        self._poll.register(link.fileno(), select.POLLIN)
        # Retained messages may have come with the answer to the subscription.
        self.on_due(client, self.clock_s)
        return opened

    def poll(self, timeout_s: float) -> None:
        """Wait until a link has something to read, at most `timeout_s` of real time."""
        for descriptor, _ in self._poll.poll(timeout_s * 1000):
            self.on_due(self._clients[descriptor], self.clock_s)

    def forget(self, client: str, descriptor: int) -> None:
        """Stop watching a link that is closed."""
        if self._clients.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)
        self._links.pop(client, None)

    def set_offline(self, client: str, *, is_offline: bool) -> None:
        """Cut a client's network, or restore it. The broker publishes its Will."""
        (self.offline.add if is_offline else self.offline.discard)(client)
        if is_offline and client in self._links:
            self._links[client].drop()

    def close(self) -> None:
        for link in [*self._links.values()]:
            link.close()


class FaultyLink:
    """A connection whose messages are lost, repeated and delayed as the conditions of its client say."""

    def __init__(self, air: BrokerAir, client: str, link: Link) -> None:
        self._air, self._client, self._link, self._descriptor = air, client, link, link.fileno()
        self._pending: list[tuple[float, IncomingMessage | PublishReceipt]] = []
        self._repeated: set[int] = set()
        self._lost_count = 0
        self._is_open = True

    @property
    def window(self) -> int:
        return self._link.window

    @property
    def max_packet(self) -> int:
        return self._link.max_packet

    @property
    def traffic_bytes(self) -> int:
        return self._link.traffic_bytes

    def send(self, message: OutgoingMessage) -> int:
        self._require_open()
        conditions = self._air.conditions_of(self._client)
        if self._air.happens(conditions.disconnect):
            self.drop()
            self._require_open()
        if self._air.happens(conditions.silent_refusal):
            return self._lose()
        self._air.published.append(message)
        if self._air.happens(conditions.loss):
            token = self._lose()
            self._hold(PublishReceipt(token, 0, ""))
            return token
        token = self._link.send(message)
        if self._air.happens(conditions.duplication):
            self._repeated.add(self._link.send(message))
        return token

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        self._require_open()
        if self._air.happens(self._air.conditions_of(self._client).disconnect):
            self.drop()
            self._require_open()
        try:
            events = self._link.receive(timeout_s)
        except LinkDown:
            self._end()
            raise
        for event in events:
            if isinstance(event, PublishReceipt) and event.token in self._repeated:
                self._repeated.discard(event.token)
            else:
                self._hold(event)
        ready = sorted((each for each in self._pending if each[0] <= self._air.clock_s), key=lambda each: each[0])
        self._pending = [each for each in self._pending if each[0] > self._air.clock_s]
        return [event for _, event in ready]

    def acknowledge(self, delivery: IncomingMessage) -> None:
        self._link.acknowledge(delivery)

    def wake(self) -> None:
        self._air.on_due(self._client, self._air.clock_s)

    def close(self) -> None:
        self._end()
        self._link.close()

    def drop(self) -> None:
        self._end()
        self._link.drop()

    def _hold(self, event: IncomingMessage | PublishReceipt) -> None:
        due_s = self._air.delivery_time(self._client)
        self._pending.append((due_s, event))
        if due_s > self._air.clock_s:
            self._air.on_due(self._client, due_s)

    def _lose(self) -> int:
        # No token of a message that is sent: these are positive.
        self._lost_count += 1
        return -self._lost_count

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._air.forget(self._client, self._descriptor)

    def _require_open(self) -> None:
        if not self._is_open:
            raise LinkDown("simulated network: connection lost")

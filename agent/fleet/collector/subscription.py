"""What a collector is subscribed to, and as whom."""

from __future__ import annotations

from agent.config import BrokerConfig
from agent.transport.mqtt import Link
from agent.wire import topics

# Of the collectors that share the messages of a fleet.
SHARE_GROUP = "collect"


def topic_filters(fleet: str, *, shared: bool = False) -> list[str]:
    """The topic filters of everything that devices send.

    What is retained goes to each collector: a shared subscription is sent nothing retained, and of two states of a
    device the later one could be stored first.
    """
    base, kinds = f"{topics.ROOT}/{fleet}/+", [kind for kind in topics.KINDS.values() if not kind.to_device]
    logged = [f"{base}/{kind.name}" + ("/+" if kind.per_task else "") for kind in kinds if kind.logged]
    spread = [f"$share/{SHARE_GROUP}/{topic}" for topic in logged] if shared else logged
    return spread + [f"{base}/{kind.name}" for kind in kinds if kind.retained]


def end_session(broker: BrokerConfig, fleet: str, share: str) -> None:
    """End the session of a collector that is not coming back. Raises LinkDown.

    The broker forgets what waits for it: devices send it again, as no collector acknowledges it.
    """
    Link(broker, client_id(fleet, share)).close()


def client_id(fleet: str, share: str | None) -> str:
    return f"outstation-{fleet}-collector" + (f"-{share}" if share else "")

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
    logged = [f"{topics.ROOT}/{fleet}/+/{kind}/+" for kind in sorted(topics.PER_TASK)]
    logged += [f"{topics.ROOT}/{fleet}/+/{kind}" for kind in ("audit", "health")]
    spread = [f"$share/{SHARE_GROUP}/{one}" for one in logged] if shared else logged
    return spread + [f"{topics.ROOT}/{fleet}/+/{kind}" for kind in ("keys", "state")]


def end_session(broker: BrokerConfig, fleet: str, share: str) -> None:
    """End the session of a collector that is not coming back. Raises LinkDown.

    The broker forgets what waits for it: devices send it again, as no collector acknowledges it.
    """
    Link(broker, client_id(fleet, share)).close()


def client_id(fleet: str, share: str | None) -> str:
    return f"outstation-{fleet}-collector" + (f"-{share}" if share else "")

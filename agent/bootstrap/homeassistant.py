"""Home Assistant from one device: the publisher beside its daemon."""

from __future__ import annotations

import contextlib

from agent.config import Config
from agent.device.store.store import Store


def publishing(conf: Config, store: Store) -> contextlib.AbstractContextManager[object]:
    """Publish the device's own messages for Home Assistant meanwhile, if the config asks for it."""
    section = conf.homeassistant
    if section is None or not section.enabled:
        return contextlib.nullcontext()
    from agent.bridge.discovery import Place
    from agent.bridge.publisher import build_publisher
    from agent.device.own_messages import OwnMessages

    device = conf.device.id
    return build_publisher(
        Place(conf.device.fleet, device, section.prefix, section.dashboard),
        section.broker or conf.broker,
        f"{device}-homeassistant",
        lambda: OwnMessages(conf, store),
        max_age_s=section.max_age,
        cleans_up=False,
    )

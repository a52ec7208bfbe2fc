"""Home Assistant from one device: the publisher beside its daemon."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from outstation.device.config import Config
from outstation.device.store.store import Store
from outstation.foundation.errors import StorageBusy
from outstation.ml.performance.labels import VERDICT

if TYPE_CHECKING:
    from outstation.integrations.homeassistant.presses import VerdictSink


def publishing(conf: Config, store: Store) -> contextlib.AbstractContextManager[object]:
    """Publish the device's own messages for Home Assistant meanwhile, if the config asks for it."""
    section = conf.homeassistant
    if section is None or not section.enabled:
        return contextlib.nullcontext()
    from outstation.device.own_messages import OwnMessages
    from outstation.integrations.homeassistant.discovery import Place
    from outstation.integrations.homeassistant.publisher import build_publisher

    device = conf.device.id
    return build_publisher(
        Place(conf.device.fleet, device, section.prefix, section.dashboard),
        section.broker or conf.broker,
        f"{device}-homeassistant",
        lambda: OwnMessages(conf, store),
        max_age_s=section.max_age,
        cleans_up=False,
        store_verdict=_own_verdicts(conf) if section.verdicts else None,
    )


def _own_verdicts(conf: Config) -> VerdictSink:
    """Return a sink that labels results at the device's own intake, with the author that the config names."""
    from outstation.device.machine import secret_file
    from outstation.protocol.client import Client

    section = conf.homeassistant
    assert section is not None
    by = section.verdicts
    token = secret_file.make_token(secret_file.LABEL_KEY.load_or_create(conf.data_dir), by)

    def store(device: str, task: str, row: int, label: str) -> str:
        try:
            client = Client(conf.data_dir / "intake.sock")
            with contextlib.closing(client):
                client.label(task, label, row=row, source=VERDICT, author=(by, token))
                answer = client.flush()
        except ConnectionError as error:
            raise StorageBusy(f"the intake takes no labels now: {error}") from None
        return f"row {row} is not labelled: {answer.rejected[0][1]}" if answer.rejected else f"row {row} is {label}"

    return store

"""Page *models*: versions of each model, who runs them, their documents, and the accuracy that devices report."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from outstation.evidence.format.contents import BundleCard
from outstation.evidence.gather import bundles
from outstation.fleet import config as fleet_config
from outstation.fleet.dashboard.pages.visit import Dashboard, Visit
from outstation.foundation.errors import OutstationError
from outstation.ml.model.bundle import builtin

_REFRESH_S = 60.0
_MAX_DEVICES, _MAX_CARD = 200, 40_000


class Version(msgspec.Struct):
    """A version of a model: its documents, where they are known, and the devices that run it."""

    name: str
    version: str
    digest: str
    devices: list[str] = []
    tasks: set[str] = set()
    card: BundleCard | None = None
    texts: dict[str, str] = {}


class _Documents:
    """Documents of all bundles, read again once a minute, or when a device runs one that is not known."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: tuple[float, frozenset[str], bundles.BundleDocuments] | None = None

    def load(self, dashboard: Dashboard, running: dict[str, int]) -> bundles.BundleDocuments:
        with self._lock:
            digests, now = frozenset(running), time.monotonic()
            if self._read is None or now - self._read[0] > _REFRESH_S or not digests <= self._read[1]:
                config = fleet_config.load(dashboard.folder)
                publishers = [*builtin.publisher_keys(), *fleet_config.load_trusted_keys(config)]
                documents = bundles.gather(dashboard.folder, (), publishers, (), running)
                self._read = (now, digests, documents)
            return self._read[2]


_DOCUMENTS = _Documents()


async def show(visit: Visit) -> Response:
    versions = await _load(visit)
    models: dict[str, list[Version]] = {}
    for version in versions:
        models.setdefault(version.name, []).append(version)
    return visit.render("models.html", title="Models", watch="*", models=models)


async def show_one(visit: Visit) -> Response:
    name = visit.request.path_params["name"]
    versions = [version for version in await _load(visit) if version.name == name]
    if not versions:
        raise HTTPException(404, f"no model {name[:64]!r} is published or runs anywhere")
    return visit.render("model.html", title=name, watch="*", model=name, versions=versions, max_devices=_MAX_DEVICES)


async def _load(visit: Visit) -> list[Version]:
    """Return every version that runs or is published, the newest of each model first."""
    by_digest: dict[str, Version] = {}
    for device in visit.dashboard.state.devices.values():
        for task in device.tasks:
            if task.digest:
                version = by_digest.setdefault(task.digest, Version(task.model, task.version, task.digest))
                version.devices = [*version.devices, device.device]
                version.tasks = version.tasks | {task.name}
    running = {digest: len(version.devices) for digest, version in by_digest.items()}

    def read(_: Any) -> bundles.BundleDocuments:
        return _DOCUMENTS.load(visit.dashboard, running)

    try:
        documents = await visit.dashboard.reader.run_aside(read)
    except OutstationError:
        # Without the fleet's folder the page still says who runs what.
        documents = bundles.BundleDocuments()
    for card in documents.cards:
        version = by_digest.setdefault(card.digest, Version(card.name, card.version, card.digest))
        version.card = card
        paths = {file: f"{card.folder}/{file}" for file in ("MODEL_CARD.md", "DATA_CARD.md")}
        version.texts = {
            file: documents.files[path].decode(errors="replace")[:_MAX_CARD]
            for file, path in paths.items()
            if path in documents.files
        }
    return sorted(by_digest.values(), key=lambda version: (version.name, _version_order(version.version)))


def _version_order(text: str) -> list[tuple[int, str]]:
    """Return a key by which 1.10 comes before 1.9, and words after numbers."""
    return [(-int(part) if part.isdecimal() and len(part) < 10 else 1, part) for part in text.split(".")]

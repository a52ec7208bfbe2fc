"""Devices that are let in as an operator does it, with their files unpacked as on the device."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path
from typing import Any

from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import Enrolment, enrol
from outstation.protocol.documents import enrolment_request
from outstation.protocol.documents.enrolment_request import EnrolmentRequest
from outstation.protocol.wire import keys


def site(folder: Path, device: str) -> Path:
    """Return the folder of a device's files, outside the fleet's folder."""
    return folder.parent / "sites" / folder.name / device


def let_in(config: FleetConfig, folder: Path, device: str, **options: Any) -> Enrolment:
    """Enrol a device with `options` of `enrol`, and unpack its files to `site`."""
    store = FleetStore(Path(config.fleet.db))
    bundle = folder.parent / f"{device}-{time.monotonic_ns()}.tar.gz"
    try:
        done = enrol(folder, config, store, device, bundle=bundle, **options)
    finally:
        store.close()
    with tarfile.open(bundle) as tar:
        tar.extractall(site(folder, device), filter="data")
    return done


def join(home: Path, device: str, fleet: str = "acme", token: str | None = None) -> EnrolmentRequest:
    """Make keys and a request as `outstation request` does."""
    home.mkdir(parents=True, exist_ok=True)
    signing, tls = (keys.generate(home / name, write_public=False) for name in ("device.key", "device-tls.key"))
    return enrolment_request.parse(enrolment_request.build(fleet, device, signing, tls, token))

"""Bundles that the fleet commands publish, fetched by a device over HTTP and from a USB stick."""

from __future__ import annotations

from pathlib import Path

import pytest

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.rollout.fetch.fetcher import FetchedBundle
from outstation.fleet.repository import key_rotation as rotating
from outstation.fleet.repository import mirror as copying
from outstation.fleet.repository import revoke as revoking
from outstation.fleet.repository.publish import PublishResult
from outstation.ml.model.bundle import bundle
from outstation.protocol.wire.desired_state import DesiredBundle
from scripts.kit.bundles import KEY, TABULAR
from tests.kit.repositories import Depot, served, version
from tests.kit.updating import Updating

pytest_plugins = ["tests.kit.repository_fixtures"]

STREAMS = {"watch": StreamConfig(fields=[FieldConfig(name=name) for name in TABULAR])}


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(tmp_path / "fleet").create(roots=2, threshold=2)


def desired(published: PublishResult) -> DesiredBundle:
    metadata = published.target_metadata
    return DesiredBundle("rollout-1", metadata.name, metadata.version, metadata.digest, "all")


def read(fetched: FetchedBundle) -> bundle.Bundle:
    return bundle.read(fetched.path, [KEY.public])


def test_what_a_fleet_publishes_a_device_fetches(tmp_path: Path, depot: Depot, made: Path) -> None:
    root = depot.layout.root_path(1).read_bytes()
    first = desired(depot.publish(made))
    with served(depot.layout.home) as url, Updating(tmp_path / "device", url, root, STREAMS) as device:
        content = read(device.must_fetch(first))
        assert content == bundle.read(made, [KEY.public])
        assert content.digest == first.digest

        # Everything is signed by other keys; the device follows.
        for role in ("timestamp", "snapshot", "targets", "tiny"):
            rotating.rotate(depot.folder, role)
        second = desired(depot.publish(version(tmp_path, made, "2.0.0")))
        assert read(device.must_fetch(second)).manifest.version == "2.0.0"
        assert device.versions["root"] == 4

        revoking.revoke(depot.folder, "tiny", "2.0.0")
        device.must_fail(second, "NoSuchTarget")
        device.must_fetch(first)


def test_a_copy_on_a_stick_is_a_repository_and_an_old_copy_is_none(tmp_path: Path, depot: Depot, made: Path) -> None:
    root = depot.layout.root_path(1).read_bytes()
    first = desired(depot.publish(made))
    copying.copy(depot.folder, tmp_path / "stick")
    copying.copy(depot.folder, tmp_path / "old stick")
    second = desired(depot.publish(version(tmp_path, made, "2.0.0")))
    copying.copy(depot.folder, tmp_path / "stick")
    with Updating(tmp_path / "device", str(tmp_path / "stick" / "repository"), root, STREAMS) as device:
        assert read(device.must_fetch(second)).manifest.version == "2.0.0"
        device.configure(url=str(tmp_path / "old stick" / "repository"))
        device.must_fail(first, "BadVersionNumberError")


def test_a_device_without_the_fields_of_a_bundle_does_not_fetch_it(tmp_path: Path, depot: Depot, made: Path) -> None:
    root = depot.layout.root_path(1).read_bytes()
    wanted = desired(depot.publish(made))
    with Updating(tmp_path / "device", str(depot.layout.home), root) as device:
        assert "it needs field 'a'" in device.must_fail(wanted, "Incompatible").detail

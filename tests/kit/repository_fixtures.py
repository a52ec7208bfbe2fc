"""Fixtures for repositories: an in-memory one with a device that fetches, and a fleet's with its client.

A test module loads them by `pytest_plugins`, and may override them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.protocol.wire.desired_state import DesiredBundle
from scripts.kit.bundles import packed
from tests.kit.repositories import Client, Depot, served
from tests.kit.update_repositories import ARCHIVE, Signed
from tests.kit.update_servers import Web
from tests.kit.updating import Updating


@pytest.fixture
def repository() -> Signed:
    return Signed()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with Web(tmp_path / "web") as server:
        yield server


@pytest.fixture
def device(tmp_path: Path, repository: Signed, web: Web) -> Iterator[Updating]:
    with Updating(tmp_path / "device", web.url, repository.files["1.root.json"]) as made:
        yield made


@pytest.fixture
def archive() -> bytes:
    return ARCHIVE


@pytest.fixture
def wanted(repository: Signed, web: Web, archive: bytes) -> DesiredBundle:
    """Return the archive as `exercise` 1.0.0, signed and on the server."""
    desired = repository.add("exercise", "1.0.0", archive)
    repository.write(web.folder)
    return desired


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle's folder, signed by the tests' publisher."""
    return packed(tmp_path_factory.mktemp("made"))


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(tmp_path / "fleet").create()


@pytest.fixture
def url(depot: Depot) -> Iterator[str]:
    """Return the HTTP address of the fleet's repository."""
    with served(depot.layout.home) as address:
        yield address


@pytest.fixture
def client(tmp_path: Path, depot: Depot, url: str) -> Client:
    return Client(tmp_path / "device", url, depot.layout.root_path(1).read_bytes())

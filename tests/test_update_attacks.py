"""What a hostile repository, or somebody on the way to it, tries: each attack is refused by name and harms nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.update_repositories import Signed
from tests.update_servers import Web
from tests.updating import Updating, sha256

ARCHIVE = bytes(range(256)) * 1024


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


def test_a_signed_bundle_arrives(repository: Signed, web: Web, device: Updating) -> None:
    wanted = repository.add("exercise", "1.0.0", ARCHIVE)
    repository.write(web.folder)
    found = device.must_fetch(wanted)
    assert found.path.read_bytes() == ARCHIVE
    assert found.path.name == f"{sha256(ARCHIVE)}.zip"
    assert device.versions == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2, "exercise": 1}
    report = device.fetcher.report(device.now())
    assert report is not None
    assert report["freshness"] == "fresh"

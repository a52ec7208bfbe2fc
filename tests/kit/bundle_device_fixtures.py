"""Fixtures of a device whose bundle tests exchange, and of the bundles.

A plugin of one module serves all modules, so these names are unlike those of `repository_fixtures`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.bundle_devices import Device, versions


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return versions(tmp_path_factory.mktemp("bundles"), "1", "2", "3")


@pytest.fixture
def bundle_device(tmp_path: Path, bundles: dict[str, Path]) -> Iterator[Device]:
    made = Device(tmp_path, bundles)
    yield made
    made.store.close()

"""Device with a model of three outputs and a joined stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.ml.model.bundle.bundle import Bundle
from tests.kit import multi_output_device
from tests.kit.devices import Device


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return multi_output_device.pack_bundle(tmp_path_factory.mktemp("joined"))


@pytest.fixture
def outputs_device(tmp_path: Path, packed: Bundle) -> Iterator[Device]:
    made = multi_output_device.make_device(tmp_path / "store", packed)
    yield made
    made.store.close()

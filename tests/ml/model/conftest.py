"""A packed bundle, and a copy of it to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.kit.bundles import packed


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A bundle folder to spoil."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))

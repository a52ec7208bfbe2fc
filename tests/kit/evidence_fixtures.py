"""Fixtures for tests that alter an evidence folder: a valid folder and a copy of it; load by `pytest_plugins`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kit.evidences import Story, build_story
from tests.kit.received_evidence import OPERATOR


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    story: Story = build_story(tmp_path_factory.mktemp("story") / "acme")
    OPERATOR["key"] = story.operator
    out = tmp_path_factory.mktemp("evidence") / "out"
    story.make(out)
    story.store.close()
    return out


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "received"))

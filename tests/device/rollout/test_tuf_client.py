"""Metadata of any bytes, signed or not, are refused by name: they end neither the child nor what is on the disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.device.rollout.fetch import tuf_client
from outstation.device.rollout.fetch.transport import FileStream, RemoteFileMissing
from outstation.device.rollout.fetch.version_floors import VersionFloor
from outstation.foundation.errors import FetchFailed
from tests.kit.update_repositories import Signed, forged

REPOSITORY = Signed()
WANTED = REPOSITORY.add("exercise", "1.0.0", b"an archive")
PATH = f"exercise/1.0.0/{WANTED.digest[7:23]}.zip"
ROOT = REPOSITORY.files["1.root.json"]
NAMES = ("timestamp.json", "2.snapshot.json", "2.targets.json", "1.exercise.json")
KEYS = dict(zip(NAMES, ("timestamp", "snapshot", "targets", "exercise"), strict=True))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


class InMemory:
    """A source of these files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def read(self, name: str, offset: int = 0) -> FileStream:
        data = self._files.get(name.removeprefix("metadata/"))
        if data is None:
            raise RemoteFileMissing(name)
        return FileStream(0, iter([data]))


def looked(files: dict[str, bytes]) -> dict[str, VersionFloor]:
    """Return the floors of the trusted metadata. Raises FetchFailed."""
    with tempfile.TemporaryDirectory() as work:
        look = tuf_client.TufClient(ROOT, Path(work), InMemory(files), REPOSITORY.now.timestamp())
        look.refresh()
        look.find_target(PATH)
        return look.observed_floors()


def changed(**files: bytes) -> dict[str, bytes]:
    return REPOSITORY.files | files


def test_unchanged_metadata_are_trusted() -> None:
    assert list(looked(REPOSITORY.files)) == ["root", "timestamp", "snapshot", "targets", "exercise"]


@given(st.sampled_from(NAMES), st.binary(max_size=100))
@settings(max_examples=50)
def test_arbitrary_bytes_as_metadata_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(FetchFailed):
        looked(changed(**{name: data}))


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=100)
def test_metadata_with_a_changed_byte_are_refused_or_equal(name: str, data: st.DataObject) -> None:
    content = bytearray(REPOSITORY.files[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        result = looked(changed(**{name: bytes(content)}))
    except FetchFailed:
        return
    assert result == looked(REPOSITORY.files)


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=100)
def test_metadata_signed_with_a_stolen_key_are_refused_or_trusted(name: str, data: st.DataObject) -> None:
    """Any member replaced by anything, and rightly signed: whatever comes of it, it is no error that nobody foresaw."""
    document: dict[str, Any] = json.loads(REPOSITORY.files[name])["signed"]
    document[data.draw(st.sampled_from(sorted(document)))] = data.draw(JSON)
    if data.draw(st.booleans()):
        document[data.draw(st.text(max_size=8))] = data.draw(JSON)
    try:
        result = looked(changed(**{name: forged(document, REPOSITORY.keys[KEYS[name]])}))
    except FetchFailed as failure:
        assert failure.error.isidentifier(), failure  # noqa: PT017
        return
    assert all(floor.version > 0 for floor in result.values())


# --- the copy that is worked in ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "updates" / "anchor").mkdir(parents=True)
    (tmp_path / "updates" / "anchor" / "timestamp.json").write_text("old")
    return tmp_path / "updates" / "anchor"


def test_an_uncommitted_working_copy_changes_nothing(folder: Path) -> None:
    with tuf_client.working_copy(folder) as work:
        assert (work / "timestamp.json").read_text() == "old"
        (work / "timestamp.json").write_text("new")
    assert (folder / "timestamp.json").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["anchor"]


def test_a_committed_working_copy_replaces_the_folder(folder: Path) -> None:
    with tuf_client.working_copy(folder) as work:
        (work / "timestamp.json").write_text("new")
        (work / "root_history").mkdir()
        (work / "root.json").symlink_to("root_history/1.root.json")
        tuf_client.commit_working_copy(folder)
    assert (folder / "timestamp.json").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["anchor"]


def test_a_power_cut_between_the_two_renames_is_repaired(folder: Path) -> None:
    folder.rename(folder.with_name("anchor.old"))
    shutil.copytree(folder.with_name("anchor.old"), folder.with_name("anchor.new"))
    with tuf_client.working_copy(folder) as work:
        assert (work / "timestamp.json").read_text() == "old"
    assert [path.name for path in folder.parent.iterdir()] == ["anchor"]

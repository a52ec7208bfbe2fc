"""Bundles: every byte is covered by a publisher's signature, and nothing but a whole bundle is ever returned."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.protocol.wire import jws
from outstation.workbench.authoring import pack
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import KEY, archive, change_manifest, resign, write_spec
from tests.kit.damage import flips

FOREIGN = new_key(12)


def read(path: Path) -> Bundle:
    return bundle.read(path, [KEY.public])


def refused(path: Path) -> str:
    """Why; and what the reason says begins with the path."""
    with pytest.raises(BadBundle) as problem:
        read(path)
    assert str(problem.value).startswith(f"{path}: ")
    return str(problem.value)


# --- whole bundles ---


def test_a_folder_and_its_zip_are_the_same_bundle(folder: Path) -> None:
    first, other = read(folder), read(archive(folder))
    assert first == other
    assert first.signer == KEY.public.kid
    assert first.manifest.name == "tiny"
    assert first.files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_one_of_several_publishers_is_enough_and_is_named(folder: Path) -> None:
    assert bundle.read(folder, [FOREIGN.public, KEY.public]).signer == KEY.public.kid


def test_what_was_read_does_not_change_with_the_files(folder: Path) -> None:
    result = read(folder)
    before = dict(result.files)
    (folder / "model.tflite").write_bytes(b"other")
    assert result.files == before


def test_unicode_in_cards_and_labels_is_preserved(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    (tmp_path / "CARD.md").write_text("# Übung 運動 🏋\n", encoding="utf-8")
    spec.write_text(spec.read_text().replace('"left"', '"ruhig 静か"'), encoding="utf-8")
    pack.write_bundle(pack.pack(spec, KEY), tmp_path / "bündel")
    result = read(tmp_path / "bündel")
    assert result.manifest.output.labels[0] == "ruhig 静か"
    assert result.files["MODEL_CARD.md"].decode() == "# Übung 運動 🏋\n"


def test_an_empty_card_is_a_card(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    (tmp_path / "CARD.md").write_bytes(b"")
    pack.write_bundle(pack.pack(spec, KEY), tmp_path / "out")
    assert read(tmp_path / "out").files["MODEL_CARD.md"] == b""


def test_the_shipped_bundle_is_signed_by_the_shipped_key() -> None:
    content = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    assert content.manifest.name == "exercise"


# --- damage ---

ALL = ["manifest.json", "manifest.jws", "model.tflite", "reference.json", "golden.npz", "MODEL_CARD.md", "DATA_CARD.md"]


def test_the_files_that_are_spoiled_below_are_all_there_are(original: Path) -> None:
    assert {file.name for file in original.iterdir()} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: b"", id="emptied"),
        pytest.param(lambda data: data[:-2], id="cut by two bytes"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut in half"),
        pytest.param(lambda data: b"\x00" + data, id="a byte in front"),
        pytest.param(lambda data: data + b"x", id="a byte after"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: bytes([data[0] ^ 1]) + data[1:], id="first bit changed"),
        pytest.param(lambda data: data[:-2] + bytes([data[-2] ^ 0x80]) + data[-1:], id="a late bit changed"),
    ],
)
def test_an_altered_file_is_refused(folder: Path, name: str, spoil: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    why = "the manifest is not signed by any" if name.startswith("manifest") else f"{name} was altered"
    assert why in refused(folder)


def test_white_space_around_the_signature_is_not_part_of_it(folder: Path) -> None:
    (folder / "manifest.jws").write_bytes(b" \r\n" + (folder / "manifest.jws").read_bytes().strip())
    assert read(folder).signer == KEY.public.kid


def test_a_bit_changed_anywhere_in_the_manifest_is_refused(original: Path) -> None:
    head, token = (original / "manifest.json").read_bytes(), (original / "manifest.jws").read_bytes()
    for changed in islice(flips(head), 0, None, 7):
        with pytest.raises(BadBundle, match="bad signature"):
            bundle._check_signature(original, changed, token, [KEY.public])


def test_an_extra_file_is_refused(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")
    assert "'notes.txt' is not listed in the manifest; remove it" in refused(folder)


def test_a_file_the_manifest_lists_but_is_not_there_is_refused(folder: Path) -> None:
    change_manifest(folder, lambda head: head["files"].update({"more.bin": "sha256:" + "0" * 64}))
    assert "'more.bin' is listed in the manifest but missing" in refused(folder)


def test_a_link_is_refused_even_to_the_right_bytes(folder: Path, original: Path) -> None:
    (folder / "model.tflite").unlink()
    (folder / "model.tflite").symlink_to(original / "model.tflite")
    assert "'model.tflite' is not a regular file" in refused(folder)


def test_a_folder_inside_and_a_pipe_are_refused(folder: Path) -> None:
    (folder / "more").mkdir()
    assert "'more' is not a regular file" in refused(folder)
    (folder / "more").rmdir()
    os.mkfifo(folder / "more")
    assert "'more' is not a regular file" in refused(folder)


def test_a_missing_folder_an_empty_one_and_no_bundle_differ(tmp_path: Path) -> None:
    assert "no such bundle" in refused(tmp_path / "nothing")
    assert "has no manifest.json; is this a bundle" in refused(tmp_path)
    (tmp_path / "empty.zip").write_bytes(b"")
    assert "is no bundle, which is a folder or a .zip" in refused(tmp_path / "empty.zip")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    (tmp_path / "empty.zip").unlink()
    assert "has no model.tflite" in refused(tmp_path)


def test_more_files_than_a_bundle_has_are_refused(folder: Path) -> None:
    for number in range(40):
        (folder / f"{number}.md").touch()
    assert "47 files, a bundle has at most 32" in refused(folder)


def test_files_that_are_too_large_together_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(file.stat().st_size for file in folder.iterdir())
    zipped = archive(folder, method=zipfile.ZIP_STORED)
    monkeypatch.setattr(bundle, "MAX_BYTES", zipped.stat().st_size)
    assert read(folder) == read(zipped)
    monkeypatch.setattr(bundle, "MAX_BYTES", whole - 1)
    assert "larger than" in refused(folder)
    assert "larger than" in refused(zipped)


# --- signatures ---


def test_a_bundle_without_a_signature_is_refused_and_says_how_to_sign(folder: Path) -> None:
    (folder / "manifest.jws").unlink()
    assert "not signed (no manifest.jws); sign it with `outstation model sign`" in refused(folder)


def test_a_foreign_key_is_refused_and_says_where_trust_comes_from(folder: Path) -> None:
    resign(folder, FOREIGN)
    assert f"unknown key: kid '{FOREIGN.public.kid}'" in refused(folder)
    assert "[publishers] keys" in refused(folder)


def test_no_bundle_is_trusted_where_nobody_is(folder: Path) -> None:
    with pytest.raises(BadBundle, match="not signed by any of the 0 trusted publisher keys"):
        bundle.read(folder, [])


@pytest.mark.parametrize("topic", ["outstation/acme/pi-07/health", "bundle/", "Bundle", "", "cmd"])
def test_a_signature_made_for_a_message_is_none_of_a_bundle(folder: Path, topic: str) -> None:
    token = jws.sign(KEY, topic, (folder / "manifest.json").read_bytes())
    (folder / "manifest.jws").write_text(token)
    assert "other topic" in refused(folder)


def test_the_signature_of_an_older_version_is_refused(folder: Path) -> None:
    before = (folder / "manifest.jws").read_bytes()
    change_manifest(folder, lambda head: head.update(version="1.0.1"))
    (folder / "manifest.jws").write_bytes(before)
    assert "bad signature" in refused(folder)


def test_without_publishers_hashes_are_checked_and_the_signer_is_a_claim(folder: Path) -> None:
    resign(folder, FOREIGN)
    assert bundle.read(folder, None).signer == FOREIGN.public.kid
    (folder / "manifest.jws").write_bytes(b"\xff nothing of the kind")
    assert bundle.read(folder, None).signer == ""
    (folder / "manifest.jws").unlink()
    assert bundle.read(folder, None).signer == ""
    (folder / "DATA_CARD.md").write_text("changed")
    with pytest.raises(BadBundle, match=r"DATA_CARD\.md was altered"):
        bundle.read(folder, None)


# --- zip files ---


def rezip(folder: Path, change: Callable[[zipfile.ZipFile], None]) -> Path:
    path = archive(folder)
    with zipfile.ZipFile(path, "a") as out:
        change(out)
    return path


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "sub/model.tflite", "..", "a\\b", "C:\\x", "sub/", ".hidden", "./x", "manifest.json/.."],
)
def test_a_zip_member_with_a_path_is_refused(folder: Path, name: str) -> None:
    path = rezip(folder, lambda out: out.writestr(zipfile.ZipInfo(name), b""))
    assert "is not a plain file name" in refused(path)


def test_a_zip_of_the_folder_itself_says_what_to_zip(folder: Path) -> None:
    path = Path(shutil.make_archive(str(folder.parent / "whole"), "zip", folder.parent, folder.name))
    assert "zip the files of the folder, not the folder" in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(folder: Path) -> None:
    path = rezip(folder, lambda out: out.writestr("model.tflite", b"the other one"))
    assert "a file is in the archive twice" in refused(path)


def test_a_zip_member_that_is_a_link_is_no_way_out(folder: Path) -> None:
    def link(out: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        out.writestr(info, "/etc/passwd")

    assert "'link' is a link or device" in refused(rezip(folder, link))


def test_a_zip_bomb_is_ended_at_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_BYTES", 1 << 20)
    path = rezip(folder, lambda out: out.writestr("A", bytes(64 << 20), zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 20
    assert "larger than" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_compressed_in_a_way_that_has_no_limit_is_refused(folder: Path, method: int) -> None:
    assert "has an unsupported compression" in refused(archive(folder, method=method))


def test_an_encrypted_zip_is_refused(folder: Path) -> None:
    data = bytearray(archive(folder).read_bytes())
    at = data.index(b"PK\x01\x02") + 8
    data[at] |= 1
    data[6] |= 1
    (folder.parent / "locked.zip").write_bytes(data)
    assert "cannot be read" in refused(folder.parent / "locked.zip")


def test_a_zip_cut_anywhere_is_refused(folder: Path) -> None:
    data = archive(folder).read_bytes()
    cut = folder.parent / "cut.zip"
    for length in range(0, len(data), 97):
        cut.write_bytes(data[:length])
        assert refused(cut)


@given(data=st.data())
def test_a_zip_with_a_byte_changed_is_the_same_bundle_or_refused(original: Path, data: st.DataObject) -> None:
    whole = read(original)
    path = original.parent / "changed.zip"
    content = bytearray(archive(original).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        outcome = read(path) == whole
    except BadBundle:
        outcome = True
    assert outcome


@given(st.binary(max_size=200))
def test_any_bytes_for_a_zip_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.zip"
    path.write_bytes(data)
    assert refused(path)


@given(data=st.data())
def test_a_folder_with_changed_bytes_is_refused_or_the_same_bundle(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = read(original)
    path = Path(shutil.copytree(original, tmp_path_factory.getbasetemp() / "damaged", dirs_exist_ok=True))
    file = path / data.draw(st.sampled_from(sorted(p.name for p in original.iterdir())))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(data.draw(st.sampled_from([bytes(content), b"", bytes(content) * 2])))
    try:
        outcome = read(path).files["manifest.json"] == whole.files["manifest.json"]
    except BadBundle as problem:
        outcome = str(problem).startswith(f"{path}: ")
    assert outcome

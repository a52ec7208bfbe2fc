"""Attacks of a hostile repository or a man in the middle: each is rejected by name and harms nothing."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from outstation.device.rollout.fetch import version_floors as floors
from outstation.device.rollout.fetch.fetcher import FetchedBundle
from outstation.device.rollout.fetch.version_floors import VersionFloors
from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle import bundle
from outstation.protocol.wire import root_metadata
from outstation.protocol.wire.desired_state import DesiredBundle
from scripts.kit.bundles import KEY, packed
from tests.kit.update_repositories import ARCHIVE, Signed, forged
from tests.kit.update_servers import Handler, Trick, Web
from tests.kit.updating import Updating

pytestmark = pytest.mark.attack("updates")

pytest_plugins = ["tests.kit.repository_fixtures"]

OTHER = ARCHIVE[::-1]
DAY_US = 86_400_000_000
YEAR_2040_US = 2_208_988_800_000_000
MANY = 2**31 - 1


@pytest.fixture
def publish(repository: Signed, web: Web) -> Callable[..., DesiredBundle]:
    """Sign an archive as a version, and put all on the server."""

    def put(version: str, archive: bytes = ARCHIVE, **metadata: object) -> DesiredBundle:
        wanted = repository.add("exercise", version, archive, **metadata)
        repository.write(web.folder)
        return wanted

    return put


Publish = Callable[..., DesiredBundle]


def requested_archives(web: Web) -> list[str]:
    return [path for path, _ in web.requests if path.startswith("/targets/")]


def test_without_an_attack_a_bundle_arrives(publish: Publish, device: Updating) -> None:
    fetched = device.must_fetch(publish("1.0.0"))
    assert fetched.path.read_bytes() == ARCHIVE
    assert device.versions == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2, "exercise": 1}


# --- arbitrary install ---


def test_arbitrary_install_from_a_repository_of_somebody_else(publish: Publish, web: Web, device: Updating) -> None:
    device.must_fetch(publish("1.0.0"))
    foreign = Signed()
    wanted = foreign.add("exercise", "6.6.6", OTHER)
    foreign.write(web.folder)
    device.must_fail(wanted, "UnsignedMetadataError")
    assert not any("6.6.6" in path for path in requested_archives(web))


@pytest.mark.attack("updates", control=True)
def test_a_device_that_takes_its_first_root_from_the_server_installs_what_a_foreign_repository_offers(
    web: Web, tmp_path: Path
) -> None:
    foreign = Signed()
    wanted = foreign.add("exercise", "6.6.6", OTHER)
    foreign.write(web.folder)
    root = (web.folder / "metadata" / "1.root.json").read_bytes()
    with Updating(tmp_path / "trusting", web.url, root) as trusting:
        assert trusting.must_fetch(wanted).path.read_bytes() == OTHER


def test_arbitrary_install_of_another_archive_under_a_signed_name(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    web.tricks.append(("/targets/", lambda it: it.answer(OTHER)))
    device.must_fail(wanted, "LengthOrHashMismatchError")
    assert device.fetched == []
    web.tricks.clear()
    device.must_fetch(wanted)


def test_arbitrary_install_of_another_bundle_than_the_operator_desires(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    """A signer of archives cannot replace the bundle that an operator signed."""
    wanted = publish("1.0.0")
    [target] = repository.bundles["exercise"].targets.values()
    target.unrecognized_fields["custom"]["outstation"]["digest"] = f"sha256:{'6' * 64}"
    repository.sign_bundle("exercise")
    repository.sign()
    repository.write(web.folder)
    assert "another bundle" in device.must_fail(wanted, "Incompatible").detail
    assert requested_archives(web) == []


def test_arbitrary_install_by_the_role_of_another_bundle(repository: Signed, web: Web, device: Updating) -> None:
    """The key of one bundle signs nothing for another."""
    repository.add("solar", "1.0.0", OTHER)
    stolen = repository.add("exercise", "1.0.0", ARCHIVE)
    repository.bundles["solar"].targets |= repository.bundles["exercise"].targets
    repository.bundles["exercise"].targets = {}
    repository.sign_bundle("solar")
    repository.sign_bundle("exercise")
    repository.sign()
    repository.write(web.folder)
    device.must_fail(stolen, "NoSuchTarget")


# --- rollback ---


def test_rollback_to_an_older_copy_of_the_repository(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    first = publish("1.0.0")
    older = repository.copy()
    device.must_fetch(publish("2.0.0", OTHER))
    older.write(web.folder)
    device.must_fail(first, "BadVersionNumberError")
    assert device.versions["timestamp"] == 3


@pytest.mark.parametrize("left", [0, 100])
def test_truncated_local_metadata_and_then_an_older_copy_of_the_repository(
    repository: Signed, publish: Publish, web: Web, device: Updating, left: int
) -> None:
    """python-tuf takes damaged local metadata for none, and would go back: the floors in the store hold."""
    first = publish("1.0.0")
    older = repository.copy()
    device.must_fetch(publish("2.0.0", OTHER))
    older.write(web.folder)
    for path in (device.data / "updates").rglob("*.json"):
        os.truncate(path, left)
    failure = device.must_fail(first, "BadVersionNumberError")
    assert "this device has seen 3" in failure.detail
    assert device.versions["timestamp"] == 3
    repository.write(web.folder)
    device.must_fetch(first)


@pytest.mark.attack("updates", control=True)
def test_a_device_without_floors_in_its_store_rolls_back_once_its_local_metadata_are_damaged(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    first = publish("1.0.0")
    older = repository.copy()
    device.must_fetch(publish("2.0.0", OTHER))
    older.write(web.folder)
    for path in (device.data / "updates").rglob("*.json"):
        path.unlink()
    with device.store.transaction() as tx:
        floors.save(tx, VersionFloors())
    assert device.must_fetch(first).path.read_bytes() == ARCHIVE
    assert device.versions["timestamp"] == 2


def test_rollback_of_a_root_that_revoked_a_key(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    """Local metadata are gone and the server shows only the first root: its keys are revoked all the same."""
    first = publish("1.0.0")
    older = repository.copy()
    repository.rotate("timestamp")
    repository.sign()
    device.must_fetch(publish("2.0.0", OTHER))
    anchor = root_metadata.hash_anchor((device.folder / "root.json").read_bytes())
    stored = device.data / "updates" / root_metadata.root_history_file(anchor, 2)
    assert root_metadata.read_version(stored.read_bytes()) == 2, "the daemon reads trust documents there"
    older.write(web.folder)
    (web.folder / "metadata" / "2.root.json").unlink()
    for path in sorted((device.data / "updates").rglob("*.json")):
        path.unlink()
    assert "root has version 1" in device.must_fail(first, "BadVersionNumberError").detail


# --- freeze ---


def test_freeze_at_an_old_state_ends_when_that_expires(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    device.must_fetch(wanted)
    device.wall_us = device.now().wall_us + 15 * DAY_US
    device.must_fail(wanted, "ExpiredMetadataError")
    report = device.fetcher.report(device.now())
    assert report is not None
    assert report["freshness"] == "expired"
    assert report["error"] == "ExpiredMetadataError"


# --- fast-forward ---


def test_fast_forward_and_its_recovery_by_other_keys(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    wanted = publish("1.0.0")
    thief = repository.copy()
    thief.snapshot.version = thief.timestamp.version = MANY - 1
    thief.sign()
    thief.write(web.folder)
    device.must_fetch(wanted)
    assert device.versions["timestamp"] == device.versions["snapshot"] == MANY

    later = publish("2.0.0", OTHER)
    device.must_fail(later, "BadVersionNumberError")
    repository.rotate("timestamp")
    repository.sign()
    repository.write(web.folder)
    device.must_fail(later, "BadVersionNumberError")
    repository.rotate("snapshot")
    repository.sign()
    repository.write(web.folder)
    device.must_fetch(later)
    assert device.versions["timestamp"] == repository.timestamp.version
    assert device.versions["snapshot"] == repository.snapshot.version


def test_fast_forward_beyond_what_can_be_counted(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    wanted = publish("1.0.0")
    document = json.loads(repository.files["timestamp.json"])["signed"] | {"version": 2**80}
    (web.folder / "metadata" / "timestamp.json").write_bytes(forged(document, repository.keys["timestamp"]))
    device.must_fail(wanted, "RepositoryError")
    repository.sign()
    repository.write(web.folder)
    device.must_fail(wanted, "BadVersionNumberError")
    repository.rotate("timestamp")
    repository.sign()
    repository.write(web.folder)
    device.must_fetch(wanted)


# --- mix-and-match ---


def test_mix_and_match_of_a_new_timestamp_with_an_old_snapshot(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    device.must_fetch(publish("1.0.0"))
    old = repository.files["2.snapshot.json"]
    later = publish("2.0.0", OTHER)
    web.tricks.append(("/3.snapshot.json", lambda it: it.answer(old)))
    device.must_fail(later, "BadVersionNumberError")


def test_mix_and_match_of_a_new_snapshot_with_an_old_bundle_role(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    first = publish("1.0.0")
    device.must_fetch(first)
    old = repository.files["1.exercise.json"]
    publish("2.0.0", OTHER)
    web.tricks.append(("/2.exercise.json", lambda it: it.answer(old)))
    device.must_fail(first, "BadVersionNumberError")


# --- endless data, slow drip ---


@pytest.mark.parametrize("file", ["2.root", "timestamp", "2.snapshot", "2.targets", "1.exercise"])
def test_endless_data_for_metadata(publish: Publish, web: Web, device: Updating, file: str) -> None:
    wanted = publish("1.0.0")
    web.tricks.append((f"/metadata/{file}.json", Handler.endless))
    device.must_fail(wanted, "DownloadLengthMismatchError")


def test_endless_data_for_an_archive(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    web.tricks.append(("/targets/", Handler.endless))
    device.must_fail(wanted, "DownloadLengthMismatchError")
    assert device.fetched == []


def test_endless_data_by_a_signed_length(publish: Publish, web: Web, device: Updating) -> None:
    device.configure(max_size=len(ARCHIVE) - 1)
    device.must_fail(publish("1.0.0"), "TooLarge")
    assert requested_archives(web) == []


def test_endless_nesting_in_metadata(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    web.tricks.append(("/timestamp.json", lambda it: it.answer(b"[" * 16_000)))
    device.must_fail(wanted, "RepositoryError")


@pytest.mark.parametrize("file", ["/metadata/timestamp.json", "/targets/"])
@pytest.mark.parametrize("trick", [Handler.drip, Handler.drip_headers])
def test_slow_drip(publish: Publish, web: Web, device: Updating, file: str, trick: Trick) -> None:
    wanted = publish("1.0.0")
    web.tricks.append((file, trick))
    device.patience_s = 0.4
    device.restart()
    device.must_fail(wanted, "SlowRetrievalError")


# --- wrong device class ---


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"fields": ["ax", "gx"]}, "needs field 'gx'"),
        ({"agent": "99.0.0"}, "needs agent 99.0.0 or newer"),
        ({"runtimes": ["other-runtime"]}, "no golden vectors for this runtime"),
        ({"memory": 1 << 50}, "of memory"),
        ({"unpacked": 1 << 50}, "of disk"),
        ({"fields": "ax"}, "target metadata are incomplete"),
    ],
)
def test_wrong_device_class(
    publish: Publish, web: Web, device: Updating, metadata: dict[str, object], why: str
) -> None:
    failed = device.must_fail(publish("1.0.0", **metadata), "Incompatible")
    assert why in failed.detail
    assert failed.is_permanent
    assert requested_archives(web) == []


# --- keys ---


def test_one_of_two_root_signatures(repository: Signed, publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    repository.sign_root([repository.keys["root"][0]])
    repository.write(web.folder)
    device.must_fail(wanted, "UnsignedMetadataError")
    assert device.versions == {"root": 1}


def test_a_root_signed_twice_by_one_of_two_keys(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    wanted = publish("1.0.0")
    repository.sign_root([repository.keys["root"][0], repository.keys["root"][0]])
    repository.write(web.folder)
    device.must_fail(wanted, "UnsignedMetadataError")


def test_a_revoked_targets_key(repository: Signed, publish: Publish, web: Web, device: Updating) -> None:
    device.must_fetch(publish("1.0.0"))
    [stolen] = repository.keys["targets"]
    repository.rotate("targets")
    repository.sign_targets([stolen])
    wanted = publish("2.0.0", OTHER)
    device.must_fail(wanted, "UnsignedMetadataError")
    assert device.versions["root"] == 2, "the key stays revoked"
    repository.sign_targets()
    repository.sign()
    repository.write(web.folder)
    device.must_fetch(wanted)


def test_a_revoked_key_of_a_bundle(repository: Signed, publish: Publish, web: Web, device: Updating) -> None:
    device.must_fetch(publish("1.0.0"))
    stolen, repository.keys["exercise"] = repository.keys["exercise"], repository.copy().keys["snapshot"]
    repository.sign_targets()
    wanted = publish("2.0.0", OTHER)
    repository.sign_bundle("exercise", stolen)
    repository.sign()
    repository.write(web.folder)
    device.must_fail(wanted, "UnsignedMetadataError")


def test_a_chain_of_three_root_rotations(repository: Signed, publish: Publish, web: Web, device: Updating) -> None:
    """Simulate a device that was offline for years; the keys of its first root are no longer valid."""
    device.must_fetch(publish("1.0.0"))
    for role in ("timestamp", "snapshot", "targets"):
        repository.rotate("root", role)
    repository.sign_targets()
    device.must_fetch(publish("2.0.0", OTHER))
    assert device.versions["root"] == 4


def test_a_chain_of_three_root_rotations_with_a_forged_one(
    repository: Signed, publish: Publish, web: Web, device: Updating
) -> None:
    wanted = publish("1.0.0")
    device.must_fetch(wanted)
    thief = repository.copy()
    repository.rotate("root", "timestamp")
    thief.rotate("root", "timestamp")
    thief.sign_root()
    repository.sign()
    repository.write(web.folder)
    (web.folder / "metadata" / "3.root.json").write_bytes(thief.files["3.root.json"])
    device.must_fail(wanted, "UnsignedMetadataError")
    assert device.versions["root"] == 2


# --- the clock ---


def test_a_clock_at_1970_does_not_make_old_metadata_new(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    device.must_fetch(wanted)
    with device.store.transaction() as tx:
        tx.raise_time_floor(device.now().wall_us + 20 * DAY_US)
    device.wall_us, device.quality = 0, "unsynced"
    device.must_fail(wanted, "ExpiredMetadataError")


def test_a_clock_at_1970_allows_updates_of_unknown_freshness(publish: Publish, web: Web, device: Updating) -> None:
    device.wall_us, device.quality = 0, "unsynced"
    device.must_fetch(publish("1.0.0"))
    report = device.fetcher.report(device.now())
    assert report is not None
    assert report["freshness"] == "unknown"


def test_a_clock_at_2040_finds_everything_expired_until_it_is_right_again(
    publish: Publish, web: Web, device: Updating
) -> None:
    wanted = publish("1.0.0")
    device.wall_us, device.quality = YEAR_2040_US, "restored"
    device.must_fail(wanted, "ExpiredMetadataError")
    device.wall_us, device.quality = None, "synced"
    device.must_fetch(wanted)


def test_a_clock_at_the_end_of_time_is_a_wrong_clock(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    device.wall_us, device.quality = 2**62, "restored"
    device.must_fail(wanted, "ExpiredMetadataError")


# --- archives that are signed, and hostile all the same ---


def zipped(*members: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    """A bundle of ours with these members too."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for info, data in members:
            info.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(info, data)
    return file.getvalue()


def refused_bundle(fetched: FetchedBundle, whole: dict[str, bytes]) -> str:
    """Why the archive that came is no bundle; the one of before still is."""
    assert whole, "a bundle ran before"
    with pytest.raises(BadBundle) as refusal:
        bundle.read(fetched.path, [KEY.public])
    return str(refusal.value)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a right bundle."""
    folder = packed(tmp_path_factory.mktemp("bundle"))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["../exercise/model.tflite", "/etc/cron.d/x", "a/../../x", "..\\x"])
def test_archive_traversal(publish: Publish, device: Updating, members: dict[str, bytes], name: str) -> None:
    hostile = [*((zipfile.ZipInfo(member), data) for member, data in members.items()), (zipfile.ZipInfo(name), b"x")]
    with device.untouched():
        fetched = device.must_fetch(publish("1.0.0", zipped(*hostile)))
        assert "is not a plain file name" in refused_bundle(fetched, members)


def test_zip_bomb(publish: Publish, device: Updating, members: dict[str, bytes]) -> None:
    block = bytes(bundle.MAX_BYTES // 2 + 1)
    hostile = zipped(*((zipfile.ZipInfo(name), block) for name in ("golden.npz", "model.tflite")))
    with device.untouched():
        fetched = device.must_fetch(publish("1.0.0", hostile))
        assert "larger than the 256 MiB that a bundle may have" in refused_bundle(fetched, members)


def test_zip_bomb_that_claims_to_be_small(publish: Publish, device: Updating, members: dict[str, bytes]) -> None:
    hostile = bytearray(zipped((zipfile.ZipInfo("model.tflite"), bytes(64 << 20))))
    size = (64 << 20).to_bytes(4, "little")
    assert hostile.count(size) == 2
    hostile = hostile.replace(size, (1000).to_bytes(4, "little"))
    with device.untouched():
        fetched = device.must_fetch(publish("1.0.0", bytes(hostile)))
        assert "cannot be read: Bad CRC-32" in refused_bundle(fetched, members)


def test_symlink_in_an_archive(publish: Publish, device: Updating, members: dict[str, bytes]) -> None:
    link = zipfile.ZipInfo("model.tflite")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with device.untouched():
        fetched = device.must_fetch(publish("1.0.0", zipped((link, b"/etc/shadow"))))
        assert "is a link or device" in refused_bundle(fetched, members)


def test_an_archive_of_no_publisher(publish: Publish, device: Updating, members: dict[str, bytes]) -> None:
    """Keys of the repository alone make no bundle: its publisher signs the manifest."""
    altered = members | {"model.tflite": members["model.tflite"][:-1] + b"\0", "manifest.jws": b"a.b.c"}
    with device.untouched():
        fetched = device.must_fetch(publish("1.0.0", zipped(*((zipfile.ZipInfo(n), d) for n, d in altered.items()))))
        assert "not signed by any" in refused_bundle(fetched, members)


# --- the way ---


def test_redirect_to_elsewhere(publish: Publish, web: Web, device: Updating, tmp_path: Path) -> None:
    wanted = publish("1.0.0")
    with Web(tmp_path / "web") as elsewhere:
        web.tricks.append(("/targets/", lambda it: it.head(302, 0, Location=f"{elsewhere.url}{it.path}")))
        failed = device.must_fail(wanted, "DownloadHTTPError")
        assert elsewhere.url in failed.detail
        assert elsewhere.requests == []


def test_a_symbolic_link_in_a_folder_leads_nowhere(publish: Publish, web: Web, device: Updating) -> None:
    wanted = publish("1.0.0")
    device.configure(url=str(web.folder))
    [archive] = (web.folder / "targets").rglob("*.zip")
    archive.rename(web.folder.parent / "outside.zip")
    archive.symlink_to(web.folder.parent / "outside.zip")
    device.must_fail(wanted, "DownloadError")
    archive.unlink()
    os.mkfifo(archive)
    assert "is not a regular file" in device.must_fail(wanted, "DownloadError").detail


def test_a_name_that_leads_out_of_the_repository(repository: Signed, web: Web, device: Updating) -> None:
    outside = DesiredBundle("rollout-1", "exercise", "../../..", f"sha256:{'0' * 64}", "all")
    repository.add("exercise", "1.0.0", ARCHIVE)
    repository.write(web.folder)
    device.must_fail(outside, "NoSuchTarget")

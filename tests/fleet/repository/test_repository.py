"""Fleet repository as the client of python-tuf sees it over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError

from outstation.fleet.repository import (
    create,
    edition,
    expiry,
    key_rotation,
    repository_status,
    revoke,
    root_rotation,
    upkeep,
)
from outstation.fleet.repository.keys import RepositoryKeyring
from outstation.fleet.repository.publish import build_archive
from outstation.foundation.errors import BadBundle, StorageBusy, StorageError, UsageError
from outstation.ml.model.bundle import bundle as bundles
from outstation.protocol.wire import keys, target_metadata
from outstation.workbench.authoring import pack
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import KEY, change_manifest, resign
from tests.kit.feature_sets import write_feature_spec
from tests.kit.repositories import Client, Depot, served, version

pytest_plugins = ["tests.kit.repository_fixtures"]

ROOT = Path(__file__).parents[3]


def read_archive(path: Path, data: bytes | None) -> bundles.Bundle:
    assert data is not None
    path.write_bytes(data)
    return bundles.read(path, [KEY.public])


def test_a_device_with_the_first_root_gets_a_published_bundle(
    tmp_path: Path, depot: Depot, client: Client, made: Path
) -> None:
    done = depot.publish(made, run_probe=True)
    bundle = read_archive(tmp_path / "got.zip", client.fetch_target(done.target))
    assert (bundle.digest, bundle.files) == (done.target_metadata.digest, bundles.read(made, [KEY.public]).files)
    assert done.target == f"tiny/1.0.0/{bundle.digest[7:23]}.zip"
    assert (done.is_new, done.signer) == (True, KEY.public.kid)


def test_target_metadata_suffice_to_decide_on_a_download(depot: Depot, made: Path) -> None:
    done = depot.publish(made, run_probe=True)
    current = edition.load(depot.layout)
    target = target_metadata.decode(current.bundles["tiny"].signed.targets[done.target].custom)
    assert target == done.target_metadata
    assert (target.name, target.version, target.kind) == ("tiny", "1.0.0", "classify")
    assert (target.fields, target.window, target.agent) == (["a", "b", "c", "d"], 1, "0.1.0")
    assert target.runtimes in (["ai-edge-litert"], ["tflite-runtime"])
    assert target.unpacked == sum(path.stat().st_size for path in made.iterdir())
    # At least Python, numpy and the runtime; a tiny model needs little more.
    assert 20 << 20 < target.memory < 400 << 20


def test_an_update_leaves_the_old_version_available(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    first = depot.publish(made)
    client.fetch_target(first.target)
    second = depot.publish(version(tmp_path, made, "1.1.0"))
    assert read_archive(tmp_path / "two.zip", client.fetch_target(second.target)).manifest.version == "1.1.0"
    assert read_archive(tmp_path / "one.zip", client.fetch_target(first.target)).manifest.version == "1.0.0"


def test_each_bundle_has_its_own_role_and_key(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    first, second = depot.publish(made), depot.publish(version(tmp_path, made, "1.0.0", "other"))
    assert client.fetch_target(first.target)
    assert client.fetch_target(second.target)
    roles = {role.role: role for role in repository_status.read(depot.folder).roles}
    assert roles["tiny"].keys != roles["other"].keys
    assert roles["tiny"].version == 1


def test_publishing_twice_changes_nothing(depot: Depot, made: Path) -> None:
    depot.publish(made)
    before = {path: path.read_bytes() for path in depot.folder.rglob("*") if path.is_file()}
    assert depot.publish(made).is_new is False
    assert {path: path.read_bytes() for path in depot.folder.rglob("*") if path.is_file()} == before


def test_equal_bundles_give_equal_archives(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (0, 0))
    assert build_archive(bundles.read(made, None)) == build_archive(bundles.read(tmp_path / "copy", None))


def test_a_published_version_with_other_bytes_is_refused(tmp_path: Path, depot: Depot, made: Path) -> None:
    depot.publish(made)
    other = version(tmp_path, made, "1.0.0")
    change_manifest(other, lambda head: head.update(created="2027-01-01T00:00:00Z"))
    with pytest.raises(BadBundle, match=r"tiny 1\.0\.0 is published with digest sha256:.*another version"):
        depot.publish(other)


def test_a_bundle_of_an_unknown_publisher_is_refused(tmp_path: Path, depot: Depot, made: Path) -> None:
    strange = version(tmp_path, made, "2.0.0")
    resign(strange, new_key(99))
    with pytest.raises(BadBundle, match="not signed by any of the 1 trusted"):
        depot.publish(strange)


def test_a_bundle_that_fails_its_probe_is_published_only_without(tmp_path: Path, depot: Depot, made: Path) -> None:
    broken = version(tmp_path, made, "2.0.0")
    model = (broken / "model.tflite").read_bytes()[:100]
    (broken / "model.tflite").write_bytes(model)
    change_manifest(
        broken,
        lambda head: head["files"].update({"model.tflite": f"sha256:{hashlib.sha256(model).hexdigest()}"}),
    )
    with pytest.raises(BadBundle, match=r"does not run here: load: .*--no-probe"):
        depot.publish(broken, run_probe=True)
    done = depot.publish(broken)
    assert done.target_metadata.memory == done.target_metadata.memory // (1 << 20) * (1 << 20)


@pytest.mark.parametrize("number", ["../1", "1/2", ".1", "1 0", "ü"])
def test_a_version_that_is_no_path_segment_is_refused(tmp_path: Path, depot: Depot, made: Path, number: str) -> None:
    copied = version(tmp_path, made, "0")
    change_manifest(copied, lambda head: head.update(version=number))
    with pytest.raises(BadBundle, match="cannot be in a repository"):
        depot.publish(copied)


@pytest.mark.parametrize("name", ["root", "targets", "snapshot", "timestamp"])
def test_a_bundle_named_like_a_role_is_refused(tmp_path: Path, depot: Depot, made: Path, name: str) -> None:
    with pytest.raises(BadBundle, match="top-level role"):
        depot.publish(version(tmp_path, made, "1.0.0", name))


def test_a_revoked_version_is_never_published_again(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    first, second = depot.publish(made), depot.publish(version(tmp_path, made, "1.1.0"))
    assert revoke.revoke(depot.folder, "tiny", "1.0.0").versions == ["1.0.0"]
    assert client.fetch_target(first.target) is None
    assert client.fetch_target(second.target)
    assert not list((depot.layout.targets / "tiny" / "1.0.0").glob("*"))
    with pytest.raises(BadBundle, match="was revoked on"):
        depot.publish(made)
    with pytest.raises(UsageError, match=r"published versions: 1\.1\.0"):
        revoke.revoke(depot.folder, "tiny", "1.0.0")
    revoke.revoke(depot.folder, "tiny")
    assert client.fetch_target(second.target) is None


def test_private_keys_are_private_and_init_runs_once(depot: Depot) -> None:
    private = sorted(depot.layout.keys.glob("*.key"))
    assert [path.name for path in private] == ["root-1.key", "snapshot-1.key", "targets-1.key", "timestamp-1.key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in [*private]} == {0o600}
    assert stat.S_IMODE(depot.layout.keys.stat().st_mode) == 0o700
    with pytest.raises(UsageError, match="so it is not replaced"):
        depot.create()


@pytest.mark.parametrize(("count", "threshold"), [(1, 2), (0, 0), (3, 0), (99, 2)])
def test_a_threshold_that_cannot_be_met_is_refused(tmp_path: Path, count: int, threshold: int) -> None:
    with pytest.raises(UsageError, match="--threshold"):
        create.create(tmp_path, roots=count, threshold=threshold)


def test_an_old_device_follows_three_root_rotations(depot: Depot, client: Client, made: Path) -> None:
    done = depot.publish(made)
    client.fetch_target()
    first = repository_status.read(depot.folder).roles[0].keys
    for number in (2, 3, 4):
        assert key_rotation.rotate(depot.folder, "root").new == f"root-{number}"
        (depot.layout.keys / f"root-{number - 1}.key").unlink()
    assert client.fetch_target(done.target)
    [root] = [role for role in repository_status.read(depot.folder).roles if role.role == "root"]
    assert (root.version, [key.name for key in root.keys]) == (4, ["root-4"])
    assert root.keys != first


def test_a_root_draft_needs_both_of_two_signatures(tmp_path: Path, made: Path) -> None:
    depot = Depot(tmp_path / "fleet").create(roots=2, threshold=2)
    done = depot.publish(made)
    away = tmp_path / "vault"
    away.mkdir()
    for name in ("root-1.key", "root-2.key"):
        shutil.move(depot.layout.keys / name, away / name)
    with served(depot.layout.home) as url:
        client = Client(tmp_path / "device", url, depot.layout.root_path(1).read_bytes())
        client.fetch_target()
        with pytest.raises(UsageError, match="does not belong there either"):
            key_rotation.rotate(depot.folder, "root", old="root-2")
        new = keys.generate(away / "root-3.key").public.text
        changed = key_rotation.rotate(depot.folder, "root", old="root-2", new=new)
        assert (changed.is_complete, changed.new) == (False, new)
        root_rotation.sign(depot.layout.draft, away / "root-3.key")
        root_rotation.sign(depot.layout.draft, away / "root-1.key")
        # A careless operator publishes the draft with one of two required signatures.
        shutil.copy(depot.layout.draft, depot.layout.root_path(2))
        with pytest.raises(UnsignedMetadataError, match="root was signed by 1/2"):
            client.fetch_target()
        depot.layout.root_path(2).unlink()
        assert upkeep.refresh(depot.folder).root_version == 0
        draft = root_rotation.load_pending_draft(depot.layout, RepositoryKeyring(depot.layout.keys))
        assert draft is not None
        assert (draft.signatures_missing, draft.may_sign) == (1, ["root-2"])
        root_rotation.sign(depot.layout.draft, away / "root-2.key")
        assert upkeep.refresh(depot.folder).root_version == 2
        assert client.fetch_target(done.target)
    assert not depot.layout.draft.exists()


def test_unknown_signatures_do_not_put_a_draft_in_force(tmp_path: Path) -> None:
    depot = Depot(tmp_path / "fleet").create(roots=2, threshold=2)
    for name in ("root-1.key", "root-2.key"):
        (depot.layout.keys / name).unlink()
    key_rotation.rotate(depot.folder, "timestamp")
    for number in (1, 2):
        keys.generate(tmp_path / f"{number}.key")
        root_rotation.sign(depot.layout.draft, tmp_path / f"{number}.key")
    assert upkeep.refresh(depot.folder).root_version == 0


def test_metadata_of_a_revoked_targets_key_is_refused(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    done = depot.publish(made)
    client.fetch_target(done.target)
    thief = depot.copy(tmp_path / "thief")
    key_rotation.rotate(depot.folder, "targets")
    client.fetch_target(done.target)
    # Even with the online keys and the new root on the server, the old key does not count.
    current = edition.load(thief.layout)
    edition.write(thief.layout, current, {"targets"}, RepositoryKeyring(thief.layout.keys), expiry.now())
    edition.write(thief.layout, current, {"targets"}, RepositoryKeyring(thief.layout.keys), expiry.now())
    shutil.copy(depot.layout.root_path(2), thief.layout.root_path(2))
    with served(thief.layout.home) as url:
        client.url = url
        with pytest.raises(UnsignedMetadataError, match="targets was signed by 0/1"):
            client.fetch_target()


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_old_and_new_devices_continue_after_a_rotation(
    tmp_path: Path, depot: Depot, client: Client, made: Path, role: str
) -> None:
    done = depot.publish(made)
    client.fetch_target()
    changed = key_rotation.rotate(depot.folder, role)
    assert (changed.old, changed.new, changed.is_complete) == (f"{role}-1", f"{role}-2", True)
    (depot.layout.keys / f"{role}-1.key").unlink()
    new = Client(tmp_path / "new", client.url, depot.layout.root_path(2).read_bytes())
    assert client.fetch_target(done.target)
    assert new.fetch_target(done.target)
    later = depot.publish(version(tmp_path, made, "1.1.0"))
    assert client.fetch_target(later.target)
    assert new.fetch_target(later.target)


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_lost_key_is_replaced(tmp_path: Path, depot: Depot, client: Client, made: Path, role: str) -> None:
    done = depot.publish(made)
    client.fetch_target()
    (depot.layout.keys / f"{role}-1.key").unlink()
    with pytest.raises(UsageError, match=rf"no key of role {role}|needs the targets key"):
        depot.publish(version(tmp_path, made, "1.1.0", "other"))
    assert key_rotation.rotate(depot.folder, role).is_complete
    assert client.fetch_target(done.target)


def test_a_rotated_bundle_key_no_longer_signs(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    done = depot.publish(made)
    client.fetch_target(done.target)
    changed = key_rotation.rotate(depot.folder, "tiny")
    assert (changed.old, changed.new, changed.draft) == ("bundle-tiny-1", "bundle-tiny-2", None)
    (depot.layout.keys / "bundle-tiny-2.key").unlink()
    with pytest.raises(UsageError, match="no key of role tiny"):
        depot.publish(version(tmp_path, made, "1.1.0"))
    assert client.fetch_target(done.target)
    key_rotation.rotate(depot.folder, "tiny")
    assert client.fetch_target(depot.publish(tmp_path / "tiny-1.1.0").target)


def test_key_rotation_undoes_a_fast_forward_attack(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    done = depot.publish(made)
    stolen = depot.copy(tmp_path / "thief")
    current = edition.load(stolen.layout)
    current.published_versions |= {"timestamp": 2**31, "snapshot": 2**31}
    edition.write(stolen.layout, current, {"snapshot"}, RepositoryKeyring(stolen.layout.keys), expiry.now())
    with served(stolen.layout.home) as url:
        Client(client.home, url, client.root).fetch_target()
    with pytest.raises(RepositoryError):
        client.fetch_target()
    key_rotation.rotate(depot.folder, "snapshot")
    key_rotation.rotate(depot.folder, "timestamp")
    assert client.fetch_target(done.target)


def test_an_older_copy_of_the_repository_is_refused(tmp_path: Path, depot: Depot, client: Client, made: Path) -> None:
    depot.publish(made)
    old = depot.copy(tmp_path / "old")
    depot.publish(version(tmp_path, made, "1.1.0"))
    client.fetch_target()
    with served(old.layout.home) as url:
        client.url = url
        with pytest.raises(RepositoryError):
            client.fetch_target()


def test_an_altered_repository_is_not_signed_again(depot: Depot, made: Path) -> None:
    depot.publish(made)
    path = depot.layout.role_path("targets", 2)
    content = json.loads(path.read_bytes())
    content["signed"]["delegations"]["roles"][0]["paths"] = ["*/*/*"]
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="devices would refuse"):
        upkeep.refresh(depot.folder)


def test_an_unsigned_timestamp_is_not_signed_again(depot: Depot) -> None:
    path = depot.layout.role_path("timestamp", 1)
    content = json.loads(path.read_bytes())
    content["signed"]["version"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(StorageError, match="timestamp is signed by 0 of 1 keys"):
        upkeep.refresh(depot.folder)


def test_a_draft_already_in_force_changes_nothing(depot: Depot) -> None:
    key_rotation.rotate(depot.folder, "root")
    content = json.loads(depot.layout.root_path(2).read_bytes())
    content["signatures"] = []
    depot.layout.draft.write_text(json.dumps(content))
    before = depot.layout.root_path(2).read_bytes()
    upkeep.refresh(depot.folder)
    assert depot.layout.root_path(2).read_bytes() == before
    assert not depot.layout.draft.exists()


def test_a_draft_that_skips_a_root_is_refused(depot: Depot) -> None:
    content = json.loads(depot.layout.root_path(1).read_bytes())
    content["signed"]["version"] = 9
    depot.layout.draft.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"drafts root 9, but root 1 is in force; delete"):
        upkeep.refresh(depot.folder)


def test_daily_refreshes_prevent_expiry(depot: Depot, client: Client) -> None:
    start = expiry.now()
    for day in range(1, 60):
        upkeep.refresh_daily(depot.folder, start + timedelta(days=day))
        assert upkeep.refresh_daily(depot.folder, start + timedelta(days=day, hours=1)) is None
    last_day = start + timedelta(days=59)
    report = repository_status.read(depot.folder, last_day)
    days_left = {role.role: role.days_left for role in report.roles}
    assert (report.ok, days_left["timestamp"]) == (True, 28)
    assert days_left["snapshot"] >= 27
    late = repository_status.read(depot.folder, last_day + timedelta(days=29))
    assert late.ok is False
    assert [line for line in late.reminders if "timestamp has expired, so devices install nothing" in line]
    client.fetch_target()


def test_old_metadata_are_removed(depot: Depot, tmp_path: Path, made: Path) -> None:
    for number in range(8):
        depot.publish(version(tmp_path, made, f"1.{number}.0"))
    names = sorted(path.name for path in depot.layout.metadata.iterdir())
    assert names == sorted(
        ["1.root.json", "timestamp.json", "1.targets.json", "2.targets.json"]
        + [f"{n}.tiny.json" for n in (5, 6, 7, 8)]
        + [f"{n}.snapshot.json" for n in (6, 7, 8, 9)]
    )


def test_targets_without_their_key_give_a_reminder(depot: Depot, made: Path) -> None:
    depot.publish(made)
    (depot.layout.keys / "targets-1.key").unlink()
    later = expiry.now() + timedelta(days=309, hours=12)
    assert upkeep.refresh(depot.folder, now=later).roles == ["tiny", "snapshot", "timestamp"]
    [reminder] = repository_status.read(depot.folder, later).reminders
    assert "targets expires in 55 days" in reminder


def test_a_clock_set_back_signs_nothing(depot: Depot) -> None:
    with pytest.raises(UsageError, match=r"before the last signature .*set the clock"):
        upkeep.refresh(depot.folder, now=datetime(1970, 1, 2, tzinfo=UTC))


def test_trust_clock_recovers_from_a_clock_years_ahead(depot: Depot, client: Client, made: Path) -> None:
    upkeep.refresh(depot.folder, now=datetime(2044, 1, 1, tzinfo=UTC))
    with pytest.raises(UsageError, match=r"refresh --trust-clock"):
        depot.publish(made)
    done = upkeep.refresh(depot.folder, trust_clock=True)
    assert done.expires < expiry.now() + timedelta(days=29)
    assert client.fetch_target(depot.publish(made).target)


def test_only_one_writer_at_a_time(depot: Depot) -> None:
    later = expiry.now() + timedelta(days=2)
    with depot.layout.locked(), pytest.raises(StorageBusy, match="another command"):
        upkeep.refresh_daily(depot.folder, later)
    assert upkeep.refresh_daily(depot.folder, later) is not None


def test_without_online_keys_the_daily_refresh_does_nothing(depot: Depot) -> None:
    (depot.layout.keys / "snapshot-1.key").unlink()
    assert upkeep.refresh_daily(depot.folder, expiry.now() + timedelta(days=3)) is None


def packed_with_features(folder: Path, version: str, old: str = "", new: str = "") -> Path:
    """Pack a bundle of `version` after one change of its feature file, and of the features' version in its SPEC."""
    folder.mkdir()
    spec, features = write_feature_spec(folder), folder / "motion.toml"
    spec.write_text(change_version(spec.read_text(), version))
    assert old in features.read_text()
    features.write_text(features.read_text().replace(old, new))
    if old.startswith("version"):
        spec.write_text(spec.read_text().replace(f'file = "motion.toml", {old}', f'file = "motion.toml", {new}'))
    pack.write_bundle(pack.pack(spec, KEY), folder / "bundle")
    return folder / "bundle"


def change_version(text: str, version: str) -> str:
    return text.replace('version = "1.0.0"\ncreated', f'version = "{version}"\ncreated')


def test_other_features_under_a_published_name_and_version_are_refused(tmp_path: Path, depot: Depot) -> None:
    depot.publish(packed_with_features(tmp_path / "first", "1.0.0"))
    with pytest.raises(BadBundle, match=r"features motion 1\.0\.0 have .* restore the feature file, or give it a new"):
        depot.publish(packed_with_features(tmp_path / "changed", "1.1.0", "rows = 5", "rows = 6"))
    # The same features, and changed ones under a version of their own.
    assert depot.publish(packed_with_features(tmp_path / "same", "1.2.0")).is_new
    assert depot.publish(
        packed_with_features(tmp_path / "renamed", "1.3.0", 'version = "1.0.0"', 'version = "2.0.0"')
    ).is_new

"""Commands `outstation fleet repository` and `fleet publish`, and the repository files of an enrolled device."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tarfile
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from outstation.__main__ import main
from outstation.fleet import config as fleet_config
from outstation.fleet.collector.collector import Collector
from outstation.fleet.database.store import FleetStore
from outstation.fleet.repository import expiry, upkeep
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire import keys
from scripts.kit.bundles import KEY, resign
from tests.kit.repositories import Client, served, version

pytest_plugins = ["tests.kit.repository_fixtures"]


class SilentLink:
    """Broker link that never delivers anything."""

    window = 20

    def send(self, message: OutgoingMessage) -> int:
        raise AssertionError(message)

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        return []

    def acknowledge(self, delivery: IncomingMessage) -> None:
        raise AssertionError(delivery)

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Operator:
    """Operator who runs commands in a fleet's folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def run(self, *words: object) -> tuple[int, str, str]:
        """Return (exit code, stdout, stderr)."""
        folder = [] if "sign-root" in words else ["--dir", str(self.folder)]
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(["fleet", *map(str, words), *folder])
        captured = self._capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    def document(self, *words: object, code: int = 0) -> Any:
        exit_code, out, err = self.run(*words, "--json")
        assert exit_code == code, err
        return json.loads(out)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Operator:
    with pytest.raises(SystemExit):
        main(["fleet", "init", str(tmp_path / "acme"), "--broker", "mqtt://127.0.0.1:1883", "--no-repository"])
    return Operator(tmp_path / "acme", capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["publish"],
        *(["repository", name] for name in ("init", "status", "refresh", "rotate", "revoke", "sign-root", "copy")),
    ],
)
def test_every_command_has_help_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fleet", *command, "--help"])
    assert f"Example: outstation fleet {' '.join(command)}" in capsys.readouterr().out


def test_a_built_in_bundle_is_published_listed_and_revoked(desk: Operator) -> None:
    code, out, _ = desk.run("repository", "init", "--demo", "--roots", 3, "--threshold", 2)
    assert code == 0
    assert "Move root-1.key root-2.key root-3.key from" in out
    done = desk.document("publish", "exercise")
    assert (done["name"], done["created"]) == ("exercise", True)
    assert desk.document("publish", "exercise") == {**done, "created": False}
    status = desk.document("repository", "status")
    assert [bundle["digest"] for bundle in status["bundles"]] == [done["digest"]]
    assert (status["ok"], status["roles"][0]["threshold"], len(status["roles"][0]["keys"])) == (True, 2, 3)
    code, out, _ = desk.run("repository", "status")
    assert "2 of root-1, root-2, root-3" in out
    assert desk.document("repository", "revoke", "exercise", done["version"])["versions"] == [done["version"]]
    after = desk.document("repository", "status")
    assert (after["bundles"], [bundle["version"] for bundle in after["revoked"]]) == ([], [done["version"]])


@pytest.mark.parametrize(
    ("words", "keys_made", "threshold"),
    [
        ((), 3, 2),
        (("--roots", 1), 1, 1),
        (("--threshold", 1), 3, 1),
        (("--threshold", 4), 4, 4),
        (("--roots", 5), 5, 2),
    ],
)
def test_a_change_of_keys_needs_a_second_root_key_by_default(
    desk: Operator, tmp_path: Path, words: tuple[object, ...], keys_made: int, threshold: int
) -> None:
    (tmp_path / "stick").mkdir()
    code, out, _ = desk.run("repository", "init", "--root-keys", tmp_path / "stick", *words)
    assert code == 0
    assert len([*(tmp_path / "stick").glob("root-*.key")]) == keys_made
    assert f"{threshold} of {keys_made} can change all keys" in out
    assert ("Threshold 1: whoever has one root key" in out) == (threshold == 1)
    [root] = [role for role in desk.document("repository", "status")["roles"] if role["role"] == "root"]
    assert (root["threshold"], len(root["keys"])) == (threshold, keys_made)


def test_a_bundle_of_another_publisher_needs_its_key(desk: Operator, made: Path) -> None:
    desk.run("repository", "init", "--demo")
    code, _, err = desk.run("publish", made)
    assert (code, "not signed by any of the 2 trusted publisher keys" in err) == (1, True)
    assert desk.document("publish", made, "--publisher", KEY.public.text, "--no-probe")["signer"] == KEY.public.kid


def test_the_operators_public_key_is_enough_to_publish(desk: Operator, tmp_path: Path, made: Path) -> None:
    shutil.copytree(made, tmp_path / "ours")
    operator = keys.load_private(desk.folder / "operator.key")
    resign(tmp_path / "ours", operator)
    desk.run("repository", "init", "--demo")
    (desk.folder / "operator.key").unlink()
    assert desk.document("publish", tmp_path / "ours", "--no-probe")["signer"] == operator.public.kid


def test_root_keys_on_two_machines_sign_one_draft(desk: Operator, tmp_path: Path, made: Path) -> None:
    desk.run("repository", "init", "--demo", "--roots", 2, "--threshold", 2)
    for name in ("root-1.key", "root-2.key"):
        shutil.move(desk.folder / "repository-keys" / name, tmp_path / name)
    draft = desk.folder / "repository" / "root.json.draft"
    waits = desk.document("repository", "rotate", "timestamp", code=1)
    assert (waits["in_force"], waits["draft"]["signatures_missing"]) == (False, 2)
    carried = tmp_path / "stick.json"
    shutil.copy(draft, carried)
    for number in (1, 2):
        signed = desk.document("repository", "sign-root", "--sign-with", tmp_path / f"root-{number}.key", carried)
        assert signed["signatures"] == number
        status = desk.document("repository", "status", code=1)
        assert "needs 2 more signatures (root-1, root-2)" in status["reminders"][0]
    shutil.copy(carried, draft)
    assert desk.document("repository", "refresh")["root"] == 2
    [key] = desk.document("repository", "status")["roles"][3]["keys"]
    assert (key["name"], key["has_private_key"]) == ("timestamp-2", True)


def test_a_root_key_on_a_mounted_stick_signs_at_once(desk: Operator, tmp_path: Path) -> None:
    desk.run("repository", "init", "--demo")
    stick = shutil.move(desk.folder / "repository-keys" / "root-1.key", tmp_path / "root-1.key")
    code, out, _ = desk.run("repository", "rotate", "targets")
    assert (code, "needs 1 more signatures of the root keys root-1" in out) == (1, True)
    code, out, _ = desk.run("repository", "rotate", "snapshot", "--sign-with", stick)
    # One draft holds both changes.
    assert (code, "snapshot: snapshot-2 is valid, snapshot-1 is not" in out) == (0, True)
    roles = {role["role"]: role["keys"][0]["name"] for role in desk.document("repository", "status")["roles"]}
    assert (roles["targets"], roles["snapshot"]) == ("targets-2", "snapshot-2")


def test_a_root_key_generated_elsewhere_is_added_by_public_key(desk: Operator, tmp_path: Path) -> None:
    desk.run("repository", "init", "--demo")
    elsewhere = keys.generate(tmp_path / "vault.key")
    code, _, err = desk.run("repository", "rotate", "root", "--new", elsewhere.public.text)
    # The new key must sign, too.
    assert code == 1
    desk.run(
        "repository", "sign-root", "--sign-with", tmp_path / "vault.key", desk.folder / "repository" / "root.json.draft"
    )
    assert desk.document("repository", "refresh")["root"] == 2
    assert not list((desk.folder / "repository-keys").glob("root-2*"))
    assert desk.document("repository", "status")["roles"][0]["keys"][0]["key"] == elsewhere.public.text
    assert not err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["rotate", "tiny"], "no role 'tiny' in the repository"),
        (["rotate", "root"], "root has 2 keys; name one with --old: root-1, root-2"),
        (["rotate", "root", "--old", "root-9"], "none is 'root-9'"),
        (["revoke", "exercise"], "no bundle 'exercise'"),
        (["init", "--demo"], "so it is not replaced"),
        (["sign-root", "--sign-with", "nothing.key", "fleet.toml"], "cannot be read"),
    ],
)
def test_wrong_use_gives_one_line_and_changes_nothing(desk: Operator, words: list[str], error: str) -> None:
    desk.run("repository", "init", "--demo", "--roots", 2)
    before = {path: path.read_bytes() for path in desk.folder.rglob("*") if path.is_file()}
    code, _, err = desk.run("repository", *words)
    assert (code, error in err, err.count("\n")) == (2, True, 1), err
    assert {path: path.read_bytes() for path in desk.folder.rglob("*") if path.is_file()} == before


def test_without_a_repository_errors_name_the_command_that_creates_one(desk: Operator, made: Path) -> None:
    words: list[list[object]] = [["publish", made, "--publisher", KEY.public.text, "--no-probe"]]
    words += [["repository", *rest] for rest in (["status"], ["refresh"], ["rotate", "root"], ["revoke", "tiny"])]
    for command in words:
        code, _, err = desk.run(*command)
        assert (code, "create one: outstation fleet repository init" in err) == (2, True), err


def test_sign_root_signs_only_a_root(desk: Operator, tmp_path: Path) -> None:
    desk.run("repository", "init", "--demo")
    key = desk.folder / "repository-keys" / "root-1.key"
    for file in (desk.folder / "repository" / "metadata" / "timestamp.json", desk.folder / "fleet.toml"):
        before = file.read_bytes()
        code, _, err = desk.run("repository", "sign-root", "--sign-with", key, file)
        assert code == 2
        assert "root" in err
        assert file.read_bytes() == before


def test_enrolment_gives_a_device_the_newest_root_and_the_url(desk: Operator, tmp_path: Path, made: Path) -> None:
    desk.run("enrol", "pi-06", "--bundle-out", tmp_path / "before.tar.gz")
    with tarfile.open(tmp_path / "before.tar.gz") as tar:
        assert "root.json" not in tar.getnames()
    with served(desk.folder / "repository") as url:
        desk.run("repository", "init", "--demo", "--url", url)
        desk.run("repository", "rotate", "root")
        desk.run("enrol", "pi-07", "--bundle-out", tmp_path / "pi-07.tar.gz")
        with tarfile.open(tmp_path / "pi-07.tar.gz") as tar:
            tar.extractall(tmp_path / "device", filter="data")
        config = tomllib.loads((tmp_path / "device" / "outstation.toml").read_text())
        assert config["updates"] == {"url": url, "root": "root.json", "allow_plaintext": True}
        root = (tmp_path / "device" / "root.json").read_bytes()
        assert root == (desk.folder / "repository" / "metadata" / "2.root.json").read_bytes()
        target = desk.document("publish", made, "--publisher", KEY.public.text, "--no-probe")["target"]
        assert Client(tmp_path / "trust", config["updates"]["url"], root).fetch_target(target)


def test_without_a_url_a_device_gets_only_the_root(desk: Operator) -> None:
    desk.run("repository", "init", "--demo")
    desk.run("enrol", "pi-07", "--bundle-out", desk.folder / "pi-07.tar.gz")
    home = desk.folder / "devices" / "pi-07"
    assert (home / "root.json").exists()
    assert "updates" not in tomllib.loads((home / "outstation.toml").read_text())


@pytest.mark.parametrize(
    "url", ["ftp://x", "https://", "https://u:p@x/", "https://x/?a=b", "relative/folder", "https://x:0/"]
)
def test_an_invalid_url_is_refused_before_anything_is_created(desk: Operator, url: str) -> None:
    code, _, err = desk.run("repository", "init", "--demo", "--url", url)
    assert (code, "--url" in err) == (2, True)
    assert not (desk.folder / "repository").exists()


def test_a_second_url_does_not_overwrite_the_first(desk: Operator) -> None:
    assert desk.run("repository", "init", "--demo", "--url", "https://one.example/repository")[0] == 0
    code, _, err = desk.run("repository", "init", "--demo", "--url", "https://two.example/repository")
    assert (code, "is 'https://one.example/repository' already; edit it in that file" in err) == (2, True)
    known = fleet_config.load(desk.folder).repository
    assert known is not None
    assert known.url == "https://one.example/repository"


def test_a_copy_is_complete_and_never_replaced_by_an_older_one(desk: Operator, tmp_path: Path, made: Path) -> None:
    desk.run("repository", "init", "--demo")
    trusted = ["--publisher", KEY.public.text, "--no-probe"]
    first = desk.document("publish", made, *trusted)
    shutil.copytree(desk.folder, tmp_path / "old")
    stick = tmp_path / "stick"
    desk.document("repository", "copy", stick)
    second = desk.document("publish", version(tmp_path, made, "1.1.0"), *trusted)
    desk.document("repository", "rotate", "root")
    desk.document("repository", "revoke", "tiny", "1.0.0")
    desk.document("repository", "copy", stick)
    assert desk.document("repository", "copy", stick)["files"] == 0
    root = (desk.folder / "repository" / "metadata" / "1.root.json").read_bytes()
    with served(stick / "repository") as url:
        client = Client(tmp_path / "device", url, root)
        assert client.fetch_target(second["target"])
        assert client.fetch_target(first["target"]) is None
    assert len([path for path in (stick / "repository" / "targets").rglob("*") if path.is_file()]) == 1
    code, _, err = Operator(tmp_path / "old", desk._capsys).run("repository", "copy", stick)
    assert (code, "later than this one" in err) == (2, True)


@pytest.mark.parametrize("part", ["", "targets", "metadata"])
def test_nothing_is_written_or_removed_through_a_link(desk: Operator, tmp_path: Path, part: str) -> None:
    desk.run("repository", "init", "--demo")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "photo.jpg").write_bytes(b"x")
    link = tmp_path / "stick" / "repository" / part
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    code, _, err = desk.run("repository", "copy", tmp_path / "stick")
    assert (code, "is a symbolic link" in err) == (2, True)
    assert [path.name for path in precious.iterdir()] == ["photo.jpg"]


def test_other_files_in_the_destination_stay(desk: Operator, tmp_path: Path) -> None:
    desk.run("repository", "init", "--demo")
    other = tmp_path / "stick" / "repository" / "targets" / "photo.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x")
    desk.document("repository", "copy", tmp_path / "stick")
    assert other.exists()


def test_fleet_toml_keeps_its_mode(desk: Operator) -> None:
    file = desk.folder / "fleet.toml"
    file.chmod(0o600)
    assert desk.run("repository", "init", "--demo", "--url", "/media/stick/repository")[0] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_collector_signs_the_timestamp_and_survives_errors(
    desk: Operator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = fleet_config.load(desk.folder)
    store = FleetStore(desk.folder / "fleet.db")
    key = keys.load_private(desk.folder / "collector.key")
    later = expiry.now() + timedelta(days=3)
    collector = Collector("acme", config.broker, store, key, upkeep=lambda: upkeep.maintain(desk.folder, store, later))
    collector.tick(SilentLink(), 0.0)
    assert "no repository here" in caplog.text
    desk.run("repository", "init", "--demo")
    collector.tick(SilentLink(), 0.0)
    assert desk.document("repository", "status")["roles"][3]["version"] == 1
    monkeypatch.setattr("outstation.fleet.collector.collector.UPKEEP_S", 0.0)
    collector._next_upkeep = 0.0
    collector.tick(SilentLink(), 0.0)
    collector.tick(SilentLink(), 0.0)
    assert desk.document("repository", "status")["roles"][3]["version"] == 2
    (desk.folder / "repository" / "metadata" / "timestamp.json").write_text("{}")
    collector.tick(SilentLink(), 0.0)
    assert "devices would refuse this metadata" in caplog.text
    store.close()


def test_expiry_raises_one_alert_until_renewal(desk: Operator, tmp_path: Path) -> None:
    desk.run("repository", "init", "--demo")
    away = (desk.folder / "repository-keys" / "targets-1.key").rename(tmp_path / "targets.key")
    store = FleetStore(desk.folder / "fleet.db")
    later = expiry.now() + timedelta(days=309, hours=12)
    for hour in range(3):
        upkeep.maintain(desk.folder, store, later + timedelta(hours=hour))
    [alert] = store.alerts()
    assert (alert["alert"], alert["severity"], alert["device"]) == ("repository", "warning", "")
    assert "targets expires in 55 days" in alert["summary"]
    assert upkeep.refresh(desk.folder, sign_with=[away], now=later + timedelta(hours=4)).roles[0] == "targets"
    upkeep.maintain(desk.folder, store, later + timedelta(hours=5))
    assert store.alerts() == []
    assert len(store.alerts(closed=True)) == 2
    store.close()


@pytest.mark.parametrize("name", ["9.snapshot.json", "timestamp.json.new"])
def test_the_collector_survives_a_file_it_cannot_replace(
    desk: Operator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    desk.run("repository", "init", "--demo")
    config = fleet_config.load(desk.folder)
    store = FleetStore(desk.folder / "fleet.db")
    days = [3]
    collector = Collector(
        "acme",
        config.broker,
        store,
        keys.load_private(desk.folder / "collector.key"),
        upkeep=lambda: upkeep.maintain(desk.folder, store, expiry.now() + timedelta(days=days[0])),
    )
    monkeypatch.setattr("outstation.fleet.collector.collector.UPKEEP_S", 0.0)
    # A folder, because root may remove any file.
    obstacle = desk.folder / "repository" / "metadata" / name
    obstacle.mkdir()
    collector.tick(SilentLink(), 0.0)
    assert str(obstacle).removesuffix(".new") in caplog.text
    assert "see who owns" in caplog.text
    obstacle.rmdir()
    before = desk.document("repository", "status")["roles"][3]["version"]
    days[0] = 6
    caplog.clear()
    collector.tick(SilentLink(), 0.0)
    assert desk.document("repository", "status")["roles"][3]["version"] == before + 1
    assert caplog.text.count("WARNING") == 0
    store.close()


def test_the_collector_survives_a_disk_error_in_the_repository(
    desk: Operator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "repository/.lock")

    desk.run("repository", "init", "--demo")
    monkeypatch.setattr(upkeep, "refresh_daily", fail)
    store = FleetStore(desk.folder / "fleet.db")
    config, key = fleet_config.load(desk.folder), keys.load_private(desk.folder / "collector.key")
    Collector("acme", config.broker, store, key, upkeep=lambda: upkeep.maintain(desk.folder, store)).tick(
        SilentLink(), 0.0
    )
    assert "repository/.lock: Input/output error, so the repository was not refreshed" in caplog.text
    store.close()

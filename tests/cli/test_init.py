"""Command `outstation init`: a config that loads, a key that stays, and nothing half written."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from outstation.__main__ import main
from outstation.device import config
from outstation.device.cli.init import is_untouched
from outstation.foundation import owner
from outstation.protocol.wire import keys
from tests.kit.commands import call_outstation
from tests.kit.marks import root_only


def init(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_what_is_written_loads_and_holds_a_key_only_its_owner_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path / "new" / "home", "--id", "pi-07", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    conf = config.load(tmp_path / "new" / "home" / "outstation.toml")
    assert conf.device.id == document["device"] == "pi-07"
    assert conf.data_dir == tmp_path / "new" / "home" / "data"
    key = tmp_path / "new" / "home" / "device.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    public = keys.load_private(key).public
    assert (document["key"], document["thumbprint"]) == (public.text, public.kid)


def test_a_config_that_is_there_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outstation.toml").write_text("mine")
    assert init(tmp_path) == 2
    assert "exists already; edit it, or move it away first" in capsys.readouterr().err
    assert (tmp_path / "outstation.toml").read_text() == "mine"
    assert not (tmp_path / "device.key").exists()


def test_an_existing_key_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = keys.generate(tmp_path / "device.key").public
    assert init(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["key"] == public.text


def test_a_host_name_of_any_kind_gives_a_device_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, name in enumerate(["Pi_07.local", "-x-", "", "ü" * 90, "a" * 90]):
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        assert init(tmp_path / str(index)) == 0


def test_a_wrong_id_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "home", "--id", 'Pi "07"') == 2
    assert "--id" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("data_dir", ["/var/lib/out station", 'a"b\\c', "größe"])
def test_a_data_folder_may_have_any_name(tmp_path: Path, data_dir: str) -> None:
    assert init(tmp_path, "--data-dir", data_dir) == 0
    assert config.load(tmp_path / "outstation.toml").data_dir == tmp_path / data_dir


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert init(tmp_path / "file" / "home") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_standalone_device_has_a_config_of_12_lines_and_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path, "--standalone", "--id", "pi-07", "--broker", "mqtts://broker.example.org:8883") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "What it loses afterwards is lost, and nobody notices" in output
    text = (tmp_path / "outstation.toml").read_text()
    # With a stream of two lines and a task of three, these are 12 lines but for the broker.
    assert len([line for line in text.partition("[broker]")[0].splitlines() if line]) == 7
    conf = config.load(tmp_path / "outstation.toml")
    assert (conf.collector.delivery, conf.broker.host) == ("broker", "broker.example.org")


@pytest.mark.parametrize("url", ["http://broker", "mqtt://elsewhere.example.org", "broker"])
def test_a_broker_that_cannot_be_used_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert init(tmp_path / "home", "--standalone", "--broker", url) == 2
    assert "--broker" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("words", [[], ["--standalone"], ["--standalone", "--broker", "mqtts://b.example.org"]])
def test_a_config_is_untouched_until_somebody_changes_it(tmp_path: Path, words: list[str]) -> None:
    assert init(tmp_path, "--id", "pi-07", "--data-dir", "/var/lib/out station", *words) == 0
    text = (tmp_path / "outstation.toml").read_text()
    assert is_untouched(text)
    for changed in (text + "\n", text.replace("data_dir", "# data_dir"), text.replace("# ", "#"), "[device]", "x"):
        assert not is_untouched(changed)


@root_only
def test_root_gives_the_keys_to_the_owner_of_the_data_folder_and_no_link_leads_elsewhere(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret.key"
    data.mkdir()
    os.chown(data, 65534, 65533)
    secret.write_text("root's own")
    home = tmp_path / "home"
    home.mkdir()
    (home / "link.key").symlink_to(secret)
    os.link(secret, home / "second.key")
    (home / "device.key.before-join").write_text("")
    assert call_outstation("init", str(home), "--id", "pi-07", "--data-dir", str(data)).returncode == 0
    entries = {path.name: path.stat() for path in home.iterdir()}
    modes = {name: (entry.st_uid, entry.st_gid, stat.S_IMODE(entry.st_mode)) for name, entry in entries.items()}
    assert modes["device.key"] == modes["device.key.before-join"] == (65534, 65533, 0o600)
    assert modes["outstation.toml"] == modes["device.key.pub"] == (0, 65533, 0o640)
    assert secret.stat().st_uid == 0


@root_only
def test_root_gives_a_new_fleet_to_the_owner_of_its_folder_and_no_target_of_a_link(tmp_path: Path) -> None:
    fleet, secret = tmp_path / "fleet", tmp_path / "secret"
    (fleet / "broker").mkdir(parents=True)
    secret.write_text("root's own")
    os.chown(fleet, 65534, 65533)
    (fleet / "broker" / "acl").write_text("")
    (fleet / "link").symlink_to(secret)
    owner.give_tree(fleet)
    assert {path.lstat().st_uid for path in fleet.rglob("*")} == {65534}
    assert secret.stat().st_uid == 0

"""Command `outstation init`: a config that loads, a key that stays, and nothing half written."""

from __future__ import annotations

import io
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from agent import config
from agent.cli import main
from agent.cli.device.init import TEMPLATE
from agent.wire import keys


def init(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, arguments)])
    return int(ended.value.code or 0)


def enrolment(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def template(**values: Any) -> bytes:
    defaults = {"device": "pi-09", "fleet": "acme", "data_dir": "data", "collector": ""}
    return TEMPLATE.format(**(defaults | values)).encode()


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


def test_an_enrolment_file_brings_its_config_keys_and_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = keys.generate(tmp_path / "k")
    members = {"outstation.toml": template(), "device.key": (tmp_path / "k").read_bytes(), "device-tls.key": b"tls"}
    file = enrolment(tmp_path / "pi.tar.gz", members)
    assert init(tmp_path / "home", "--from", file, "--data-dir", "elsewhere", "--json") == 0
    assert json.loads(capsys.readouterr().out)["key"] == key.public.text
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "home").iterdir()}
    assert modes["device-tls.key"] == modes["device.key"] == "0o600"
    assert config.load(tmp_path / "home" / "outstation.toml").data_dir == tmp_path / "home" / "elsewhere"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"outstation.toml": template(), "../evil": b"x"}, "'../evil' does not belong"),
        ({"outstation.toml": template(), "notes": b"x"}, "'notes' does not belong"),
        ({"ca.pem": b"x"}, "no outstation.toml in it"),
        ({"outstation.toml": b"x" * (2 << 20)}, "'outstation.toml' does not belong"),
    ],
)
def test_an_enrolment_file_with_anything_else_in_it_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: dict[str, bytes], message: str
) -> None:
    file = enrolment(tmp_path / "pi.tar.gz", members)
    assert init(tmp_path / "home", "--from", file) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "evil").exists()


def test_an_enrolment_file_that_is_damaged_or_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = enrolment(tmp_path / "good.tar.gz", {"outstation.toml": template()}).read_bytes()
    file = tmp_path / "pi.tar.gz"
    for content in (None, b"", b"not a tar", good[:-20], good[:40], good[:60] + b"\xff" * 9 + good[69:]):
        if content is not None:
            file.write_bytes(content)
        assert init(tmp_path / "home", "--from", file) == 2
        assert f"{file}: not readable as an enrolment file" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()

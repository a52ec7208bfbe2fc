"""Commands `outstation join`, `fleet token`, `fleet enrol --request`, `init --from`: keys never leave the device."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.cli import main
from agent.wire import keys


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def documents(capsys: pytest.CaptureFixture[str]) -> Any:
    def document(*arguments: object) -> Any:
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return document


def test_a_device_joins_with_a_token_and_its_keys_stay_with_it(tmp_path: Path, documents: Any) -> None:
    fleet, device, bundle = tmp_path / "acme", tmp_path / "pi", tmp_path / "pi-07.tar.gz"
    documents("fleet", "init", fleet, "--broker", "mqtts://broker")
    token = documents("fleet", "token", "pi-07", "--dir", fleet)["token"]
    joined = documents("join", device, "--fleet", "acme", "--id", "pi-07", "--token", token)
    before = {path.name: path.read_bytes() for path in device.iterdir()}
    assert stat.S_IMODE((device / "device-tls.key").stat().st_mode) == 0o600
    request = joined["request"]
    done = documents("fleet", "enrol", "pi-07", "--request", request, "--bundle-out", bundle, "--dir", fleet)
    assert (done["made_by"], done["thumbprint"]) == ("device", joined["thumbprint"])
    assert documents("init", device, "--from", bundle)["key"] == joined["key"]
    assert {name: (device / name).read_bytes() for name in before} == before
    assert not any(before["device.key"] in path.read_bytes() for path in fleet.rglob("*") if path.is_file())


def test_joining_again_keeps_the_keys(tmp_path: Path, documents: Any) -> None:
    first = documents("join", tmp_path, "--fleet", "acme", "--id", "pi-07")
    assert documents("join", tmp_path, "--fleet", "acme", "--id", "pi-07") == first
    assert keys.load_private(tmp_path / "device.key").public.kid == first["thumbprint"]


def test_files_that_answer_another_devices_request_are_refused(
    tmp_path: Path, documents: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, bundle, other = tmp_path / "acme", tmp_path / "pi-07.tar.gz", tmp_path / "other"
    documents("fleet", "init", fleet, "--broker", "mqtts://broker")
    joined = documents("join", tmp_path / "pi", "--fleet", "acme", "--id", "pi-07")
    words = ("--request", joined["request"], "--thumbprint", joined["thumbprint"], "--bundle-out", bundle)
    documents("fleet", "enrol", "pi-07", *words, "--dir", fleet)
    assert run("init", tmp_path / "empty", "--from", bundle) == 2
    assert "has no device.key" in capsys.readouterr().err
    documents("join", other, "--fleet", "acme", "--id", "pi-07")
    assert run("init", other, "--from", bundle) == 2
    assert "answers another request" in capsys.readouterr().err
    assert not (other / "outstation.toml").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--id", "Pi", "--fleet", "acme"], "--id 'Pi'"), (["--id", "pi", "--fleet", "a", "--token", "x"], "--token")],
)
def test_wrong_use_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert run("join", tmp_path, *words) == 2
    assert problem in capsys.readouterr().err

"""`outstation check` looks at the repository as the daemon would, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from outstation.__main__ import main
from outstation.device.cli import check
from outstation.foundation.errors import FetchFailed
from tests.kit.update_repositories import Signed
from tests.kit.update_servers import Web
from tests.kit.updating import Updating


def finding(folder: Path, url: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the finding of the check on updates."""
    file = folder / "outstation.toml"
    with pytest.raises(SystemExit) as made:
        main(["init", str(folder), "--id", "pi-07"])
    assert made.value.code == 0
    with file.open("a", encoding="utf-8") as config:
        config.write(f'\n[updates]\nurl = "{url}"\n')
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["check", "-c", str(file), "--json"])
    findings = msgspec.json.decode(capsys.readouterr().out, type=list[dict[str, str]])
    return next(entry for entry in findings if entry["name"] == "updates")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "device"


def test_the_check_names_the_repository_and_its_expiry(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = Signed()
    with Web(repository.write(tmp_path / "web")) as web:
        folder.mkdir()
        (folder / "root.json").write_bytes(repository.files["1.root.json"])
        result = finding(folder, web.url, capsys)
        assert result["state"] == "ok", result
        assert f"{web.url}, root 1, timestamp 1, valid until " in result["detail"]
        assert list(folder.rglob("timestamp.json")) == []


def test_the_check_says_what_is_missing(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Web(tmp_path / "web") as web:
        result = finding(folder, web.url, capsys)
        assert result["state"] == "failed"
        assert result["detail"].startswith("MissingRoot: [updates] root ")


def test_the_check_uses_the_stored_floors(tmp_path: Path) -> None:
    repository = Signed()
    older = repository.copy()
    with Web(tmp_path / "web") as web:
        with Updating(tmp_path / "device", web.url, repository.files["1.root.json"]) as device:
            wanted = repository.add("exercise", "1.0.0", b"an archive")
            repository.write(web.folder)
            device.must_fetch(wanted)
            conf = device.conf
        assert conf.updates is not None
        assert "timestamp 2" in check.inspect_repository(conf, conf.updates)
        older.write(web.folder)
        with pytest.raises(FetchFailed, match="BadVersionNumberError: timestamp has version 1"):
            check.inspect_repository(conf, conf.updates)

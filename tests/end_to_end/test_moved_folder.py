"""The ground moved under a running daemon: it stops with the reason, and what it acknowledged is still there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.device.cli import run
from outstation.device.config.config import load as load_config
from outstation.device.daemon import Daemon
from outstation.device.signals import Signals
from outstation.foundation.errors import StorageError, StorageMoved
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess
from tests.kit.commands import call_outstation
from tests.kit.stations import Line

STREAM = '\n[streams.numbers]\nfields = [{ name = "n", type = "i64" }]\nsource = { kind = "socket" }\n'


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[OutstationProcess]:
    home = tmp_path / "home"
    assert call_outstation("init", str(home), "--id", "pi-07").returncode == 0
    config = home / "outstation.toml"
    text = config.read_text().replace('delivery = "collector"', 'delivery = "broker"')
    config.write_text(text + STREAM)
    process = OutstationProcess(tmp_path / "log", "run", "-c", str(config))
    yield process
    process.kill()


@pytest.mark.parametrize("error", [StorageError("disk I/O error"), FileNotFoundError(2, "No such file or directory")])
def test_a_folder_that_moves_after_the_check_of_a_transaction_is_the_reason(
    tmp_path: Path, daemon: OutstationProcess, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config, data = tmp_path / "home" / "outstation.toml", tmp_path / "home" / "data"

    def move_and_fail(_daemon: Daemon) -> None:
        data.rename(tmp_path / "former")
        raise error

    monkeypatch.setattr(Daemon, "begin", move_and_fail)
    with pytest.raises(StorageMoved, match="it was moved to"):
        run._run(config, load_config(config), Signals())
    assert not data.exists()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as attempt:
        return attempt.connect_ex(str(path)) == 0


def send(path: Path, numbers: range) -> int:
    """Send numbers as the named client; return how many of its lines were stored before."""
    with Line(path) as line:
        line.send({"client": "sensor"})
        stored = int(line.answer()["through"])
        line.send(*({"stream": "numbers", "n": n} for n in numbers))
        line.through(stored + len(numbers))
        return stored


def test_a_data_folder_moved_away_stops_the_daemon_with_the_reason(tmp_path: Path, daemon: OutstationProcess) -> None:
    data, former = tmp_path / "home" / "data", tmp_path / "former"
    daemon.start()
    wait_until("it listens", lambda: listens(data / "intake.sock"))
    assert send(data / "intake.sock", range(200)) == 0
    data.rename(former)
    assert daemon.wait(20) == 3
    assert not data.exists()
    [reason] = [line for line in daemon.log.read_text().splitlines() if line.startswith("outstation:")]
    assert f"{data}: no longer the data folder that was opened: it was moved to {former}" in reason
    assert "Traceback" not in daemon.log.read_text()
    # A supervisor that starts it again gets no empty store.
    daemon.start()
    assert daemon.wait(20) == 3
    assert not data.exists()
    assert "put it back, or delete" in daemon.log.read_text()
    former.rename(data)
    daemon.start()
    wait_until("it listens", lambda: listens(data / "intake.sock"))
    assert send(data / "intake.sock", range(1)) == 200
    assert daemon.stop() == 0
    assert sorted(path.name for path in data.parent.iterdir()) == [
        "data",
        "device.key",
        "device.key.pub",
        "outstation.toml",
    ]

"""Command `outstation run`: the previous daemon is gone when it starts over, and SIGHUP reloads the config."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outstation.device import config
from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.cli import processing, run
from outstation.device.config.config import Config
from outstation.device.daemon import Daemon
from outstation.device.signals import Signals
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import ConfigError, StorageForked
from tests.kit.commands import call_outstation


def test_a_daemon_ends_before_the_next_one_starts_in_a_new_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call_outstation("init", str(tmp_path), "--id", "pi-07").returncode == 0
    made, before = [], [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]

    class Forking:
        signals = Signals()

        def run(self) -> None:
            made.append(weakref.ref(self))
            if len(made) == 1:
                raise StorageForked("the store went back in time")

    def daemon(*_: Any) -> Forking:
        assert [reference() for reference in made] == [None] * len(made)
        assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
        return Forking()

    monkeypatch.setattr(run, "build_daemon", daemon)
    done = CliRunner().invoke(processing.run, ["-c", str(tmp_path / "outstation.toml")], catch_exceptions=False)
    assert (done.exit_code, len(made)) == (0, 2)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Folder with the config of a device without a fleet."""
    assert call_outstation("init", str(tmp_path), "--id", "pi-07").returncode == 0
    file = tmp_path / "outstation.toml"
    text = file.read_text().replace('delivery = "collector"', 'delivery = "broker"')
    file.write_text(text.replace('poll_interval = "10 s"', 'poll_interval = "100 ms"'))
    return tmp_path


def run_with_edits(home: Path, edits: Sequence[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Run the real daemon; each time its loop runs, apply the next edit and reload. Return the configs that ran."""
    file, waiting = home / "outstation.toml", list(edits)
    ran: list[Config] = []

    def build_and_edit(path: Path, conf: Config, store: Store) -> Daemon:
        daemon = build_daemon(path, conf, store)
        tick = daemon.tick

        def tick_and_edit(now: ClockReading) -> float:
            if not ran or ran[-1] is not conf:
                ran.append(conf)
            wait = tick(now)
            if not store.last_row("host"):
                return 0.05
            if waiting:
                old, new = waiting.pop(0)
                text = file.read_text()
                assert old in text
                file.write_text(text.replace(old, new))
                os.kill(os.getpid(), signal.SIGHUP)
            elif not daemon.signals.is_reload_requested:
                os.kill(os.getpid(), signal.SIGTERM)
            return wait

        monkeypatch.setattr(daemon, "tick", tick_and_edit)
        return daemon

    monkeypatch.setattr(run, "build_daemon", build_and_edit)
    done = CliRunner().invoke(processing.run, ["-c", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return ran


def read_messages(home: Path) -> list[Any]:
    with contextlib.closing(sqlite3.connect(home / "data" / "outstation.db")) as db:
        return db.execute("SELECT count(*), min(seq), max(seq) FROM outbox").fetchall()


def test_a_reload_runs_the_new_streams_over_the_same_store_and_outbox(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = '[streams.door]\nfields = [{ name = "open" }]\n\n[streams.host]'
    first, second = run_with_edits(home, [("[streams.host]", stream)], monkeypatch)
    assert (set(first.streams), set(second.streams)) == ({"host"}, {"host", "door"})
    ((count, lowest, highest),) = read_messages(home)
    # Two starts, two stops and their health, none of which was delivered: there is no broker.
    assert count == highest - lowest + 1 >= 6
    assert {thread for thread in threading.enumerate() if not thread.daemon} == {threading.main_thread()}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[streams.host]", "[streams.host", "TOML"),
        ('id = "pi-07"', 'id = "pi-08"', "restart it to change this"),
        ('{ name = "load1", min = 0 }', '{ name = "load1", type = "category" }', "in force"),
    ],
)
def test_a_reload_with_a_wrong_config_leaves_the_daemon_at_work(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, old: str, new: str, problem: str
) -> None:
    ran = run_with_edits(home, [(old, new)], monkeypatch)
    assert problem in caplog.text
    assert ran == [ran[0]] * len(ran)


HA = '\n[homeassistant]\nverdicts = "anna"\n'


def test_check_refuses_buttons_on_a_broker_that_asks_nobody_for_a_name(home: Path) -> None:
    file = home / "outstation.toml"
    file.write_text(file.read_text() + HA)
    with pytest.raises(ConfigError, match="anybody could press"):
        config.load(file)


def test_a_reload_to_a_port_in_use_brings_the_daemon_before_back(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tcp = f'[intake]\ntcp = "127.0.0.1:{taken.getsockname()[1]}"\n\n[streams.host]'
        ran = run_with_edits(home, [("[streams.host]", tcp)], monkeypatch)
    assert "the config before is in force again" in caplog.text
    assert "choose another port" in caplog.text
    assert [conf.intake.tcp for conf in ran] == [None], "the config before runs again"


@pytest.mark.parametrize(("signum", "runs"), [(signal.SIGTERM, 1), (signal.SIGHUP, 3)])
def test_a_signal_during_the_shutdown_of_a_reload_is_not_lost(
    home: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, runs: int
) -> None:
    file, shut_down, ended = home / "outstation.toml", Daemon._shut_down, list[Signals]()

    def shut_down_and_signal(daemon: Daemon) -> None:
        shut_down(daemon)
        ended.append(daemon.signals)
        if len(ended) == 1:
            file.write_text(file.read_text().replace("[streams.late]", "[streams.later]"))
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Daemon, "_shut_down", shut_down_and_signal)
    late = '[streams.late]\nfields = [{ name = "open" }]\n\n[streams.host]'
    ran = run_with_edits(home, [("[streams.host]", late)], monkeypatch)
    assert len(ran) == len(ended) == runs
    assert signum == signal.SIGTERM or "later" in ran[-1].streams

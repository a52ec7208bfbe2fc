"""Notifications of a device: its own alerts, over restarts and damage of the file that remembers them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from outstation.device.bootstrap import daemon
from outstation.device.bootstrap.device import load_config
from outstation.device.notifications import DeviceAlertSource, NotifyFile, open_notifications
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.cli.commands import cli
from outstation.foundation.errors import StorageError
from outstation.integrations.notify.config import DATABASE, NotifyConfig, WebhookTarget
from outstation.integrations.notify.notifier import Notifier, NotifierThread
from outstation.protocol.alerts.kinds import DEADLINE_MISSED, KEY_REVOKED, RATE_DRIFT
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.patience import Patience, wait_until
from tests.integrations.notify.servers import HookServer, hook_server, is_idle

NOW_S = 1.8e9


@pytest.fixture
def hook() -> Iterator[HookServer]:
    with hook_server() as opened:
        yield opened


class Device:
    def __init__(self, folder: Path, hook: HookServer) -> None:
        self.folder, self.now_s = folder, NOW_S
        self.config = NotifyConfig(targets={"hook": WebhookTarget(url=hook.url)})
        self.hook = hook
        self.store: Store = open_store(folder, max_size=2**24)
        self.log = MessageLog("acme", "pi-07", new_key(1), self.store.log_id, self.store.boot, 100_000)

    def source(self) -> DeviceAlertSource:
        return DeviceAlertSource(self.store, self.log, "acme", "pi-07", clock.read)

    def alert(self, state: str = "raised", **evidence: Any) -> None:
        alert = (RATE_DRIFT.raised if state == "raised" else RATE_DRIFT.cleared)("All signals move faster.", count=1)
        with self.store.transaction() as tx:
            self.log.append(tx, "alerts", "exercise", alert.to_body("exercise", **evidence), clock.read())

    def notify(self, turns: int = 6) -> list[str]:
        """Start a notifier, let it turn, and return what arrived."""
        before = len(self.hook.posts)
        with open_notifications(self.folder, self.source()) as (file, source):
            notifier = Notifier(self.config, file, source, now_s=lambda: self.now_s)
            for _ in range(turns):
                self.now_s += 40
                notifier.tick()
                wait_until("idle workers, or an outcome", lambda: is_idle(notifier))
            notifier.tick()
            notifier.stop()
        return [json.loads(post.body)["subject"] for post in self.hook.posts[before:]]


@pytest.fixture
def device(tmp_path: Path, hook: HookServer) -> Iterator[Device]:
    made = Device(tmp_path, hook)
    yield made
    made.store.close()


def test_a_devices_alert_is_sent_once_and_its_recovery_once(device: Device) -> None:
    device.alert()
    assert device.notify() == ["[warning] pi-07: All signals move faster."]
    assert device.notify() == []
    device.alert("cleared")
    assert device.notify() == ["[warning] pi-07: cleared: All signals move faster."]
    assert device.notify() == []


def test_a_damaged_file_is_replaced_and_open_alerts_are_sent_again(device: Device) -> None:
    device.alert()
    device.notify()
    (device.folder / DATABASE).write_bytes(b"no database" * 1000)
    (device.folder / f"{DATABASE}-wal").unlink(missing_ok=True)
    assert device.notify() == ["[warning] pi-07: All signals move faster."]


def test_damage_that_shows_after_opening_is_replaced_too(device: Device) -> None:
    device.alert()
    device.notify()
    file = device.folder / DATABASE
    with contextlib.closing(sqlite3.connect(file)) as db:
        [(page,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'notify_ledger'")
        [(size,)] = db.execute("PRAGMA page_size")
    data = file.read_bytes()
    file.write_bytes(data[: (page - 1) * size] + b"\xff" * size + data[page * size :])
    with pytest.raises(StorageError, match="malformed"):
        device.notify()
    assert device.notify() == ["[warning] pi-07: All signals move faster."]


def test_an_alert_raised_and_cleared_before_a_failed_write_is_sent(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.notify()
    source = device.source()
    monkeypatch.setattr(device, "source", lambda: source)
    device.alert()
    device.alert("cleared")
    with contextlib.closing(sqlite3.connect(device.folder / DATABASE)) as db:
        db.execute("CREATE TRIGGER full BEFORE UPDATE ON notify_cursor BEGIN SELECT RAISE(ABORT, 'full'); END")
        with pytest.raises(StorageError, match="full"):
            device.notify()
        db.execute("DROP TRIGGER full")
    assert device.notify() == ["[warning] pi-07: cleared: All signals move faster."]


@pytest.mark.parametrize("name", ["SQLITE_FULL", "SQLITE_IOERR_READ", "SQLITE_BUSY"])
def test_a_file_that_cannot_be_opened_now_is_not_replaced(
    device: Device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    device.notify()
    before = (device.folder / DATABASE).read_bytes()

    def refuse(_: NotifyFile) -> sqlite3.Connection:
        error = sqlite3.OperationalError("not now")
        error.sqlite_errorname = name
        raise error

    monkeypatch.setattr(NotifyFile, "_open", refuse)
    with pytest.raises(StorageError):
        NotifyFile(device.folder)
    assert (device.folder / DATABASE).read_bytes() == before


def test_a_target_that_fails_is_an_alert_in_the_devices_log(device: Device, hook: HookServer) -> None:
    hook.status = 503
    device.alert()
    device.notify(40)
    [alert] = [alert for alert in device.store.recent_alerts(10) if alert["alert"] == "notify"]
    assert (alert["state"], alert["subject"], alert["severity"]) == ("raised", "hook", "warning")
    hook.status = 200
    device.now_s += 4000
    device.notify()
    assert [a["state"] for a in device.store.recent_alerts(10) if a["alert"] == "notify"] == ["cleared", "raised"]


@pytest.mark.parametrize("is_removed", [True, False])
def test_the_alert_of_a_failing_target_ends_with_its_config_or_its_file(
    device: Device, hook: HookServer, tmp_path: Path, is_removed: bool
) -> None:
    hook.status = 503
    device.alert()
    device.notify(40)
    file = device.folder / DATABASE
    if is_removed:
        assert CliRunner().invoke(cli, ["init", str(tmp_path / "d")]).exit_code == 0
        _, conf = load_config(str(tmp_path / "d" / "outstation.toml"))
        placed = msgspec.structs.replace(conf.device, data_dir=str(device.folder))
        conf = msgspec.structs.replace(conf, device=placed)
        assert daemon._build_notifier(conf, device.store, device.log, clock.read) is None
        assert not file.exists()
    else:
        file.write_bytes(b"no database" * 1000)
        device.notify(1)
    assert [a["state"] for a in device.store.recent_alerts(10) if a["alert"] == "notify"] == ["cleared", "raised"]


def test_the_thread_tells_within_seconds_and_ends(device: Device, hook: HookServer) -> None:
    source = device.source()
    thread = NotifierThread(device.config, lambda: open_notifications(device.folder, source))
    thread.start()
    device.alert()
    wait_until("the post", lambda: hook.posts)
    patience = Patience(20.0)
    thread.stop()
    assert not patience.is_over()


def test_events_are_not_repeated() -> None:
    assert KEY_REVOKED.is_event
    assert not DEADLINE_MISSED.is_event


def test_the_command_tests_targets_and_shows_what_waits(tmp_path: Path, hook: HookServer) -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["init", str(tmp_path / "d")]).exit_code == 0
    file = tmp_path / "d" / "outstation.toml"
    text = file.read_text(encoding="utf-8")
    (tmp_path / "d" / "hook.secret").write_text("geheim")
    targets = f'[notify.targets.hook]\nkind = "webhook"\nurl = "{hook.url}"\nsecret_file = "hook.secret"\n'
    file.write_text(f"{text}\n{targets}", encoding="utf-8")

    def run(*args: str) -> Any:
        return runner.invoke(cli, [*args, "-c", str(file)])

    assert "ok after" in run("notify", "test").output
    assert json.loads(hook.posts[0].body)["kind"] == "test"
    hook.status = 500
    failed = run("notify", "test", "hook", "--json")
    assert failed.exit_code == 1
    assert "answers 500" in json.loads(failed.output)[0]["error"]
    assert json.loads(run("notify", "status", "--json").output)[0]["waiting"] == 0
    checked = run("check", "--json").output
    [line] = [line for line in json.loads(checked) if line["name"] == "notify hook"]
    assert "chmod 600" in line["detail"]
    assert "geheim" not in checked + failed.output
    assert "t0k3n" not in checked + failed.output

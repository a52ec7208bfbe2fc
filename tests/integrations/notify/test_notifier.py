"""Notifier on a fleet database and real servers: told once for each state, over restarts, faults and kills."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.rebuild import rebuild
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents import incidents
from outstation.fleet.incidents.notify_source import NOTIFIER_JOB, FleetAlertSource, open_source
from outstation.foundation import clock
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import StorageError
from outstation.integrations.notify import delivery, queue
from outstation.integrations.notify import notifier as notifying
from outstation.integrations.notify.alert_source import AlertSource
from outstation.integrations.notify.config import NotifyConfig, NotifyRoute, WebhookTarget
from outstation.integrations.notify.notifier import Notifier, NotifierThread
from outstation.protocol.alerts.incident import Incident
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from outstation.workbench.testing.patience import wait_until
from tests.integrations.notify.servers import HookServer, hook_server, is_idle

AX, AY = "exercise/ax/drift/1", "exercise/ay/drift/1"
NOON_S = datetime(2026, 11, 24, 12, 0, tzinfo=UTC).timestamp()
DAY_S = 86_400.0


@pytest.fixture
def store(fresh: Callable[[], FleetStore]) -> Iterator[FleetStore]:
    with fresh() as opened:
        yield opened


@pytest.fixture
def hook() -> Iterator[HookServer]:
    with hook_server() as opened:
        yield opened


class Desk:
    """A fleet whose notifier tells one webhook, on a clock that tests turn."""

    def __init__(self, store: FleetStore, hook: HookServer, **config: Any) -> None:
        self.store, self.hook, self.now_s = store, hook, NOON_S
        route = NotifyRoute(targets=["hook"], **config.pop("route", {}))
        targets = {"hook": WebhookTarget(url=hook.url), **config.pop("targets", {})}
        self.config = NotifyConfig(targets=targets, routes=[route], **config)
        self.senders: dict[str, MessageSender] = {}
        self.notifier = self.start()

    def start(self) -> Notifier:
        source = FleetAlertSource(self.store, "acme", needs_groups=True)
        return Notifier(self.config, self.store, source, now_s=lambda: self.now_s)

    def restart(self) -> None:
        self.notifier.stop()
        self.notifier = self.start()

    def alert(self, identity: str = AX, device: str = "pi-07", **members: Any) -> None:
        self.add(device, lambda sender: sender.alert(identity, **members))

    def add(self, device: str, make: Callable[[MessageSender], SignedMessage]) -> None:
        if device not in self.senders:
            self.senders[device] = MessageSender(device)
            self.store.enrol(device, self.senders[device].key.public, replace=False, now=self.time())
        sender = self.senders[device]
        self.store.ingest([Arrival(sender.verify(make(sender)))], [], self.time())

    def time(self) -> str:
        return clock.to_rfc3339(round(self.now_s * 1e6))

    def turn(self, seconds: float = 60.0, step: float = 10.0) -> list[str]:
        """Let time pass; return the subjects that arrived meanwhile."""
        before = len(self.hook.posts)
        for _ in range(max(1, round(seconds / step))):
            self.now_s += step
            self.notifier.tick()
            self.wait_idle()
            self.notifier.tick()
        return [json.loads(post.body)["subject"] for post in self.hook.posts[before:]]

    def wait_idle(self) -> None:
        wait_until("idle workers, or an outcome", lambda: is_idle(self.notifier))

    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(post.body) for post in self.hook.posts]

    def keys(self) -> list[str]:
        return [post.headers["idempotency-key"] for post in self.hook.posts]


def test_an_alert_is_sent_once_and_its_recovery_once(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    desk.alert()
    assert desk.turn() == ["[warning] pi-07: ax: gain loss."]
    desk.restart()
    assert desk.turn() == []
    desk.alert(state="cleared", severity="info", summary="ax: as before.")
    assert desk.turn() == ["[warning] pi-07: cleared: ax: gain loss."]
    desk.restart()
    assert desk.turn(600) == []
    assert audit(store).passed
    with store.snapshot() as db:
        assert queue.load_ledger(db) == {}


def test_an_alert_that_was_over_before_anybody_was_notified_is_sent_with_its_end(
    store: FleetStore, hook: HookServer
) -> None:
    desk = Desk(store, hook)
    desk.turn()
    desk.alert()
    desk.alert(state="cleared", severity="info", summary="ax: as before.")
    assert desk.turn() == ["[warning] pi-07: cleared: ax: gain loss."]
    assert "cleared 2026-11-24 22:18:01 UTC: ax: as before." in desk.documents()[0]["text"]


def test_a_revoked_key_is_sent_once(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook, remind_every=Duration(86_400))
    desk.alert(state="cleared")
    desk.turn()
    [kid] = store.revoke("pi-07", None, desk.time())
    assert [f"Key {kid[:20]}" in subject for subject in desk.turn()] == [True]
    assert desk.turn(3 * 86_400, step=3_600) == []


def test_an_alert_of_a_log_that_ended_is_over_at_no_certain_time(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    desk.alert()
    desk.turn()
    desk.senders["pi-07"] = sender = MessageSender("pi-07")
    store.enrol("pi-07", sender.key.public, replace=True, now=desk.time())
    desk.add("pi-07", lambda sender: sender.alert(state="cleared"))
    desk.turn()
    [text] = [document["text"] for document in desk.documents() if document["kind"] == "recovery"]
    assert "[cleared] pi-07" in text
    assert "UTC; no message cleared it: another log took the place of its log" in text


def test_an_alert_that_a_message_without_a_text_cleared_is_over_at_its_time(
    store: FleetStore, hook: HookServer
) -> None:
    desk = Desk(store, hook)
    desk.alert()
    desk.turn()
    desk.add("pi-07", lambda sender: sender.alert(state="cleared", summary=""))
    desk.turn()
    [text] = [document["text"] for document in desk.documents() if document["kind"] == "recovery"]
    assert "UTC, cleared 20" in text
    assert "no message cleared it" not in text


def test_an_alert_that_becomes_worse_is_sent_again(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    desk.alert()
    desk.turn()
    desk.alert(revision=2, summary="ax: twice as far.")
    assert desk.turn() == ["[warning] pi-07: ax: twice as far."]


def test_alerts_of_one_device_are_one_message_and_many_devices_too(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    desk.alert(AX)
    desk.alert(AY, summary="ay: gain loss.", severity="critical")
    assert desk.turn() == ["[critical] pi-07: 2 alerts: ay: gain loss."]
    for i in range(40):
        desk.alert(device=f"pi-1{i:02d}")
    assert desk.turn() == ["[warning] 40 alerts on 40 devices, pi-100: ax: gain loss."]
    document = desk.documents()[-1]
    assert (len(document["alerts"]), document["omitted"]) == (20, 20)


def test_a_target_is_notified_at_most_once_in_the_window(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook, group_for=Duration(300))
    desk.alert(AX)
    assert len(desk.turn(20)) == 1
    for i in range(5):
        desk.alert(f"exercise/f{i}/drift/1")
        assert desk.turn(40) == []
    assert desk.turn(120) == ["[warning] pi-07: 5 alerts: ax: gain loss."]


def test_routes_choose_by_severity_device_group_and_kind(store: FleetStore, hook: HookServer) -> None:
    route = {"severity": "warning", "devices": ["pi-*"], "groups": ["hall-2"], "kinds": ["drift/a?"]}
    desk = Desk(store, hook, route=route)
    for device in ("pi-07", "cam-01", "pi-08"):
        groups = [] if device == "pi-08" else ["hall-2"]
        desk.add(device, lambda sender, g=groups: sender.append("health", groups=g))  # type: ignore[misc]
        desk.alert(device=device)
    desk.alert("exercise/x/drift/1", subject="x")
    desk.alert("exercise/ay/drift/2", subject="ay", severity="info")
    desk.turn()
    assert [(a["device"], a["subject"]) for d in desk.documents() for a in d["alerts"]] == [("pi-07", "ax")]


def test_quiet_hours_hold_back_what_is_not_critical(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook, quiet_hours="13:00-07:00", time_zone="Europe/Berlin")
    desk.alert(AX)
    desk.alert(AY, severity="critical", summary="ay: broken.")
    assert desk.turn() == ["[critical] pi-07: ay: broken."]
    desk.now_s = datetime(2026, 11, 25, 5, 58, tzinfo=UTC).timestamp()
    assert desk.turn(60) == []
    assert desk.turn(120) == ["[warning] pi-07: ax: gain loss."]


def test_a_digest_joins_the_changes_of_a_day(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook, route={"delivery": "digest"}, digest_at="08:00")
    desk.alert(AX)
    desk.turn()
    desk.alert(AY, device="pi-08")
    assert desk.turn() == []
    desk.now_s = datetime(2026, 11, 25, 8, 0, tzinfo=UTC).timestamp()
    assert desk.turn() == ["acme: 2 changes of alerts on 2 devices"]
    desk.now_s += DAY_S
    assert desk.turn() == ["acme: 2 changes of alerts on 2 devices"]
    assert {a["change"] for a in desk.documents()[-1]["alerts"]} == {"reminder"}


def test_reminders_come_until_somebody_acknowledges(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook, remind_every=Duration(3600))
    desk.alert()
    desk.turn()
    for _ in range(2):
        desk.now_s += 3600
        assert desk.turn() == ["[warning] pi-07: still open: ax: gain loss."]
    assert len(set(desk.keys())) == 3
    [incident] = incidents.list_incidents(store, now=desk.time())
    incidents.acknowledge(store, incident, by="eva", now=desk.time())
    desk.now_s += 2 * DAY_S
    assert desk.turn() == []
    desk.alert(revision=2, summary="worse.")
    assert desk.turn() == ["[warning] pi-07: worse."]


def test_an_alert_that_somebody_acknowledged_before_it_was_sent_is_over_in_silence(
    store: FleetStore, hook: HookServer
) -> None:
    desk = Desk(store, hook, quiet_hours="11:00-13:00")
    desk.alert()
    assert desk.turn() == []
    [incident] = incidents.list_incidents(store, now=desk.time())
    incidents.acknowledge(store, incident, by="eva", now=desk.time())
    desk.now_s += 4 * 3600
    assert desk.turn() == []
    desk.alert(state="cleared")
    assert desk.turn() == []


def test_a_muted_alert_is_sent_when_its_mute_ends(
    store: FleetStore, hook: HookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(store, hook)
    monkeypatch.setattr("outstation.foundation.clock.now_rfc3339", desk.time)
    for identity in (AX, AY):
        desk.alert(identity, summary=identity)
    until = clock.to_rfc3339(round((desk.now_s + 3600) * 1e6))
    for incident in incidents.list_incidents(store, now=desk.time()):
        incidents.mute(store, incident, until=until, by="eva", now=desk.time())
    assert desk.turn() == []
    desk.alert(AY, state="cleared")
    assert desk.turn() == []
    desk.now_s += 3600
    assert desk.turn() == [f"[warning] pi-07: {AX}"]


def test_a_target_that_fails_gets_every_state_later_and_is_an_alert_of_its_own(
    store: FleetStore, hook: HookServer
) -> None:
    with hook_server() as other:
        desk = Desk(store, hook, targets={"other": WebhookTarget(url=other.url)})
        desk.config.routes.append(NotifyRoute(targets=["other"]))
        hook.status = 503
        desk.alert(AX)
        desk.turn(2400)
        assert len(set(desk.keys())) == 1
        assert 3 <= len(desk.keys()) <= 20
        subjects = [json.loads(post.body)["subject"] for post in other.posts]
        assert subjects[0] == "[warning] pi-07: ax: gain loss."
        assert subjects[1].startswith("[warning] acme: Notifications to hook fail: http://127.0.0.1")
        desk.alert(AX, state="cleared")
        hook.status = 200
        hook.posts.clear()
        desk.now_s += 3600
        desk.turn(600)
        assert [d["kind"] for d in desk.documents()] == ["alerts", "recovery"]
        assert [d["alerts"][0]["alert"] for d in desk.documents()] == ["drift", "drift"]
        assert [i.alert for i in incidents.list_incidents(store, now=desk.time())] == []


def test_a_failing_target_that_the_config_no_longer_names_is_no_alert_any_more(
    store: FleetStore, hook: HookServer
) -> None:
    desk = Desk(store, hook)
    hook.status = 503
    desk.alert(AX)
    desk.turn(2400)
    assert "notify" in {i.alert for i in incidents.list_incidents(store, now=desk.time())}
    desk.config.targets["renamed"] = desk.config.targets.pop("hook")
    desk.config.routes[0] = NotifyRoute(targets=["renamed"])
    desk.restart()
    desk.notifier.tick()
    assert {i.alert for i in incidents.list_incidents(store, now=desk.time())} == {"drift"}


def test_a_process_killed_before_it_marked_a_failing_target_raises_its_alert_later(
    store: FleetStore, hook: HookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(store, hook)
    hook.status = 503
    desk.alert(AX)
    with monkeypatch.context() as patch:
        patch.setattr(FleetAlertSource, "report_target", fail)
        with pytest.raises(StorageError):
            desk.turn(3600)
    desk.restart()
    desk.turn(600)
    assert "notify" in {i.alert for i in incidents.list_incidents(store, now=desk.time())}


def fail(*args: Any) -> None:
    raise StorageError("the disk is gone")


def test_an_alert_about_a_target_of_a_device_goes_to_the_target_with_the_same_name(
    store: FleetStore, hook: HookServer
) -> None:
    desk = Desk(store, hook)
    desk.alert("notify/hook", alert="notify", subject="hook")
    assert len(desk.turn()) == 1


def test_a_dead_target_costs_a_bounded_number_of_messages(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    hook.status = 503
    for i in range(60):
        desk.alert(f"exercise/f{i}/drift/1", summary=f"f{i}")
        desk.turn(60, 30)
    with store.snapshot() as db:
        assert queue.count_waiting(db)["hook"][0] == notifying.MAX_WAITING
        size = db.execute("SELECT sum(length(body)) FROM notify_queue").fetchone()[0]
    assert size < notifying.MAX_WAITING * 40_000
    hook.status = 200
    desk.now_s += 3600
    hook.posts.clear()
    desk.turn(1800, 30)
    summaries = [a["summary"] for d in desk.documents() for a in d["alerts"]]
    omitted = sum(d["omitted"] for d in desk.documents())
    assert len(summaries) == len(set(summaries))
    assert len(summaries) + omitted == 60


def test_a_message_that_the_target_rejects_does_not_block_the_next(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    hook.status = 413
    desk.alert(AX)
    desk.turn(120)
    hook.status = 200
    hook.posts.clear()
    desk.alert(AY, summary="ay: gain loss.")
    assert desk.turn(120) == ["[warning] pi-07: ay: gain loss."]
    with store.snapshot() as db:
        assert queue.load_targets(db)["hook"].rejected == 1


def test_a_target_that_hangs_delays_no_other(
    store: FleetStore, hook: HookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the test waits: nothing but another thread may send to the other.
    monkeypatch.setattr("outstation.integrations.notify.webhook.TIMEOUT_S", 600.0)
    monkeypatch.setattr(
        "outstation.integrations.notify.webhook.limit_total", partial(delivery.limit_total, seconds=600.0)
    )
    with hook_server() as other:
        desk = Desk(store, hook, targets={"other": WebhookTarget(url=other.url)})
        desk.config.routes.append(NotifyRoute(targets=["other"]))
        answer = threading.Event()
        hook.on_post = lambda _: answer.wait(600)
        desk.alert()
        desk.now_s += 2
        desk.notifier.tick()
        desk.now_s += 2
        desk.notifier.tick()
        wait_until("the post to the other", lambda: other.posts)
        answer.set()
        desk.wait_idle()


def test_a_database_that_fails_meanwhile_loses_nothing(
    store: FleetStore, hook: HookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(store, hook)
    desk.alert()
    desk.turn(20)
    real = queue.delete_message
    monkeypatch.setattr(queue, "delete_message", fail)
    desk.alert(AY, summary="ay: gain loss.")
    with pytest.raises(StorageError):
        desk.turn(120)
    monkeypatch.setattr(queue, "delete_message", real)
    desk.turn(120)
    assert len(hook.posts) == 2
    assert len(set(desk.keys())) == 2


def test_a_clock_that_is_set_back_silences_nothing(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    hook.status = 503
    desk.alert(AX)
    desk.turn(600)
    hook.status = 200
    desk.now_s -= 30 * DAY_S
    hook.posts.clear()
    desk.alert(AY, summary="ay: gain loss.")
    assert len(desk.turn(120)) == 2


def test_alerts_that_a_rebuild_restored_are_not_sent_again(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    desk.alert()
    desk.alert(AY, summary="ay: gain loss.")
    desk.turn(120)
    desk.alert(state="cleared", severity="info", summary="ax: as before.")
    desk.turn(120)
    desk.notifier.stop()
    with store.transaction() as db:
        db.execute("DELETE FROM alerts")
        db.execute("DELETE FROM incidents")
    assert rebuild(store).rows == {"alerts": 3, "incidents": 2}
    desk.restart()
    assert desk.turn(600) == []
    desk.alert("exercise/az/drift/1", summary="az: gain loss.")
    assert desk.turn(120) == ["[warning] pi-07: az: gain loss."]


def test_targets_that_the_config_no_longer_names_are_forgotten(store: FleetStore, hook: HookServer) -> None:
    desk = Desk(store, hook)
    hook.status = 503
    desk.alert()
    desk.turn()
    desk.config.targets["renamed"] = desk.config.targets.pop("hook")
    desk.config.routes[0] = NotifyRoute(targets=["renamed"])
    hook.status = 200
    hook.posts.clear()
    desk.restart()
    assert desk.turn() == ["[warning] pi-07: ax: gain loss."]
    with store.snapshot() as db:
        assert {*queue.load_targets(db)} == {"renamed"}


def test_a_process_killed_between_sending_and_marking_sends_again_with_the_same_key(
    tmp_path: Path, hook: HookServer
) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    desk = Desk(store, hook)
    desk.alert()
    store.close()
    program = f"""
import sys, time
from pathlib import Path
from outstation.integrations.notify.config import NotifyConfig, WebhookTarget
from outstation.fleet.incidents.notify_source import open_source
from outstation.integrations.notify.notifier import NotifierThread
config = NotifyConfig(targets={{"hook": WebhookTarget(url={hook.url!r})}})
NotifierThread(config, lambda: open_source(Path({str(tmp_path / "fleet.db")!r}), "acme", needs_groups=False)).start()
time.sleep(60)
"""
    processes: list[subprocess.Popen[bytes]] = []

    def run() -> None:
        processes.append(subprocess.Popen([sys.executable, "-c", program]))

    def kill_first(_: object) -> None:
        if len(hook.posts) == 1:
            # It has sent the whole message, and waits for the answer.
            wait_until("its process id", lambda: processes)
            os.kill(processes[0].pid, signal.SIGKILL)
            processes[0].wait()

    hook.on_post = kill_first
    run()
    wait_until("the first post", lambda: len(hook.posts) == 1)
    run()
    wait_until("the second post", lambda: len(hook.posts) == 2)
    time.sleep(2.5)
    processes[1].terminate()
    processes[1].wait()
    assert len(hook.posts) == 2
    assert len(set(desk.keys())) == 1


def test_each_run_of_failures_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notifying, "TURN_S", 0.01)
    monkeypatch.setattr(notifying, "_RETRY_S", 0.01)
    opened, turns = 0, iter([0, 0, 3, 0, 3])

    @contextmanager
    def open_failing() -> Iterator[tuple[FleetStore, AlertSource]]:
        """Open a source that fails at first, works for some turns, and fails again."""
        nonlocal opened
        opened += 1
        left = next(turns, 10**9)
        with open_source(tmp_path / "fleet.db", "acme", needs_groups=False) as (store, source):
            changed = source.changed

            def fail_later(cursor: int | None) -> tuple[int, list[Incident]]:
                nonlocal left
                left -= 1
                if left < 0:
                    raise StorageError("the disk is gone")
                return changed(cursor)

            monkeypatch.setattr(source, "changed", fail_later)
            yield store, source

    thread = NotifierThread(NotifyConfig(), open_failing)
    with caplog.at_level(logging.INFO, "outstation.notify"):
        thread.start()
        wait_until("three runs of failures", lambda: opened == 6 and len(caplog.messages) == 6)
        thread.stop()
    paused, resumed = "notifications pause: the disk is gone; trying again", "notifications go on"
    assert caplog.messages == [paused, resumed] * 3


def test_of_two_collectors_one_notifies_and_the_other_takes_over(
    postgres_url: str, hook: HookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifying, "_RETRY_S", 0.3)
    store = FleetStore(postgres_url)
    desk = Desk(store, hook, group_for=Duration(1.0))
    desk.notifier.stop()

    def start() -> NotifierThread[FleetStore]:
        thread = NotifierThread(
            desk.config,
            lambda: open_source(postgres_url, "acme", needs_groups=False),
            lambda opened: opened.acquire_leadership(NOTIFIER_JOB),
        )
        thread.start()
        return thread

    first, second = start(), start()
    desk.alert(AX)
    wait_until("the first post", lambda: len(hook.posts) == 1)
    time.sleep(3)
    first.stop()
    desk.alert(AY, summary="ay: gain loss.")
    wait_until("the second post", lambda: len(hook.posts) == 2)
    second.stop()
    store.close()
    assert [d["subject"] for d in desk.documents()] == [
        "[warning] pi-07: ax: gain loss.",
        "[warning] pi-07: ay: gain loss.",
    ]

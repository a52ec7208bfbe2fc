"""Pages of the dashboard: what they show, what they verify, and what an unavailable database looks like."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sqlite3
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outstation.evidence.verify.verify import verify
from outstation.fleet import config as fleet_config
from outstation.fleet.dashboard.pages import audit
from outstation.fleet.dashboard.pages.desk import OperatorDesk
from outstation.fleet.database.ingest import Refusal
from outstation.fleet.rollout import actions
from outstation.fleet.rollout.actions import RolloutOperator
from outstation.foundation import clock
from outstation.protocol.wire import keys
from outstation.workbench.testing.messages import FLEET
from tests.kit.commands import call_outstation
from tests.kit.dashboards import ServedDashboard, enrolled, health, served, wait_until_shown
from tests.kit.fleet_rollouts import NAME, plan, promotion

HOSTILE = '<img src=x onerror=alert(1)>"\u202etxt\x1b[31m'


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDashboard]:
    with served(tmp_path_factory.mktemp("fleet") / "acme") as running:
        wait_until_shown(running, "/fleet", "pi-07")
        yield running


def test_the_fleet_shows_each_device_with_state_backlog_drift_and_alert(dashboard: ServedDashboard) -> None:
    page = wait_until_shown(dashboard, "/fleet", "gain loss")
    assert "exercise 1.0.0" in page
    assert ">drift</span>" in page
    assert re.search(r'data-name="Backlog">3 <a class="verified" href="/messages/pi-07/[^"]+/3"', page)


def test_the_times_of_refused_messages_have_names_where_a_phone_shows_no_head(dashboard: ServedDashboard) -> None:
    refusal = Refusal("pi-07", "bad signature", "", "t", b"{}", "")
    dashboard.store.ingest([], [refusal], clock.now_rfc3339())
    page = wait_until_shown(dashboard, "/audit", "bad signature")
    assert re.search(r'<td data-name="First">.*<td data-name="Last">', page)


def test_a_new_message_is_shown(dashboard: ServedDashboard) -> None:
    sender = enrolled(dashboard.store, "pi-20")
    dashboard.add(sender, health(sender, waiting=4711))
    wait_until_shown(dashboard, "/fleet?q=pi-20", "4\u202f711")


def test_a_device_shows_the_metrics_of_each_output_of_its_model(dashboard: ServedDashboard) -> None:
    sender = enrolled(dashboard.store, "outputs-01")
    for value in (0.75, 0.5):
        for output, name in (("", "accuracy"), ("wear", "mae")):
            metric = {"metric": name, "value": value, "low": None, "high": None, "n": 60}
            dashboard.add(sender, sender.append("quality", task=sender.task, output=output, metrics=[metric]))
    dashboard.add(sender, health(sender))
    page = wait_until_shown(dashboard, "/devices/outputs-01", "Accuracy by labels")
    rows = re.findall(r'<tr id="metric-([^"]+)"><th scope="row">([^<]+)</th><td class="number">([^<]+)', page)
    assert rows == [("1", "accuracy", "0.500"), ("wear-1", "wear: mae", "0.500")]


def test_filters_and_groups_are_in_the_address(dashboard: ServedDashboard) -> None:
    sender = enrolled(dashboard.store, "quiet-01")
    dashboard.add(sender, health(sender))
    wait_until_shown(dashboard, "/fleet", "quiet-01")
    assert 'id="d-pi-07"' in dashboard.get("/fleet?alerts=1").text
    assert 'id="d-quiet-01"' not in dashboard.get("/fleet?alerts=1").text
    assert 'id="d-pi-07"' not in dashboard.get("/fleet?q=quiet").text
    assert "No device matches." in dashboard.get("/fleet?q=nothing").text
    assert dashboard.get("/fleet?sort=nonsense&n=-1&state=x&group=x").status == 200
    assert 'class="group"' in dashboard.get("/fleet?group=prefix").text


def test_a_message_is_verified_anew_and_a_changed_one_is_named(dashboard: ServedDashboard) -> None:
    sender = enrolled(dashboard.store, "pi-30")
    dashboard.add(sender, sender.results(), sender.drift(), health(sender))
    path = f"/messages/pi-30/{sender.log}"
    page = dashboard.get(f"{path}/2").text
    assert "verified now" in page
    assert "prev of message 2 is the digest of message 1" in page
    assert "prev of message 3 is the digest of message 2" in page
    with dashboard.store.transaction() as db:
        db.execute(
            "UPDATE messages SET payload = replace(CAST(payload AS TEXT), 'ok', 'no') WHERE device = 'pi-30' AND seq=2"
        )
    page = dashboard.get(f"{path}/2").text
    assert "does not verify" in page
    assert "prev of message 3 is not the digest of message 2" in page
    document = json.loads(dashboard.get(f"{path}/1/download").text)
    assert document["key"] == sender.key.public.text
    assert dashboard.get(f"{path}/99").status == 404
    assert dashboard.get(f"{path}/x1").status == 404


def test_a_device_shows_health_keys_results_and_drift(dashboard: ServedDashboard) -> None:
    page = wait_until_shown(dashboard, "/devices/pi-07", "Task exercise")
    assert "71.5 h" in page
    assert "PEN" in page
    series = json.loads(dashboard.get("/devices/pi-07/results.json?range=all").text)
    assert len(series["t"]) == len(series["label"]) == 3
    assert series["labels"] == ["ABD", "FEL", "PEN"]
    assert dashboard.get("/devices/pi-07/drift.svg?range=all").text.startswith("<svg")
    assert dashboard.get("/devices/none").status == 404


def test_text_of_a_device_is_never_markup(dashboard: ServedDashboard) -> None:
    sender = enrolled(dashboard.store, "pi-40")
    long = HOSTILE + "x" * 1500
    named = sender.results(columns={"row": [1], "t": [1_764_022_680_000_000], "label": [HOSTILE], "score": [0.5]}, n=1)
    declared = {"consent": HOSTILE, "sent": HOSTILE, "bytes_today": 7, "max_per_day": HOSTILE}
    dashboard.add(sender, named, health(sender, agent=HOSTILE, samples=declared))
    dashboard.add(sender, sender.alert(summary=long, subject=HOSTILE))
    for path in ("/fleet", "/devices/pi-40", "/incidents", f"/messages/pi-40/{sender.log}/3"):
        page = wait_until_shown(dashboard, path, "onerror")
        assert "<img src=x" not in page
        assert "\u202e" not in page
        assert "\x1b" not in page
    assert "with readings, 7 " in dashboard.get("/devices/pi-40").text
    series = dashboard.get("/devices/pi-40/results.json?range=all").text
    assert "\u202e" not in series


def test_incidents_name_what_to_do_and_take_decisions(dashboard: ServedDashboard) -> None:
    page = wait_until_shown(dashboard, "/incidents?device=pi-07", "ax: gain loss.")
    assert "What to do:" in page
    assert "Acknowledge" not in page
    ref = re.search(r"/incidents/([0-9a-f]{12})", page)[1]  # type: ignore[index]
    otto = dashboard.session("otto")
    answer = dashboard.post(f"/incidents/{ref}", {"action": "acknowledge", "note": "on my way"}, otto)
    assert answer.location == f"/incidents/{ref}"
    page = dashboard.get(f"/incidents/{ref}", otto).text
    assert "Acknowledged by <b>otto</b>" in page
    assert "on my way" in page
    dashboard.post(f"/incidents/{ref}", {"action": "mute", "until": "1 h"}, otto)
    assert "Muted by <b>otto</b>" in dashboard.get(f"/incidents/{ref}", otto).text
    assert ("otto", "mute incident", "done") in {(a["name"], a["action"], a["outcome"]) for a in dashboard.actions()}


def test_a_result_is_corrected_by_an_operator(dashboard: ServedDashboard) -> None:
    otto = dashboard.session("otto")
    form = {"task": "exercise", "row": "1", "action": "correct", "label": "FEL", "note": "seen on the camera"}
    assert dashboard.post("/devices/pi-07/verdict", form, otto).status == 303
    page = dashboard.get("/devices/pi-07", otto).text
    assert "verdicts of people who saw the answer" in page
    assert re.search(r"FEL <span class=\"muted\">otto, .*: seen on the camera", page)
    assert dashboard.post("/devices/pi-07/verdict", {**form, "row": "77"}, otto).status == 409
    assert dashboard.post("/devices/pi-07/verdict", {**form, "label": "xyz"}, otto).status == 409
    assert dashboard.post("/devices/pi-07/verdict", {**form, "action": "praise"}, otto).status == 400
    confirmed = {"task": "exercise", "row": "101", "action": "confirm", "back": "/labels?task=exercise"}
    assert dashboard.post("/devices/pi-07/verdict", confirmed, otto).location == "/labels?task=exercise"
    assert dashboard.post("/devices/pi-07/verdict", {**form, "action": "withdraw"}, otto).status == 303
    page = dashboard.get("/labels", otto).text
    assert re.search(r'<th scope="row">otto</th>.*confirmed', page)


def test_the_page_labels_lists_what_to_label_next_and_asks_operators_only(dashboard: ServedDashboard) -> None:
    page = dashboard.get("/labels?task=exercise&device=pi-07", dashboard.session("otto")).text
    assert "What to label next" in page
    assert 'action="/devices/pi-07/verdict"' in page
    assert 'action="/devices/pi-07/verdict"' not in dashboard.get("/labels", dashboard.session("vera")).text
    assert "Nothing waits for a label." in dashboard.get("/labels?task=none", dashboard.session("vera")).text
    assert dashboard.get("/labels?n=-1").status == 200


def test_an_alert_gets_a_verdict_of_an_operator(dashboard: ServedDashboard) -> None:
    otto = dashboard.session("otto")
    link = re.search(r'href="(/incidents/[0-9a-f]{12})"', dashboard.get("/incidents?status=all", otto).text)
    assert link is not None
    assert dashboard.post(f"{link[1]}/verdict", {"action": "false_alarm", "note": "door open"}, otto).status == 303
    page = dashboard.get(link[1], otto).text
    assert re.search(r"false alarm</span> <span class=\"muted\">otto, .*: door open", page)
    assert dashboard.post(f"{link[1]}/verdict", {"action": "right", "label": "PEN"}, otto).status == 409
    assert dashboard.post(f"{link[1]}/verdict", {"action": "right"}, dashboard.session("vera")).status == 403


def test_an_unavailable_database_is_reported_and_comes_back(tmp_path: Path) -> None:
    with served(tmp_path / "acme") as dashboard:
        wait_until_shown(dashboard, "/fleet", "pi-07")
        file = Path(dashboard.dashboard.reader.location)
        aside = file.with_suffix(".aside")
        os.rename(file, aside)
        page = wait_until_shown(dashboard, "/fleet", 'role="status" data-live>')
        assert "pi-07" in page, "the last state stays"
        answer = dashboard.get("/incidents")
        assert answer.status == 503
        assert "comes back by itself" in answer.text
        os.rename(aside, file)
        wait_until_shown(dashboard, "/incidents", "ax: gain loss.")
        wait_until_shown(dashboard, "/fleet", "data-live hidden>")


def test_a_task_is_compared_across_devices(dashboard: ServedDashboard) -> None:
    page = wait_until_shown(dashboard, "/tasks", ">exercise</a>")
    assert "exercise 1.0.0" in page
    page = dashboard.get("/tasks/exercise").text
    assert re.search(r'id="td-pi-07".*?PEN|FEL|ABD', page, re.DOTALL)
    assert 'id="td-pi-20"' not in dashboard.get("/tasks/exercise?drift=drift").text
    assert dashboard.get("/tasks/none").status == 404


def test_a_model_says_who_runs_it(dashboard: ServedDashboard) -> None:
    wait_until_shown(dashboard, "/models", "/models/exercise")
    page = dashboard.get("/models/exercise").text
    assert "/devices/pi-07" in page
    assert "not published here" in page
    assert dashboard.get("/models/none").status == 404


def test_a_rollout_shows_rules_and_signed_decisions_and_is_paused_and_aborted(dashboard: ServedDashboard) -> None:
    desk = dashboard.dashboard.desk
    assert desk is not None
    now_us = clock.read().wall_us
    sender, steps = enrolled(dashboard.store, "pi-50"), (("shadow", 100.0), ("all", 100.0))
    with dashboard.store.transaction() as db:
        actions.start(db, RolloutOperator(desk.key, FLEET, now_us), 1, plan(*steps, rules=promotion(min_devices=1)))
    dashboard.add(sender, sender.rollout("shadow"), *(sender.shadow() for _ in range(6)))
    page = dashboard.get(f"/rollouts/{NAME}").text
    assert "signed by the operator" in page
    assert "<svg viewBox" in page
    assert ">abort</button>" not in page
    otto = dashboard.session("otto")
    assert ">abort</button>" in dashboard.get(f"/rollouts/{NAME}", otto).text
    assert dashboard.post(f"/rollouts/{NAME}", {"action": "abort"}, otto).status == 409, "it needs a reason"
    assert dashboard.post(f"/rollouts/{NAME}", {"action": "pause"}, otto).status == 303
    assert ">resume</button>" in dashboard.get(f"/rollouts/{NAME}", otto).text
    assert dashboard.post(f"/rollouts/{NAME}", {"action": "abort", "reason": "wrong labels"}, otto).status == 303
    page = wait_until_shown(dashboard, f"/rollouts/{NAME}", "wrong labels (otto, by the dashboard)")
    assert page.count("signed by the operator") == 3
    assert "does not verify" not in page
    with dashboard.store.transaction() as db:
        db.execute("UPDATE decisions SET summary = 'all is well' WHERE n = 3")
    assert "does not verify" in dashboard.get(f"/rollouts/{NAME}").text
    assert dashboard.get("/rollouts/none").status == 404


def test_a_newer_database_is_reported_until_the_dashboard_is_updated(tmp_path: Path) -> None:
    with served(tmp_path / "acme") as dashboard:
        wait_until_shown(dashboard, "/fleet", "pi-07")
        file = Path(dashboard.dashboard.reader.location)
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.execute("UPDATE _sqlite_migrations SET name = 'of_next_year' WHERE name = 'create_tables'")
            db.commit()
        reopen(dashboard, file)
        assert "not available" in wait_until_shown(dashboard, "/incidents", "created by a newer version")
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.execute("UPDATE _sqlite_migrations SET name = 'create_tables' WHERE name = 'of_next_year'")
            db.commit()
        wait_until_shown(dashboard, "/incidents", "ax: gain loss.")


def reopen(dashboard: ServedDashboard, file: Path) -> None:
    """Take the database away for a moment."""
    aside = file.rename(file.with_suffix(".aside"))
    wait_until_shown(dashboard, "/incidents", "no database here yet")
    aside.rename(file)


def test_a_damaged_cell_stops_neither_the_poll_nor_other_pages(tmp_path: Path) -> None:
    with served(tmp_path / "acme") as dashboard:
        wait_until_shown(dashboard, "/fleet", "pi-07")
        with dashboard.store.transaction() as db:
            db.execute("UPDATE messages SET payload = 'no JSON' WHERE kind = 'health'")
            db.execute("UPDATE devices SET last_seen = 17")
        wait_until_shown(dashboard, "/fleet", "17")
        sender = enrolled(dashboard.store, "pi-60")
        dashboard.add(sender, health(sender))
        wait_until_shown(dashboard, "/fleet", "d-pi-60")


@pytest.mark.process
def test_the_audit_page_says_what_was_verified_and_sends_evidence(tmp_path: Path) -> None:
    with served(tmp_path / "acme") as dashboard:
        assert "not verified yet" in dashboard.get("/audit").text
        call_outstation("fleet", "audit", "--dir", str(dashboard.folder))
        page = dashboard.get("/audit").text
        assert "All messages were verified" in page
        assert "No message is missing" in page
        # Not the key of fleet.toml: the one that the dashboard was given signs.
        given = keys.create()
        dashboard.dashboard.desk = OperatorDesk(fleet_config.load(dashboard.folder), dashboard.folder, given)
        answer = dashboard.post("/audit/evidence", {}, dashboard.session("otto"))
        assert answer.status == 200, answer.text
        assert answer.headers["content-type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            archive.extractall(tmp_path)
        report = verify(tmp_path / "evidence", [given.public])
        assert (report.signer, report.problems) == (given.public.kid, [])
        file = dashboard.folder / "audit" / "checkpoint.json"
        file.write_text(file.read_text().replace("acme", "acne"))
        assert "cannot be believed" in dashboard.get("/audit").text


@pytest.mark.process
def test_a_killed_evidence_process_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "python"
    killed.write_text('#!/bin/sh\nmkdir -p "$6" && echo partial >"$6/audit.json" && kill -9 $$\n')
    killed.chmod(0o755)
    with served(tmp_path / "acme") as dashboard:
        cookie = dashboard.session("otto")
        monkeypatch.setattr(sys, "executable", str(killed))
        answer = dashboard.post("/audit/evidence", {}, cookie)
        assert answer.status == 409
        assert "its process ended with status -9" in answer.text
        assert "evidence" not in {action["action"] for action in dashboard.actions()}


def test_the_process_that_makes_evidence_shows_no_password_of_the_config(tmp_path: Path) -> None:
    with served(tmp_path / "acme") as dashboard:
        folder, location = dashboard.folder, dashboard.dashboard.reader.location
        expected = ["--out", str(tmp_path), "--dir", str(folder), "--operator-key", "-"]
        assert audit.evidence_options(tmp_path, folder, location) == expected
        assert audit.evidence_options(tmp_path, folder, "/other.db")[-2:] == ["--db", "/other.db"]


def test_every_page_reads_postgresql(tmp_path: Path, postgres_url: str) -> None:
    with served(tmp_path / "acme", database=postgres_url, local_role="admin") as dashboard:
        page = wait_until_shown(dashboard, "/fleet", "gain loss")
        assert "exercise 1.0.0" in page
        message = re.search(r"/messages/[^\"]+", page)
        ref = re.search(r"/incidents/[0-9a-f]{12}", dashboard.get("/incidents").text)
        assert message is not None
        assert ref is not None
        paths = ["/incidents?status=all", ref[0], "/devices/pi-07?range=all", "/devices/pi-07/results.json?range=all"]
        paths += ["/devices/pi-07/drift.svg?range=all", "/tasks", "/tasks/exercise", "/models", "/models/exercise"]
        for path in [*paths, "/rollouts", "/audit", "/accounts", message[0]]:
            assert dashboard.get(path).status == 200, path
        assert "verified now" in dashboard.get(message[0]).text
        assert dashboard.post(ref[0], {"action": "acknowledge"}).status == 303
        assert (
            dashboard.post("/devices/pi-07/verdict", {"task": "exercise", "row": "1", "action": "confirm"}).status
            == 303
        )
        cookie = dashboard.session("vera")
        assert dashboard.get("/fleet", cookie).status == 200

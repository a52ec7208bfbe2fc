"""Decisions about a roll-out: author, order, desired state, audit."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.commands import COUNTER_FILE
from outstation.fleet.rollout import actions, journal
from outstation.fleet.rollout.controller import REPUBLISH_EVERY_S, RolloutController
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.plan import RolloutPlan
from outstation.foundation.errors import StorageError, UsageError
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import digest
from outstation.protocol.wire.messages import DesiredPayload
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.messages import new_key
from tests.kit.fleet_rollouts import NAME, NOW, OPERATOR, Fleet, fleet, plan, promotion, tamper

ALL = "outstation/acme/_all/desired"


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as made:
        yield made


def short(**options: Any) -> RolloutPlan:
    """A plan whose every step chooses every device, whatever its name."""
    return plan(("shadow", 100.0), ("all", 100.0), **options)


def desired(fleet: Fleet, topic: str = ALL) -> DesiredPayload:
    """Return the desired state as a device reads it."""
    with fleet.store.snapshot() as db:
        row = journal.load_desired(db, topic)
    assert row is not None
    signer = jws.Signer("operator", OPERATOR.public)
    body = verify_message(topic, row.payload, [row.jws], {signer.key.kid: signer}.get).body
    assert isinstance(body, DesiredPayload)
    return body


def audited(fleet: Fleet) -> AuditReport:
    return audit(fleet.store, operators=[OPERATOR.public])


def decide(fleet: Fleet, act: Callable[..., Rollout]) -> Rollout:
    """One that needs no counter."""
    with fleet.store.transaction() as db:
        return act(db, fleet.operator(), journal.find(db, NAME))


def events(fleet: Fleet, name: str = NAME) -> list[str]:
    return [row[3] for row in fleet.decided(name)]


def test_a_start_signs_a_decision_and_the_desired_state(six: Fleet) -> None:
    six.start(plan())
    [row] = six.decided()
    assert row[:5] == (
        *(NAME, 1, NOW, "started"),
        "exercise: exercise 1.1.0 for all devices starts with shadow 100 %, then canary 50 %, all.",
    )
    state = desired(six)
    assert (state.device, state.counter, state.tasks) == ("_all", 1, {"exercise": plan().desired_for_step(1)})


def test_decisions_from_shadow_to_all_have_their_numbers(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow()
    assert six.promote(2.0).step == 2
    assert desired(six).tasks["exercise"].strategy == "canary"
    six.on_probation(six.chosen(2))
    assert six.promote(4.0).step == 3
    six.on_probation(six.senders)
    assert six.promote(6.0).state == "finished"
    assert events(six) == ["started", "promoted", "promoted", "finished"]
    assert six.decided()[1][4].startswith("shadow 100 % → canary 50 %: agreement 0.960 [0.9")
    assert desired(six).tasks["exercise"].strategy == "all"
    report = audited(six)
    assert (report.passed, report.decisions) == (True, 4), report.to_dict()


def test_each_decision_has_the_digest_of_the_previous_one(six: Fleet) -> None:
    six.start(plan())
    six.promote(forced="to see")
    rows = six.decided()
    prevs = [json.loads(row[6])["prev"] for row in rows]
    assert prevs == ["", digest(rows[0][6])]


def test_an_abort_rolls_back_every_device(six: Fleet) -> None:
    six.start(plan())
    six.abort()
    state = desired(six).tasks["exercise"]
    assert (state.strategy, state.percent, state.digest) == ("rollback", 100.0, plan().digest)
    assert six.decided()[-1][4] == (
        "Aborted at shadow 100 %, devices return to their previous bundle: the labels were wrong."
    )


def test_other_tasks_of_a_topic_are_unchanged(six: Fleet) -> None:
    six.start(plan())
    six.start(short(name="solar-2", task="solar", digest="sha256:" + "22" * 32))
    six.abort()
    state = desired(six)
    assert (state.tasks["exercise"].strategy, state.tasks["solar"].rollout, state.counter) == ("rollback", "solar-2", 3)


def test_only_one_open_roll_out_per_task_and_devices(six: Fleet) -> None:
    six.start(plan())
    another = short(name="exercise-2", digest="sha256:" + "22" * 32)
    with pytest.raises(UsageError, match="roll-out exercise-1-1 of exercise is running for the same devices"):
        six.start(another)
    rules = promotion(min_devices=1)
    six.start(short(name="exercise-3", target="device:pi-00", rules=rules))
    assert desired(six, "outstation/acme/pi-00/desired").tasks["exercise"].rollout == "exercise-3"
    six.abort()
    six.start(another, 3.0)


def test_a_name_is_used_once(six: Fleet) -> None:
    six.start(plan())
    six.abort()
    with pytest.raises(UsageError, match="choose another name"):
        six.start(plan(digest="sha256:" + "22" * 32), 3.0)


def test_an_aborted_bundle_is_held_off(six: Fleet) -> None:
    six.start(plan())
    six.abort(2.0)
    with pytest.raises(UsageError, match=r"was aborted in roll-out exercise-1-1 at .* --force REASON"):
        six.start(short(name="again"), 25.9)
    six.start(short(name="forced"), 25.9, forced="the sensor was broken, not the model")
    assert six.decided("forced")[0][4].endswith("It was aborted before; forced: the sensor was broken, not the model.")
    six.abort(26.0, "forced")
    six.start(short(name="again"), 51.0)


@pytest.mark.parametrize(
    ("to", "devices", "problem"),
    [
        ("all", 7, "selects 6 of 6 enrolled .*; lower min_devices to 6 or less"),
        ("device:pi-99", 1, "target device:pi-99 matches no enrolled device"),
    ],
)
def test_a_step_that_can_never_end_is_refused(six: Fleet, to: str, devices: int, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        six.start(plan(target=to, rules=promotion(min_devices=devices)))


def test_the_percent_that_the_refusal_of_a_small_step_names_is_the_least(six: Fleet) -> None:
    def start(percent: float) -> None:
        six.start(plan(("canary", percent), ("all", 100.0), rules=promotion(min_devices=3)))

    with pytest.raises(UsageError, match=r"selects 0 of 6 .*; percent = \d+ selects 3") as refused:
        start(0.1)
    [least] = re.findall(r"percent = (\d+)", str(refused.value))
    with pytest.raises(UsageError, match=f"selects 2 of 6 .* percent = {least} selects 3"):
        start(float(least) - 1)
    start(float(least))


def test_a_forced_promotion_is_recorded_with_its_reason(six: Fleet) -> None:
    six.start(plan())
    with pytest.raises(UsageError, match="not promoted from shadow 100 %: devices with 20 batches: 0 of 3"):
        six.promote()
    six.promote(forced="seen on site")
    *_, evidence, _payload, _jws = six.decided()[-1]
    assert json.loads(evidence)["force_reason"] == "seen on site"
    assert " Forced: seen on site. Blocked by: devices with 20 batches: 0 of 3" in six.decided()[-1][4]


def test_a_paused_roll_out_is_not_promoted_but_aborted(six: Fleet) -> None:
    six.start(plan())
    decide(six, actions.pause)
    follower = RolloutController(six.desk, None, lambda _: None)
    six.in_shadow()
    follower.tick(1.0)
    assert (six.find().state, six.find().step) == ("paused", 1)
    decide(six, actions.resume)
    follower.tick(2.0)
    assert (six.find().state, six.find().step) == ("running", 2)
    decide(six, actions.pause)
    six.on_probation(six.chosen(2), settles=False, agreeing=0)
    follower.tick(3.0)
    assert six.find().state == "aborted"


@pytest.mark.parametrize("act", [actions.pause, actions.resume])
def test_a_closed_roll_out_cannot_be_changed(six: Fleet, act: Callable[..., Any]) -> None:
    six.start(plan())
    six.abort()
    with pytest.raises(UsageError, match="is aborted"):
        decide(six, act)
    with pytest.raises(UsageError, match="is aborted"):
        six.abort()
    with pytest.raises(UsageError, match="is aborted"):
        six.promote(forced="again")


def test_the_second_of_two_concurrent_promotions_is_refused(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow()
    seen = six.look()
    six.promote()
    with pytest.raises(UsageError, match="it is running at step 2 now"), six.store.transaction() as db:
        actions.promote(db, six.operator(2.0), six.counter(), seen.rollout, seen.verdict)
    assert events(six) == ["started", "promoted"]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(["exercise", "solar", "machine"]), st.booleans()), max_size=8))
def test_a_topic_always_has_the_last_decision_of_each_task(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, bool]]
) -> None:
    with fleet(tmp_path_factory.mktemp("fleet"), 3) as three:
        last: dict[str, tuple[str, str]] = {}
        for i, (task, stays) in enumerate(history):
            before = [entry for entry, (_, strategy) in last.items() if entry == task and strategy == "shadow"]
            for entry in before:
                three.abort(name=last[entry][0])
            name = f"roll-out-{i}"
            three.start(short(name=name, task=task, digest=f"sha256:{i:064x}"))
            if not stays:
                three.abort(name=name)
            last[task] = (name, "shadow" if stays else "rollback")
        with three.store.snapshot() as db:
            there = journal.load_desired(db, ALL) is not None
        assert there == bool(history)
        if there:
            state = desired(three)
            assert {task: (entry.rollout, entry.strategy) for task, entry in state.tasks.items()} == last
        assert audited(three).passed


# --- follow ---


def test_follow_promotes_step_by_step_and_finishes(six: Fleet) -> None:
    lines: list[str] = []
    follower = RolloutController(six.desk, None, lines.append)
    six.start(plan(rules=promotion(min_hours=0.0)))
    follower.tick(0.0)
    assert (six.find().step, retained(six).tasks["exercise"].strategy) == (1, "shadow")
    six.in_shadow()
    follower.tick(1.0)
    assert (six.find().step, retained(six).tasks["exercise"].strategy) == (2, "canary")
    six.on_probation(six.senders)
    follower.tick(2.0)
    follower.tick(3.0)
    assert (six.find().state, follower.tick(4.0)) == ("finished", False)
    assert audited(six).passed
    assert events(six) == ["started", "promoted", "promoted", "finished"]
    assert lines[0].startswith(f"{NAME}: shadow 100 % → canary 50 %: agreement")
    assert retained(six).tasks["exercise"].strategy == "all"


def test_follow_aborts_a_failed_step_with_its_evidence(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(agreeing=10)
    RolloutController(six.desk, None, lambda _: None).tick(0.0)
    assert six.find().state == "aborted"
    evidence = json.loads(six.decided()[-1][5])
    assert (evidence["by"], evidence["rules"][0]["state"]) == ("operator", "failed")
    assert retained(six).tasks["exercise"].strategy == "rollback"


def retained(six: Fleet) -> DesiredPayload:
    sent = six.broker.retained[ALL]
    signer = jws.Signer("operator", OPERATOR.public)
    body = verify_message(ALL, sent.payload, [dict(sent.properties)["jws"]], {signer.key.kid: signer}.get).body
    assert isinstance(body, DesiredPayload)
    return body


def test_follow_publishes_decisions_from_before_a_kill(six: Fleet) -> None:
    six.start(plan())
    assert six.broker.sent == []
    RolloutController(six.desk, None, lambda _: None).tick(0.0)
    assert retained(six) == desired(six)


def test_the_next_command_publishes_decisions_from_before_a_kill(six: Fleet) -> None:
    six.start(plan())
    six.desk.execute(lambda db, who, _: actions.pause(db, who, journal.find(db, NAME)))
    assert retained(six) == desired(six)


def test_a_decision_is_published_once_the_broker_is_back(six: Fleet) -> None:
    lines: list[str] = []
    follower = RolloutController(six.desk, None, lines.append)
    six.start(plan())
    follower.tick(0.0)
    six.broker.down = True
    six.in_shadow(agreeing=10)
    assert follower.tick(1.0)
    assert (six.find().state, retained(six).tasks["exercise"].strategy) == ("aborted", "shadow")
    assert follower.tick(2.0)
    six.broker.down = False
    assert not follower.tick(3.0)
    assert retained(six).tasks["exercise"].strategy == "rollback"
    assert lines[1:] == ["not published yet, will retry: nobody listens", "published"]


def test_without_a_stored_counter_no_decision_is_made(six: Fleet) -> None:
    lines: list[str] = []
    follower = RolloutController(six.desk, None, lines.append)
    six.start(plan())
    six.in_shadow(agreeing=10)
    (six.folder / COUNTER_FILE).mkdir()
    for now_s in (1.0, 2.0):
        assert follower.tick(now_s)
    assert (six.find().state, events(six), len(lines)) == ("running", ["started"], 1)
    assert "the last counter cannot be read" in lines[0]
    (six.folder / COUNTER_FILE).rmdir()
    follower.tick(3.0)
    assert six.find().state == "aborted"


def test_a_database_failure_after_a_decision_delays_publishing(six: Fleet) -> None:
    follower = RolloutController(six.desk, None, lambda _: None)
    six.start(plan())
    follower.tick(0.0)
    six.in_shadow(agreeing=10)
    six.broker.fails = True
    with pytest.raises(StorageError):
        follower.tick(1.0)
    assert (six.find().state, retained(six).tasks["exercise"].strategy) == ("aborted", "shadow")
    six.broker.fails = False
    follower.tick(2.0)
    assert retained(six).tasks["exercise"].strategy == "rollback"


def test_follow_replaces_an_older_retained_message(six: Fleet) -> None:
    follower = RolloutController(six.desk, None, lambda _: None)
    six.start(plan())
    follower.tick(0.0)
    old = six.broker.retained[ALL]
    six.in_shadow()
    six.promote()
    follower.tick(REPUBLISH_EVERY_S)
    six.broker.retained[ALL] = old
    assert (retained(six).tasks["exercise"].strategy, retained(six).counter) == ("shadow", 1)
    follower.tick(2 * REPUBLISH_EVERY_S)
    assert (retained(six).tasks["exercise"].strategy, retained(six).counter) == ("canary", 2)


def test_a_counter_that_is_not_above_the_one_before_is_refused(six: Fleet) -> None:
    six.start(plan())
    with pytest.raises(UsageError, match="counter 1 is not above 1"):
        decide(six, lambda db, who, seen: actions.abort(db, who, 1, seen, "why"))
    assert six.find().state == "running"


# --- audit ---


ALTERED = {
    "summary": ("UPDATE decisions SET summary = 'all is well' WHERE n = 2", 2, "is stored with summary"),
    "evidence": ("UPDATE decisions SET evidence = '{}' WHERE n = 2", 2, "evidence that differs"),
    "time": ("UPDATE decisions SET time = '2026-11-18T00:00:00Z' WHERE n = 1", 1, "is stored with time"),
    "event": ("UPDATE decisions SET event = 'promoted' WHERE n = 1", 1, "is stored with event"),
    "payload": (
        "UPDATE decisions SET payload = CAST(replace(payload, 'agreement', 'agreemint') AS BLOB) WHERE n = 2",
        *(2, "bad signature"),
    ),
    "signature": ("UPDATE decisions SET jws = substr(jws, 1, length(jws) - 3) || 'AAA' WHERE n = 1", 1, "not verify"),
    "swapped": ("UPDATE decisions SET jws = (SELECT jws FROM decisions WHERE n = 1) WHERE n = 2", 2, "bad signature"),
    "number": ("UPDATE decisions SET n = 7 WHERE n = 2", 7, "at position 2"),
    "first removed": ("DELETE FROM decisions WHERE n = 1", 2, "at position 1"),
    "last removed": ("DELETE FROM decisions WHERE n = 2", None, "is stored with step 2"),
    "all removed": ("DELETE FROM decisions", None, "has no valid decision"),
    "state": ("UPDATE rollouts SET state = 'finished'", None, "is stored with state 'finished'"),
    "step": ("UPDATE rollouts SET step = 3", None, "is stored with step 3"),
    "plan": (
        "UPDATE rollouts SET plan = replace(plan, '0.9', '0.1')",
        None,
        "another plan than the one that was started",
    ),
    "no plan": ("UPDATE rollouts SET plan = '{}'", None, "was altered"),
    "rollout": ("DELETE FROM rollouts", None, "is missing in table rollouts"),
    "desired": ("UPDATE desired SET payload = CAST(replace(payload, '50.0', '90.0') AS BLOB)", None, "bad signature"),
    "desired's counter": ("UPDATE desired SET counter = 9", None, "stored with 9, signed with 2"),
    "no desired": ("DELETE FROM desired", None, "is missing"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_the_audit_detects_and_names_every_alteration(six: Fleet, name: str) -> None:
    six.start(plan())
    six.in_shadow()
    six.promote()
    assert audited(six).passed
    sql, n, reason = ALTERED[name]
    tamper(six.store.path, sql)
    report = audited(six)
    assert not report.passed
    result = [entry for entry in report.invalid_decisions if reason in entry["reason"]]
    assert [entry["n"] for entry in result] == [n], report.invalid_decisions


def test_the_audit_rejects_a_decision_of_another_key(six: Fleet) -> None:
    six.start(plan())
    report = audit(six.store, operators=[new_key(78).public])
    assert "unknown key" in report.invalid_decisions[0]["reason"]
    assert not audit(six.store).passed
    assert audit(six.store, operators=[new_key(78).public, OPERATOR.public]).passed


def test_a_decision_of_another_roll_out_does_not_verify(six: Fleet) -> None:
    six.start(plan())
    six.start(short(name="other", task="solar", digest="sha256:" + "22" * 32))
    tamper(
        six.store.path,
        "UPDATE decisions SET payload = o.payload, jws = o.jws "
        "FROM (SELECT * FROM decisions WHERE rollout = 'other') o WHERE decisions.rollout = ?",
        NAME,
    )
    report = audited(six)
    assert "other topic" in next(e["reason"] for e in report.invalid_decisions if e["rollout"] == NAME)


def test_the_audit_detects_a_restored_older_desired_state(six: Fleet) -> None:
    six.start(plan())
    with contextlib.closing(sqlite3.connect(six.store.path)) as db:
        [old] = db.execute("SELECT counter, payload, jws FROM desired").fetchall()
    six.promote(forced="to see")
    tamper(six.store.path, "UPDATE desired SET counter = ?, payload = ?, jws = ?", *old)
    [entry] = audited(six).invalid_decisions
    assert entry["reason"] == f"desired on {ALL}: is not the one that the newest decision about it published"


def test_desired_state_that_was_edited_is_never_signed_again(six: Fleet) -> None:
    six.start(plan())
    tamper(six.store.path, "UPDATE desired SET payload = CAST(replace(payload, '1.1.0', '6.6.6') AS BLOB)")
    with pytest.raises(UsageError, match="does not verify"):
        six.start(short(name="solar-2", task="solar", digest="sha256:" + "22" * 32))
    with pytest.raises(UsageError, match="does not verify"):
        six.abort()
    assert (six.find().state, events(six)) == ("running", ["started"])


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        (
            "UPDATE shadows SET errors = 0, body = replace(body, '\"agreeing\":10', '\"agreeing\":99')",
            "differs from its rows in table shadows",
        ),
        ("DELETE FROM shadows", "is missing in table shadows"),
        ("UPDATE rollout_devices SET phase = 'settled'", "differs from its rows in table rollout_devices"),
        ("DELETE FROM rollout_devices", "is missing in table rollout_devices"),
    ],
)
def test_the_audit_detects_tables_that_differ_from_messages(six: Fleet, sql: str, reason: str) -> None:
    six.in_shadow(six.senders[:1], 1, agreeing=10)
    assert audited(six).passed
    tamper(six.store.path, sql)
    [entry] = audited(six).invalid
    assert reason in entry["reason"]
    assert entry["device"] == "pi-00"

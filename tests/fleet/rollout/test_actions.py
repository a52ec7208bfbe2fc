"""What is decided about a roll-out: by whom, in which order, what devices are told of it, and what an audit finds."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import StorageError, UsageError
from agent.fleet.audit.audit import AuditReport, audit
from agent.fleet.commands import COUNTER_FILE
from agent.fleet.rollout import actions, journal
from agent.fleet.rollout.controller import REPUBLISH_EVERY_S, RolloutController
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.plan import RolloutPlan
from agent.testing.messages import new_key
from agent.wire import jws
from agent.wire.messages import DesiredPayload, digest, verify_message
from tests.kit.fleet_rollouts import NAME, NOW, OPERATOR, Fleet, fleet, plan, promotion, tamper

ALL = "outstation/acme/_all/desired"


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as made:
        yield made


def short(**what: Any) -> RolloutPlan:
    """A plan whose every step chooses every device, whatever its name."""
    return plan(("shadow", 100.0), ("all", 100.0), **what)


def desired(fleet: Fleet, topic: str = ALL) -> DesiredPayload:
    """As a device reads it."""
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


def test_a_start_is_a_signed_decision_and_what_devices_are_told(six: Fleet) -> None:
    six.start(plan())
    [row] = six.decided()
    assert row[:5] == (
        *(NAME, 1, NOW, "started"),
        "exercise: exercise 1.1.0 for all devices starts with shadow 100 %, then canary 50 %, all.",
    )
    told = desired(six)
    assert (told.device, told.counter, told.tasks) == ("_all", 1, {"exercise": plan().desired_for_step(1)})


def test_from_shadow_to_everywhere_in_decisions_with_their_numbers(six: Fleet) -> None:
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


def test_each_decision_names_the_digest_of_the_one_before(six: Fleet) -> None:
    six.start(plan())
    six.promote(forced="to see")
    rows = six.decided()
    prevs = [json.loads(row[6])["prev"] for row in rows]
    assert prevs == ["", digest(rows[0][6])]


def test_an_abort_sends_every_device_back(six: Fleet) -> None:
    six.start(plan())
    six.abort()
    told = desired(six).tasks["exercise"]
    assert (told.strategy, told.percent, told.digest) == ("rollback", 100.0, plan().digest)
    assert six.decided()[-1][4] == (
        "Aborted at shadow 100 %, devices return to their previous bundle: the labels were wrong."
    )


def test_what_other_tasks_are_desired_on_the_topic_stays(six: Fleet) -> None:
    six.start(plan())
    six.start(short(name="solar-2", task="solar", digest="sha256:" + "22" * 32))
    six.abort()
    told = desired(six)
    assert (told.tasks["exercise"].strategy, told.tasks["solar"].rollout, told.counter) == ("rollback", "solar-2", 3)


def test_a_second_roll_out_of_a_task_for_the_same_devices_is_refused_while_one_is_open(six: Fleet) -> None:
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


def test_a_bundle_that_was_aborted_is_held_for_a_while(six: Fleet) -> None:
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
    [("all", 7, "selects 6 of 6 enrolled"), ("device:pi-99", 1, "target device:pi-99 matches no enrolled device")],
)
def test_a_step_that_could_never_be_over_is_refused(six: Fleet, to: str, devices: int, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        six.start(plan(target=to, rules=promotion(min_devices=devices)))


def test_a_promotion_by_hand_over_open_findings_is_on_record_with_its_reason(six: Fleet) -> None:
    six.start(plan())
    with pytest.raises(UsageError, match="not promoted from shadow 100 %: devices with 20 batches: 0 of 3"):
        six.promote()
    six.promote(forced="seen on site")
    *_, evidence, _payload, _jws = six.decided()[-1]
    assert json.loads(evidence)["force_reason"] == "seen on site"
    assert " Forced: seen on site. Blocked by: devices with 20 batches: 0 of 3" in six.decided()[-1][4]


def test_what_is_paused_is_not_promoted_by_itself_and_still_aborted(six: Fleet) -> None:
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
def test_what_is_over_can_be_neither_paused_nor_resumed_nor_aborted_again(six: Fleet, act: Callable[..., Any]) -> None:
    six.start(plan())
    six.abort()
    with pytest.raises(UsageError, match="is aborted"):
        decide(six, act)
    with pytest.raises(UsageError, match="is aborted"):
        six.abort()
    with pytest.raises(UsageError, match="is aborted"):
        six.promote(forced="again")


def test_of_two_that_promote_at_once_the_second_is_told_to_look_again(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow()
    seen = six.look()
    six.promote()
    with pytest.raises(UsageError, match="it is running at step 2 now"), six.store.transaction() as db:
        actions.promote(db, six.operator(2.0), six.counter(), seen.rollout, seen.verdict)
    assert events(six) == ["started", "promoted"]


@given(st.lists(st.tuples(st.sampled_from(["exercise", "solar", "machine"]), st.booleans()), max_size=8))
def test_whatever_was_started_and_aborted_a_topic_says_the_last_word_on_each_task(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, bool]]
) -> None:
    with fleet(tmp_path_factory.mktemp("fleet"), 3) as three:
        last: dict[str, tuple[str, str]] = {}
        for i, (task, stays) in enumerate(history):
            before = [one for one, (_, strategy) in last.items() if one == task and strategy == "shadow"]
            for one in before:
                three.abort(name=last[one][0])
            name = f"roll-out-{i}"
            three.start(short(name=name, task=task, digest=f"sha256:{i:064x}"))
            if not stays:
                three.abort(name=name)
            last[task] = (name, "shadow" if stays else "rollback")
        with three.store.snapshot() as db:
            there = journal.load_desired(db, ALL) is not None
        assert there == bool(history)
        if there:
            told = desired(three)
            assert {task: (one.rollout, one.strategy) for task, one in told.tasks.items()} == last
        assert audited(three).passed


# --- follow ---


def test_follow_promotes_step_by_step_and_finishes(six: Fleet) -> None:
    said: list[str] = []
    follower = RolloutController(six.desk, None, said.append)
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
    assert said[0].startswith(f"{NAME}: shadow 100 % → canary 50 %: agreement")
    assert retained(six).tasks["exercise"].strategy == "all"


def test_follow_aborts_what_is_bad_and_the_audit_has_why(six: Fleet) -> None:
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


def test_what_was_decided_before_a_kill_is_published_by_the_next_follow(six: Fleet) -> None:
    six.start(plan())
    assert six.broker.sent == []
    RolloutController(six.desk, None, lambda _: None).tick(0.0)
    assert retained(six) == desired(six)


def test_what_was_decided_before_a_kill_is_published_by_the_next_command(six: Fleet) -> None:
    six.start(plan())
    six.desk.execute(lambda db, who, _: actions.pause(db, who, journal.find(db, NAME)))
    assert retained(six) == desired(six)


def test_a_decision_stands_while_the_broker_is_away_and_is_published_once_it_is_back(six: Fleet) -> None:
    said: list[str] = []
    follower = RolloutController(six.desk, None, said.append)
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
    assert said[1:] == ["not published yet, will retry: nobody listens", "published"]


def test_a_decision_whose_counter_cannot_be_kept_is_not_made_and_is_said_once(six: Fleet) -> None:
    said: list[str] = []
    follower = RolloutController(six.desk, None, said.append)
    six.start(plan())
    six.in_shadow(agreeing=10)
    (six.folder / COUNTER_FILE).mkdir()
    for now_s in (1.0, 2.0):
        assert follower.tick(now_s)
    assert (six.find().state, events(six), len(said)) == ("running", ["started"], 1)
    assert "the last counter cannot be read" in said[0]
    (six.folder / COUNTER_FILE).rmdir()
    follower.tick(3.0)
    assert six.find().state == "aborted"


def test_a_database_that_fails_between_decision_and_broker_leaves_nothing_untold(six: Fleet) -> None:
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


def test_an_older_desired_state_that_a_broker_retains_again_is_replaced_and_has_a_lower_counter(six: Fleet) -> None:
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
def test_what_is_altered_after_the_decision_fails_the_audit_and_is_named(six: Fleet, name: str) -> None:
    six.start(plan())
    six.in_shadow()
    six.promote()
    assert audited(six).passed
    sql, n, reason = ALTERED[name]
    tamper(six.store.path, sql)
    report = audited(six)
    assert not report.passed
    found = [entry for entry in report.invalid_decisions if reason in entry["reason"]]
    assert [entry["n"] for entry in found] == [n], report.invalid_decisions


def test_a_decision_by_a_key_that_is_no_operators_fails_the_audit(six: Fleet) -> None:
    six.start(plan())
    report = audit(six.store, operators=[new_key(78).public])
    assert "unknown key" in report.invalid_decisions[0]["reason"]
    assert not audit(six.store).passed
    assert audit(six.store, operators=[new_key(78).public, OPERATOR.public]).passed


def test_a_genuine_decision_of_another_roll_out_does_not_pass_for_one_of_this(six: Fleet) -> None:
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


def test_an_older_desired_state_put_back_into_the_database_fails_the_audit_and_is_not_added_to(six: Fleet) -> None:
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
            "differs from its row in table shadows",
        ),
        ("DELETE FROM shadows", "is missing in table shadows"),
        ("UPDATE rollout_devices SET phase = 'settled'", "differs from its row in table rollout_devices"),
        ("DELETE FROM rollout_devices", "is missing in table rollout_devices"),
    ],
)
def test_tables_that_say_other_than_the_messages_fail_the_audit(six: Fleet, sql: str, reason: str) -> None:
    six.in_shadow(six.senders[:1], 1, agreeing=10)
    assert audited(six).passed
    tamper(six.store.path, sql)
    [entry] = audited(six).invalid
    assert reason in entry["reason"]
    assert entry["device"] == "pi-00"

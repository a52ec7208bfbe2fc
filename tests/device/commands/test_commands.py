"""Remote commands: executed once, refused with a reason, and no way to wear out the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outstation.device.commands.receiver import CommandReceiver
from outstation.device.machine.timekeeping import FLOOR
from outstation.device.pipeline.tasks import Effect
from outstation.device.recovery.open import open_store
from outstation.device.store.message_log import MessageLog
from outstation.device.store.transaction import Transaction
from outstation.device.uplink.refusals import CLEAR_AFTER_S, Refusals
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused, StorageFull
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import jws
from outstation.protocol.wire.commands import CLOCK_DEPENDENT, MAX_COMMAND_BYTES
from outstation.workbench.testing.messages import new_key
from tests.kit.operators import DEVICE, FLEET, MINUTE_US, NOW, TOPIC, Desk, Operator, trusted_keys


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def later(now: ClockReading, seconds: float) -> ClockReading:
    return ClockReading(now.wall_us + round(seconds * 1e6), now.boot_s + seconds, now.quality)


def test_a_signed_command_is_obeyed_answered_and_written_to_the_log(desk: Desk) -> None:
    [answer] = desk.obey(desk.operator.command("run", args={"task": "exercise"}))
    assert desk.done == [("run", {"task": "exercise"})]
    assert (answer.id, answer.name, answer.ok, answer.correlation) == ("id-1", "run", True, b"corr")
    kid = desk.operator.key.public.kid
    evidence = {"id": "id-1", "name": "run", "args": {"task": "exercise"}, "counter": 1, "kid": kid, "outcome": "done"}
    assert desk.audit() == [evidence]


def test_a_retained_command_is_refused_whoever_signed_it(desk: Desk) -> None:
    assert desk.refused(desk.operator.command(retained=True)) == "retained"


def test_a_command_for_another_device_is_refused_on_its_topic_and_on_ours(desk: Desk) -> None:
    other = TOPIC.replace(DEVICE, "pi-08")
    theirs = desk.operator.command(topic=other)
    assert desk.refused(theirs) == "other topic"
    moved = IncomingMessage(TOPIC, theirs.payload, theirs.tokens, False, 1, 1)
    assert desk.refused(moved) == "other topic"
    signed_here = desk.operator.command(device="pi-08")
    assert desk.refused(signed_here) == "other device"


def test_a_command_by_a_stranger_or_by_the_collector_is_refused(desk: Desk) -> None:
    assert desk.refused(Operator(key=new_key(5)).command()) == "unknown key"


def test_an_unsigned_and_an_altered_command_are_refused(desk: Desk) -> None:
    genuine = desk.operator.command("run", args={"task": "a"})
    assert desk.refused(IncomingMessage(TOPIC, genuine.payload, (), False, 1, 1)) == "unsigned"
    altered = genuine.payload.replace(b'"a"', b'"b"')
    assert desk.refused(IncomingMessage(TOPIC, altered, genuine.tokens, False, 1, 1)) == "bad signature"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'"name":"run","name":"report"', "duplicate key"),
        (b'"name":"report","unless":"raining"', "malformed payload"),
        (b'"name":"report","args":{"task":["a"]}', "malformed payload"),
    ],
)
def test_a_signed_command_with_ambiguous_json_is_refused(desk: Desk, payload: bytes, reason: str) -> None:
    plain = desk.operator.command("report").payload.replace(b',"args":{}', b"")
    changed = plain.replace(b'"name":"report"', payload)
    token = jws.sign(desk.operator.key, TOPIC, changed)
    assert desk.refused(IncomingMessage(TOPIC, changed, (token,), False, 1, 1)) == reason


def test_ten_megabytes_are_refused_before_anything_is_verified(desk: Desk) -> None:
    assert desk.refused(IncomingMessage(TOPIC, b"x" * 10_000_000, ("a..b",), False, 1, 1)) == "too large"
    assert desk.refused(desk.operator.command(args={"x": "y" * MAX_COMMAND_BYTES})) == "too large"


def test_the_same_command_again_is_refused_and_so_is_an_older_one(desk: Desk) -> None:
    first, second = desk.operator.command("run", args={"task": "a"}), desk.operator.command()
    desk.obey(second)
    assert desk.refused(second) == "replayed"
    assert desk.refused(first) == "replayed"
    assert [name for name, _ in desk.done] == ["report"]


def test_another_command_with_a_used_id_is_not_executed_and_is_counted(desk: Desk) -> None:
    desk.obey(desk.operator.command(id="same"), desk.operator.command("run", id="same", args={"task": "a"}))
    assert [name for name, _ in desk.done] == ["report"]
    counters = desk.store.counters()
    assert (counters["commands refused"], counters["commands refused: replayed"]) == (1, 1)


def test_a_replay_after_a_restart_is_refused(desk: Desk) -> None:
    command = desk.operator.command()
    desk.obey(command)
    desk.crash()
    assert desk.refused(command) == "replayed"


def test_a_restored_database_lets_only_unexpired_commands_be_replayed(desk: Desk) -> None:
    command = desk.operator.command("rollback", args={"task": "a"})
    desk.store.close()
    backup = {path: path.read_bytes() for path in desk.folder.iterdir() if path.is_file()}
    desk.open()
    desk.obey(command)
    desk.store.close()
    for path in desk.folder.iterdir():
        if path.is_file():
            path.unlink()
    for path, data in backup.items():
        path.write_bytes(data)
    desk.open()
    [answer] = desk.obey(command, now=later(NOW, 11 * 60))
    assert (answer.ok, len(desk.done)) == (False, 1)
    assert "expired" in answer.summary


def test_each_key_counts_for_itself(tmp_path: Path) -> None:
    first, two = Operator(), Operator(key=new_key(78))
    store = open_store(tmp_path)
    author = MessageLog(FLEET, DEVICE, new_key(1), store.log_id, 1, 120_000)
    commands = CommandReceiver(store, author, trusted_keys(store, author, first.key, two.key))
    commands.accept(first.command(counter=500))
    commands.accept(two.command(counter=3))
    with pytest.raises(MessageRefused, match="replayed"):
        commands.accept(two.command(counter=3))
    store.close()


def test_an_id_that_was_used_with_another_counter_is_not_obeyed_again(desk: Desk) -> None:
    desk.obey(desk.operator.command(id="same"))
    answers = desk.obey(desk.operator.command(id="same"))
    assert (len(desk.done), len(answers)) == (1, 1)


def test_an_expired_command_is_refused_answered_and_uses_its_counter_up(desk: Desk) -> None:
    command = desk.operator.command()
    [answer] = desk.obey(command, now=later(NOW, 10 * 60))
    assert (answer.ok, desk.done) == (False, [])
    assert "expired" in answer.summary
    assert desk.audit()[0]["outcome"] == "refused"
    assert desk.refused(command) == "replayed"


def test_a_command_that_would_be_valid_for_a_week_is_refused(desk: Desk) -> None:
    [answer] = desk.obey(desk.operator.command(expires=clock.to_rfc3339(NOW.wall_us + 7 * 1440 * MINUTE_US)))
    assert "more than 24 h" in answer.summary


def test_a_month_that_is_none_is_refused_like_any_wrong_time(desk: Desk) -> None:
    assert desk.refused(desk.operator.command(expires="2026-13-01T00:00:00Z")) == "malformed payload"
    assert (desk.obey(), desk.done) == ([], [])


def test_under_an_unsynced_clock_expiry_is_judged_by_the_time_floor(desk: Desk) -> None:
    with desk.store.transaction() as tx:
        tx.set_meta(FLOOR, str(NOW.wall_us))
    lost = ClockReading(0, 10.0, "unsynced")
    old = Operator(now_us=NOW.wall_us - 20 * MINUTE_US)
    answers = desk.obey(old.command(), Operator().command(counter=50, id="new"), now=lost)
    assert [answer.ok for answer in answers] == [False, True]


@pytest.mark.parametrize("name", sorted(CLOCK_DEPENDENT))
def test_under_an_unsynced_clock_nothing_is_destroyed(desk: Desk, name: str) -> None:
    args = {"task": "a"} if name == "rollback" else {}
    [answer] = desk.obey(desk.operator.command(name, args=args), now=ClockReading(0, 10.0, "unsynced"))
    assert (answer.ok, desk.done) == (False, [])
    assert "unsynced" in answer.summary


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("dance", {}, "there is no command"),
        ("run", {}, "needs task"),
        ("report", {"loud": "yes"}, "takes no loud"),
    ],
)
def test_a_command_that_is_none_is_answered_with_the_reason(
    desk: Desk, name: str, args: dict[str, str], why: str
) -> None:
    [answer] = desk.obey(desk.operator.command(name, args=args))
    assert why in answer.summary


def test_a_crash_between_claim_and_effect_repeats_nothing(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def die(args: Mapping[str, str], now: ClockReading) -> Effect:
        raise Crash

    desk = Desk(tmp_path, actions={"rotate-key": die})
    command = desk.operator.command("rotate-key")
    with pytest.raises(Crash):
        desk.obey(command)
    desk.crash()
    assert desk.refused(command) == "replayed"
    desk.control.recover(NOW)
    desk.control.recover(NOW)
    [answer] = desk.answers()
    assert (answer.id, answer.ok) == ("id-1", False)
    assert "stopped while" in answer.summary
    assert [entry["outcome"] for entry in desk.audit()] == ["interrupted"]
    desk.store.close()


def test_a_crash_in_the_effects_commit_undoes_effect_answer_and_log(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def write(tx: Transaction) -> None:
        tx.set_meta("effect", "half")
        raise Crash

    desk = Desk(tmp_path, actions={"pause": lambda args, now: Effect("paused", write=write)})
    with pytest.raises(Crash):
        desk.obey(desk.operator.command("pause", args={"task": "a"}))
    desk.crash()
    assert (desk.store.get_meta("effect", ""), desk.answers(), desk.audit()) == ("", [], [])
    desk.control.recover(NOW)
    assert [answer.ok for answer in desk.answers()] == [False]
    desk.store.close()


def test_a_crash_after_the_commit_loses_no_answer(desk: Desk) -> None:
    desk.obey(desk.operator.command())
    desk.crash()
    desk.control.recover(NOW)
    assert [(answer.id, answer.ok) for answer in desk.answers()] == [("id-1", True)]


def test_with_a_full_disk_the_operator_hears_that_nothing_was_done(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("the disk is full")

    command = desk.operator.command("run", args={"task": "a"})
    desk.commands.accept(command)
    with monkeypatch.context() as patched:
        patched.setattr(desk.store, "transaction", full)
        desk.control.tick(NOW)
    output = ConfirmingSession()
    desk.commands.tick(output, NOW)
    [reply] = [msgspec.json.decode(message.payload) for message in output.messages]
    assert (reply["kind"], reply["ok"], desk.done) == ("reply", False, [])
    assert "disk is full" in reply["summary"]


class ConfirmingSession:
    """Session of a broker that confirms everything, or nothing."""

    def __init__(self, *, confirms: bool = True) -> None:
        self.messages: list[OutgoingMessage] = []
        self.confirms = confirms

    def enqueue_live(self, message: OutgoingMessage) -> None:
        self.messages.append(message)

    def is_live_confirmed(self) -> bool:
        return self.confirms


def test_an_unconfirmed_answer_is_sent_again_once(desk: Desk) -> None:
    desk.obey(desk.operator.command())
    lost = ConfirmingSession(confirms=False)
    desk.commands.on_connected()
    desk.commands.tick(lost, NOW)
    desk.commands.tick(lost, NOW)
    assert len(lost.messages) == 1
    assert lost.messages[0].correlation == b"corr"
    assert lost.messages[0].retain is False
    taken = ConfirmingSession()
    desk.commands.on_connected()
    for _ in range(3):
        desk.commands.tick(taken, NOW)
    assert [message.payload for message in taken.messages] == [lost.messages[0].payload]
    assert desk.commands.is_idle()
    desk.crash()
    nothing = ConfirmingSession()
    desk.commands.on_connected()
    desk.commands.tick(nothing, NOW)
    assert nothing.messages == []


def test_commands_beyond_the_queue_are_refused_as_busy(desk: Desk) -> None:
    for _ in range(16):
        desk.commands.accept(desk.operator.command())
    late = desk.operator.command()
    assert desk.refused(late) == "busy"
    assert len(desk.obey()) == 16
    assert desk.refused(late) == ""


def test_a_device_without_operators_does_not_listen(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    author = MessageLog(FLEET, DEVICE, new_key(1), store.log_id, 1, 120_000)
    assert CommandReceiver(store, author, trusted_keys(store, author)).subscriptions == []
    store.close()


def flood(desk: Desk, refusals: Refusals, n: int, every_s: float = 0.001) -> ClockReading:
    """Deliver forged commands one after the other; return the time of the last."""
    forged = Operator(key=new_key(9)).command()
    now = NOW
    for i in range(n):
        now = later(NOW, i * every_s)
        try:
            desk.commands.accept(forged)
        except MessageRefused as refusal:
            refusals.add("commands", refusal, now)
        refusals.flush(now)
    return now


def test_forged_commands_make_one_alert_a_few_commits_and_no_memory(desk: Desk) -> None:
    refusals = Refusals(desk.store, desk.author)
    before = desk.store._db.total_changes
    end = flood(desk, refusals, 10_000, every_s=0.03)
    assert desk.store._db.total_changes - before < 60
    refusals.flush(end, force=True)
    counters = desk.store.counters()
    assert counters["commands refused"] == 10_000
    assert counters["commands refused: unknown key"] == 10_000
    alerts = desk.store.recent_alerts(10)
    assert [(alert["alert"], alert["state"]) for alert in alerts] == [("security", "raised")]
    assert desk.commands.received.qsize() == 0
    assert len(desk.obey(desk.operator.command())) == 1


def test_the_alert_is_cleared_after_a_quiet_hour_and_not_before(desk: Desk) -> None:
    refusals = Refusals(desk.store, desk.author)
    end = flood(desk, refusals, 3)
    refusals.flush(later(end, CLEAR_AFTER_S - 1))
    assert [alert["state"] for alert in desk.store.recent_alerts(10)] == ["raised"]
    refusals.flush(later(end, CLEAR_AFTER_S + 1))
    refusals.flush(later(end, CLEAR_AFTER_S + 2))
    assert [alert["state"] for alert in desk.store.recent_alerts(10)] == ["cleared", "raised"]


def test_an_open_refusal_alert_clears_a_quiet_hour_after_the_start(desk: Desk) -> None:
    flood(desk, Refusals(desk.store, desk.author), 1)
    again = Refusals(desk.store, desk.author)
    start = ClockReading(NOW.wall_us, 5.0, "synced")
    again.flush(start)
    again.flush(later(start, CLEAR_AFTER_S - 1))
    assert [alert["state"] for alert in desk.store.recent_alerts(10)] == ["raised"]
    again.flush(later(start, CLEAR_AFTER_S))
    assert [alert["state"] for alert in desk.store.recent_alerts(10)] == ["cleared", "raised"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(max_size=300), token=st.text(max_size=80), topic=st.sampled_from([TOPIC, TOPIC + "/x", ""]))
def test_no_bytes_from_a_stranger_do_anything_but_be_refused(
    desk: Desk, payload: bytes, token: str, topic: str
) -> None:
    assert desk.refused(IncomingMessage(topic, payload, (token,), False, 1, 1)) != ""

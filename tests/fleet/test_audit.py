"""Audit: it passes for intact evidence, fails for every alteration, and names the message."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.fleet.audit import log_auditor
from outstation.fleet.audit.audit import audit, audit_from_checkpoint
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.audit.checkpoint import CheckpointFolder
from outstation.fleet.audit.log_auditor import split_by_declaration
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.workers import device_ranges as workers
from outstation.foundation.errors import UsageError
from outstation.protocol.wire.verification import VerifiedMessage, verify_message
from outstation.workbench.testing.messages import MessageSender, SignedMessage, new_key

NOW = "2026-11-24T22:20:00.000000Z"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FleetStore]:
    with FleetStore(tmp_path / "fleet.db") as opened:
        yield opened


def collected(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> None:
    if store.active_key(sender.device) is None:
        store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)


def whole_log(sender: MessageSender) -> list[SignedMessage]:
    """Return one message of each kind; seq 1, 3 and 6 are results, seq 7 is health."""
    log = [sender.results(), sender.drift(), sender.results(n=0, rows=50), sender.alert(), sender.quality()]
    return [*log, sender.results(), sender.health_with_cursor()]


def tamper(store: FleetStore, sql: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        assert db.execute(sql, values).rowcount >= 1
    db.close()


def reasons(report: AuditReport) -> list[tuple[Any, str]]:
    return [(entry["seq"], entry["reason"]) for entry in report.invalid]


def test_a_whole_log_of_each_of_two_devices_passes(store: FleetStore) -> None:
    for device in ("pi-07", "pi-08"):
        sender = MessageSender(device)
        collected(store, sender, *whole_log(sender))
    document = audit(store).to_dict()
    assert document["passed"], document
    assert (document["devices"], document["messages"], document["duplicates"]) == (2, 14, 0)
    assert (document["gaps"], document["invalid"]) == ([], [])
    assert [(c["task"], c["stream"], c["first"], c["last"], c["results"]) for c in document["coverage"]] == [
        ("exercise", "watch", 1, 650, 6)
    ] * 2
    assert audit(store, "pi-08").messages == 7


def test_an_empty_database_passes_with_nothing_in_it(store: FleetStore) -> None:
    assert audit(store).to_dict() == {
        **dict.fromkeys(("devices", "messages", "duplicates", "invalid_count", "decisions"), 0),
        **{
            name: []
            for name in ("gaps", "invalid", "coverage", "evicted", "pruned", "replaced_secrets", "invalid_decisions")
        },
        "passed": True,
    }


COLUMNS = {
    "device": ("'pi-08'", "stored with device 'pi-08'"),
    "log": ("'0' || substr(log, 2)", "stored with log"),
    "seq": ("30", "stored with seq 30"),
    "kind": ("'drift'", "stored as kind 'drift'"),
    "topic": ("replace(topic, 'exercise', 'exercisf')", "does not verify"),
    "payload": ("CAST(replace(payload, 'watch', 'match') AS BLOB)", "bad signature"),
    "payload as text": ("replace(payload, 'watch', 'match')", "bad signature"),
    "payload as a number": ("5", "is not stored as text and bytes"),
    "jws": ("substr(jws, 1, length(jws) - 3) || 'AAA'", "does not verify"),
    "jws header": ("'f' || substr(jws, 2)", "does not verify"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_altering_any_signed_column_fails_the_audit(store: FleetStore, name: str) -> None:
    sender = MessageSender(log="5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11")
    collected(store, sender, *whole_log(sender))
    value, reason = COLUMNS[name]
    tamper(store, f"UPDATE messages SET {name.split()[0]} = {value} WHERE seq = 3")
    report = audit(store)
    assert not report.passed
    result = [(entry["seq"], entry["reason"]) for entry in report.invalid if reason in entry["reason"]]
    assert [seq for seq, _ in result] == [30 if name == "seq" else 3], report.to_dict()


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7), column=st.sampled_from(["payload", "jws", "topic"]))
def test_any_flipped_bit_of_the_evidence_fails_the_audit(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int, column: str
) -> None:
    store = FleetStore(tmp_path_factory.mktemp("db") / "fleet.db")
    sender = MessageSender()
    collected(store, sender, sender.results(), sender.results(), sender.results())
    with store.snapshot() as db:
        [(old,)] = db.execute(f"SELECT CAST({column} AS BLOB) FROM messages WHERE seq = 2").fetchall()
    at = position % len(old)
    new = old[:at] + bytes([old[at] ^ 1 << bit]) + old[at + 1 :]
    kind = "BLOB" if column == "payload" else "TEXT"
    with store.transaction() as db:
        db.execute(f"UPDATE messages SET {column} = CAST(? AS {kind}) WHERE seq = 2", (new,))
    report = audit(store)
    store.close()
    assert [entry["seq"] for entry in report.invalid] == [2]


def test_a_deleted_message_is_an_undeclared_gap_anywhere_in_the_log(store: FleetStore) -> None:
    sender = MessageSender()
    collected(store, sender, *whole_log(sender))
    tamper(store, "DELETE FROM messages WHERE seq IN (2, 7)")
    assert [(g["from"], g["to"], g["declared"]) for g in audit(store).gaps] == [(2, 2, False), (7, 7, False)]
    assert not audit(store).passed
    tamper(store, "DELETE FROM messages")
    tamper(store, "DELETE FROM results")
    report = audit(store)
    assert [(g["from"], g["to"], g["declared"]) for g in report.gaps] == [(1, 7, False)]
    assert (report.devices, report.messages, report.passed) == (1, 0, False)


def test_declared_evictions_pass_and_what_they_do_not_cover_fails(store: FleetStore) -> None:
    sender = MessageSender()
    log = whole_log(sender)
    collected(store, sender, log[0], log[5], log[6], sender.evicted((2, 5)), sender.results())
    report = audit(store)
    assert report.passed, report.to_dict()
    assert [(g["from"], g["to"], g["declared"]) for g in report.gaps] == [(2, 5, True)]
    other = MessageSender("pi-08")
    log = whole_log(other)
    collected(store, other, log[0], log[5], log[6], other.evicted((2, 3), (5, 5)))
    gaps = [(g["from"], g["to"], g["declared"]) for g in audit(store, "pi-08").gaps]
    assert gaps == [(2, 3, True), (4, 4, False), (5, 5, True)]
    assert not audit(store).passed


def test_an_eviction_cannot_declare_later_messages(store: FleetStore) -> None:
    sender = MessageSender()
    log = [sender.evicted((2, 3)), sender.quality(), sender.quality(), sender.quality()]
    collected(store, sender, log[0], log[3])
    assert [(g["from"], g["to"], g["declared"]) for g in store.gaps()] == [(2, 3, False)]
    assert not audit(store).passed


def test_a_chain_that_was_signed_anew_in_the_middle_fails(store: FleetStore) -> None:
    sender = MessageSender()
    first = sender.results()
    sender.prev = "x" * 43
    collected(store, sender, first, sender.quality())
    [(seq, reason)] = reasons(audit(store))
    assert seq == 2
    assert "does not follow" in reason


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda s: s.results(rows_at=(301, 400)), None),
        (lambda s: s.results(rows_at=(300, 400)), "row 300 was reported before"),
        (lambda s: s.results(rows_at=(1, 300)), "row 300 was reported before"),
        (
            lambda s: s.results(rows_at=(302, 400)),
            "starts at row 302 of watch, but the results before it end at row 300",
        ),
        (lambda s: s.results(rows_at=(302, 400), stream="other"), None),
        (lambda s: s.health(exercise={"stream": "watch", "row": 301, "first": 1}), "consumed watch up to row 301"),
        (lambda s: s.health(exercise={"stream": "watch", "row": 200, "first": 1}), None),
        (lambda s: s.health(exercise={"stream": "gone", "row": 5, "first": 1}), "consumed gone up to row 5"),
        (lambda s: s.health(exercise={"stream": 5, "row": "x"}, y={}), None),
    ],
)
def test_rows_are_covered_exactly_once(
    store: FleetStore, second: Callable[[MessageSender], SignedMessage], reason: str | None
) -> None:
    sender = MessageSender()
    collected(store, sender, sender.results(), second(sender))
    result = reasons(audit(store))
    assert [seq for seq, _ in result] == ([] if reason is None else [2])
    assert reason is None or reason in result[0][1]


def joined(first: int, last: int, proof: str) -> dict[str, Any]:
    return {"weather": {"stream": "air", "rows": [first, last], "input": proof}}


def test_joined_rows_and_their_commitments_are_reported(store: FleetStore) -> None:
    sender = MessageSender()
    log = [sender.results(joined=joined(*each)) for each in ((5, 9, "a"), (5, 9, "a"), (7, 12, ""))]
    collected(store, sender, *log)
    report = audit(store)
    assert report.passed
    [entry] = report.to_dict()["coverage"]
    assert entry["joined"] == {"weather": {"stream": "air", "first": 5, "last": 12, "messages": 3, "unproven": 1}}


def test_two_commitments_to_the_same_joined_rows_fail_the_audit(store: FleetStore) -> None:
    sender = MessageSender()
    collected(store, sender, sender.results(joined=joined(5, 9, "a")), sender.results(joined=joined(5, 9, "b")))
    assert reasons(audit(store)) == [(2, "commits to rows 5-9 of air as others than the results before it")]


def test_commitments_under_another_secret_contradict_none_before_it_was_replaced(store: FleetStore) -> None:
    sender = MessageSender()
    first = sender.results(joined=joined(5, 9, "a"))
    replaced = sender.append("audit", event="secret replaced", summary="It was lost.", evidence={"through": 1})
    collected(
        store, sender, first, replaced, *(sender.results(joined=joined(5, 9, proof)) for proof in ("b", "b", "c"))
    )
    report = audit(store)
    assert reasons(report) == [(5, "commits to rows 5-9 of air as others than the results before it")]
    [entry] = report.to_dict()["replaced_secrets"]
    assert (entry["device"], entry["seq"]) == (sender.device, 2)


def test_rows_that_could_not_be_read_again_contradict_no_commitment(store: FleetStore) -> None:
    sender = MessageSender()
    log = [sender.results(joined=joined(5, 9, proof)) for proof in ("", "a", "", "a", "", "b")]
    collected(store, sender, *log)
    assert reasons(audit(store)) == [(6, "commits to rows 5-9 of air as others than the results before it")]


def test_a_message_after_a_gap_in_the_rows_is_compared_by_its_joined_rows_too(store: FleetStore) -> None:
    sender = MessageSender()
    first = sender.results(joined=joined(5, 9, "a"))
    later = sender.results(rows_at=(302, 400), joined=joined(5, 9, "b"))
    collected(store, sender, first, later)
    report = audit(store)
    assert reasons(report) == [
        (2, "starts at row 302 of watch, but the results before it end at row 300"),
        (2, "commits to rows 5-9 of air as others than the results before it"),
    ]
    [entry] = report.to_dict()["coverage"]
    assert entry["joined"]["weather"]["messages"] == 2


def test_results_that_begin_after_the_first_consumed_row_are_reported(store: FleetStore) -> None:
    sender = MessageSender(row=100)
    collected(store, sender, sender.results(), sender.health_with_cursor())
    [(seq, reason)] = reasons(audit(store))
    assert seq == 2
    assert "from row 1, but the first results start at 101" in reason


def given_up(sender: MessageSender, rows: list[list[int]], tasks: Any, *, used: bool = False) -> SignedMessage:
    evidence = {"stream": "watch", "rows": rows, "used": used, "tasks": tasks, "reason": "no room", "bytes": 1}
    return sender.append("audit", event="evicted", summary="no room", evidence=evidence)


@pytest.mark.parametrize(
    ("rows", "tasks", "passes"),
    [
        ([[301, 400]], ["exercise"], True),
        ([[301, 350], [351, 500]], ["exercise"], True),
        ([[301, 399]], ["exercise"], False),
        ([[302, 400]], ["exercise"], False),
        ([[301, 400]], ["another"], False),
        ([[301, 400]], [], False),
        ("all", ["exercise"], False),
        ([[301, 400]], "exercise", False),
    ],
)
def test_rows_that_were_given_up_need_no_results_if_their_task_is_named(
    store: FleetStore, rows: Any, tasks: Any, passes: bool
) -> None:
    sender = MessageSender()
    log = [
        sender.results(),
        given_up(sender, rows, tasks),
        sender.results(rows_at=(401, 500)),
        sender.health_with_cursor(),
    ]
    collected(store, sender, *log)
    report = audit(store)
    assert report.passed == passes
    if passes:
        (listed,) = report.to_dict()["evicted"]
        assert (listed["stream"], listed["used"], listed["tasks"]) == ("watch", False, ["exercise"])
        assert [list(pair) for pair in listed["rows"]] == rows


def test_evicted_rows_before_the_first_result_are_covered(store: FleetStore) -> None:
    sender = MessageSender()
    cursor = {"stream": "watch", "row": 300, "first": 101}
    collected(store, sender, given_up(sender, [[1, 300]], ["exercise"]), sender.health(exercise=cursor))
    assert audit(store).passed


@pytest.mark.parametrize(
    ("sql", "seq", "reason"),
    [
        ("UPDATE results SET label = 'ROW' WHERE row = 101", 1, "differs from table results in row 101"),
        ("UPDATE results SET score = NULL WHERE row = 351", 6, "differs from table results in row 351"),
        ("DELETE FROM results WHERE row = 101", 1, "reports 3 results, but table results has 2"),
        ("INSERT INTO results SELECT * FROM results WHERE row = 101", 1, "table results has 4"),
        ("UPDATE results SET seq = 9 WHERE seq = 6", 9, "is not stored, but table results has 3"),
        ("UPDATE results SET device = 'a' WHERE seq = 6", 6, "is not stored, but table results has 3"),
    ],
)
def test_a_results_table_that_says_something_else_fails(store: FleetStore, sql: str, seq: int, reason: str) -> None:
    sender = MessageSender()
    collected(store, sender, *whole_log(sender))
    tamper(store, sql)
    assert any(at == seq and reason in output for at, output in reasons(audit(store)))


def test_messages_of_a_revoked_key_verify_and_of_a_removed_key_do_not(store: FleetStore) -> None:
    sender = MessageSender()
    collected(store, sender, *whole_log(sender))
    store.enrol("pi-07", new_key().public, replace=True, now=NOW)
    assert audit(store).passed
    tamper(store, "DELETE FROM keys WHERE kid = ?", sender.key.public.kid)
    report = audit(store)
    assert {reason for _, reason in reasons(report)} == {f"does not verify: unknown key: kid {sender.key.public.kid!r}"}
    assert report.invalid_count == 7


def test_a_seq_that_is_no_number_is_named(store: FleetStore) -> None:
    sender = MessageSender()
    collected(store, sender, *whole_log(sender))
    tamper(store, "UPDATE messages SET seq = 'x' WHERE seq = 2")
    assert ("x", "seq 'x' is not a sequence number") in reasons(audit(store))


RANGES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=5)


@given(missing=st.sets(st.integers(1, 40)), declared=RANGES)
def test_missing_ranges_are_cut_as_a_set_of_numbers_would_be(
    missing: set[int], declared: list[tuple[int, int]]
) -> None:
    runs = [(n, n) for n in sorted(missing)]
    cover = {n for first, last in declared for n in range(first, last + 1)}
    assert split_by_declaration(runs, declared) == [(n, n, n in cover) for n in sorted(missing)]
    whole = [(1, 40)]
    parts = split_by_declaration(whole, declared)
    assert [n for first, last, _ in parts for n in range(first, last + 1)] == list(range(1, 41))
    assert all((n in cover) == inside for first, last, inside in parts for n in range(first, last + 1))


# --- checkpoints and worker processes


AUDITOR = new_key(99)


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "audit", "acme", [AUDITOR.public])


def audit_on(store: FleetStore, checkpoints: CheckpointFolder, **options: Any) -> tuple[dict[str, Any], bool]:
    """Return the document of an audit, and whether it went on from a checkpoint."""
    report, checkpoint = audit_from_checkpoint(store, checkpoints, AUDITOR, **options)
    return report.to_dict(), checkpoint is not None


def test_an_audit_from_a_checkpoint_reports_the_same_as_one_of_everything(
    store: FleetStore, checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    senders = [MessageSender(f"pi-{n:02}") for n in range(4)]
    verified: list[int] = []

    def verify(*arguments: Any) -> VerifiedMessage:
        verified.append(1)
        return verify_message(*arguments)

    monkeypatch.setattr(log_auditor, "verify_message", verify)
    for turn in range(3):
        for sender in senders[: turn + 2]:
            collected(store, sender, *whole_log(sender), sender.evicted((9, 9)))
        expected = audit(store).to_dict()
        verified.clear()
        assert audit_on(store, checkpoints) == (expected, turn > 0)
        assert len(verified) == 8 * (turn + 2)
        assert expected["passed"]
    verified.clear()
    assert audit_on(store, checkpoints) == (expected, True)
    assert not verified
    assert audit_on(store, checkpoints, full=True) == (expected, False)
    assert len(verified) == expected["messages"]


@pytest.mark.attack("audit")
@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("UPDATE messages SET payload = replace(payload, 'PEN', 'ABD') WHERE seq = 1", "does not verify"),
        ("UPDATE messages SET jws = substr(jws, 2) WHERE seq = 2", "does not verify"),
        ("UPDATE messages SET received = 'x' WHERE seq = 3", "is not a time"),
        ("DELETE FROM results WHERE seq = 1 AND row = (SELECT min(row) FROM results)", "reports 3 results"),
        ("UPDATE results SET seq = 99 WHERE seq = 1", "is not stored, but table results"),
        ("UPDATE alerts SET summary = 'nothing' WHERE seq = 4", "differs from its rows in table alerts"),
        ("DELETE FROM messages WHERE seq = 2", "is missing"),
        ("UPDATE logs SET last_seq = 2", "table logs has"),
        ("UPDATE keys SET last_seq = 4", "retired key"),
        ("UPDATE keys SET last_seq = 'x'", "unknown key"),
        ("UPDATE keys SET key = (SELECT key FROM keys WHERE device = 'pi-07')", "does not verify"),
        ("DELETE FROM keys", "unknown key"),
    ],
)
def test_a_change_before_the_checkpoint_is_reported_as_without_one(
    store: FleetStore, checkpoints: CheckpointFolder, sql: str, reason: str
) -> None:
    for device in ("pi-07", "pi-08"):
        sender = MessageSender(device)
        collected(store, sender, *whole_log(sender))
    assert audit_on(store, checkpoints)[0]["passed"]
    tamper(store, f"{sql} {'AND' if 'WHERE' in sql else 'WHERE'} device = 'pi-08'")
    for _ in range(2):
        # A device with a problem is in no checkpoint.
        document, went_on = audit_on(store, checkpoints)
        assert went_on
        assert not document["passed"]
        expected = audit(store).to_dict()
        for each in (document, expected):
            each["invalid"].sort(key=str)
        assert document == expected
    assert reason in str(document["invalid"]) or document["gaps"]


def test_a_late_message_fills_a_gap_of_the_checkpoint(store: FleetStore, checkpoints: CheckpointFolder) -> None:
    sender = MessageSender()
    log = whole_log(sender)
    collected(store, sender, *log[:2], *log[3:])
    assert not audit_on(store, checkpoints)[0]["passed"]
    collected(store, sender, log[2])
    assert audit_on(store, checkpoints)[0]["passed"]
    assert audit_on(store, checkpoints)[0] == audit(store).to_dict()


def test_a_gap_that_a_new_log_declares_stays_declared(store: FleetStore, checkpoints: CheckpointFolder) -> None:
    old = MessageSender()
    log = whole_log(old)
    new = MessageSender(key=old.key)
    evidence = {"old": old.log, "through": old.seq + 2, "reissued": 0}
    collected(store, old, *log)
    assert audit_on(store, checkpoints)[0]["passed"]
    collected(store, new, new.append("audit", event="new log", summary="", evidence=evidence), new.alert())
    for _ in range(2):
        document = audit_on(store, checkpoints)[0]
        assert document == audit(store).to_dict()


@pytest.mark.attack("audit")
def test_a_checkpoint_that_is_not_genuine_is_refused(store: FleetStore, checkpoints: CheckpointFolder) -> None:
    sender = MessageSender()
    collected(store, sender, *whole_log(sender))
    audit_on(store, checkpoints)
    [part] = checkpoints.path.glob("part-*.db")
    genuine, data = (checkpoints.path / "checkpoint.json").read_bytes(), part.read_bytes()
    others = CheckpointFolder(checkpoints.path, "acme", [new_key(5).public])
    with pytest.raises(UsageError, match="cannot be believed: unknown key"):
        audit_from_checkpoint(store, others, AUDITOR)
    with pytest.raises(UsageError, match="cannot be believed"):
        CheckpointFolder(checkpoints.path, "other", [AUDITOR.public]).load()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"is not the file that was signed; audit everything with --full"):
        audit_on(store, checkpoints)
    part.write_bytes(data)
    for cut in range(0, len(genuine), 7):
        (checkpoints.path / "checkpoint.json").write_bytes(genuine[:cut] + b"?" + genuine[cut + 1 :])
        with pytest.raises(UsageError, match="cannot be believed"):
            audit_on(store, checkpoints)
    assert audit_on(store, checkpoints, full=True)[0]["passed"]
    assert audit_on(store, checkpoints)[1]


def test_processes_audit_ranges_of_devices_and_report_in_order(
    store: FleetStore, checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_MIN_MESSAGES", 10)
    for n in range(6):
        sender = MessageSender(f"pi-{n:02}")
        collected(store, sender, *whole_log(sender))
    tamper(store, "UPDATE messages SET payload = replace(payload, 'PEN', 'ABD') WHERE device = 'pi-03'")
    expected = audit(store).to_dict()
    assert not expected["passed"]
    assert len(workers.split_devices(store, 2)) == 4
    advanced: list[int] = []
    keys = [AUDITOR.public]
    assert audit(store, None, advanced.append, keys, 2, keys).to_dict() == expected
    assert sum(advanced) == expected["messages"]
    for turn in range(2):
        result = audit_on(store, checkpoints, operators=keys, processes=2, collectors=keys)
        assert result == (expected, turn > 0)

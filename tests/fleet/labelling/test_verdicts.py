"""Verdicts: what people say of results and alerts becomes labels with an author, apart from ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from outstation.fleet.database.evidence import EvidenceQueries
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.labelling import verdicts as table
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents.incidents import IncidentFilter, list_incidents
from outstation.fleet.labelling import candidates, feedback_loops, given_labels, verdicts
from outstation.fleet.labelling.verdicts import Judge, Judgement
from outstation.foundation.errors import UsageError
from outstation.ml.performance.labels import Label
from outstation.protocol.alerts.incident import Incident
from outstation.workbench.testing.messages import MODEL, MessageSender, new_key

NOW = "2026-11-24T22:20:00.000000Z"
SENDER = MessageSender(key=new_key(7), log="5f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c11")
RESULTS = SENDER.results(60, rows_at=(1, 60))
ALERT = SENDER.append(
    "alerts",
    task=SENDER.task,
    alert="result",
    subject="fall",
    state="raised",
    severity="warning",
    summary="a fall",
    id=f"{SENDER.task}/result/fall/1",
    evidence={"rule": "fall", "row": 7},
)
DRIFTED = SENDER.drift(
    "drift",
    window={"index": 0, "rows": [20, 40], "from": NOW, "to": NOW, "n": 21},
    features={"ax": {"state": "drift", "psi": 0.7}},
)


@pytest.fixture
def store(fresh: Callable[[], FleetStore]) -> Iterator[FleetStore]:
    opened = fresh()
    opened.enrol(SENDER.device, SENDER.key.public, replace=False, now=NOW)
    opened.ingest([Arrival(SENDER.verify(message)) for message in (RESULTS, ALERT, DRIFTED)], [], NOW)
    yield opened
    opened.close()


def judge(store: FleetStore, row: int, text: str | None, by: str = "eva") -> Judgement:
    return judge_all(store, {row: text}, by)[0]


def judge_all(store: FleetStore, texts: Mapping[int, str | None], by: str = "eva") -> list[Judgement]:
    judged = Judge(by, "cli", NOW)
    with store.transaction() as db:
        return [verdicts.judge_result(db, SENDER.device, SENDER.task, row, text, judged) for row, text in texts.items()]


def ask(store: FleetStore, sql: str) -> list[Any]:
    with store.snapshot() as db:
        return db.execute(sql).fetchall()


def answers(store: FleetStore) -> dict[int, str]:
    return dict(ask(store, "SELECT row, label FROM results"))


def other(label: str) -> str:
    return "ABD" if label == "PEN" else "PEN"


def metric_counts(store: FleetStore) -> dict[str, int]:
    return dict(ask(store, "SELECT source, n FROM metrics WHERE metric = 'accuracy' AND slice = ''"))


def test_a_verdict_is_a_label_with_its_author_and_the_answer(store: FleetStore) -> None:
    answers_by_row = answers(store)
    assert judge(store, 1, None).verdict == "confirmed"
    assert judge(store, 2, other(answers_by_row[2])).verdict == "corrected"
    rows = ask(store, "SELECT row, given_by, verdict, label, predicted, via FROM verdicts ORDER BY row")
    assert rows == [
        (1, "eva", "confirmed", answers_by_row[1], answers_by_row[1], "cli"),
        (2, "eva", "corrected", other(answers_by_row[2]), answers_by_row[2], "cli"),
    ]


def test_verdicts_and_ground_truth_have_metrics_of_their_own(store: FleetStore) -> None:
    answers_by_row = answers(store)
    with store.transaction() as db:
        given_labels.add(
            db, SENDER.device, SENDER.task, [Label(row, None, answers_by_row[row]) for row in range(1, 31)], NOW, "lab"
        )
    for row in range(41, 51):
        judge(store, row, other(answers_by_row[row]))
    assert metric_counts(store) == {"collector": 30, "verdicts": 10}
    sql = "SELECT source, value FROM metrics WHERE metric = 'accuracy' AND slice = ''"
    assert dict(ask(store, sql)) == {"collector": 1.0, "verdicts": 0.0}
    assert ask(store, "SELECT count(*) FROM labels") == [(30,)]
    with store.snapshot() as db:
        counts = EvidenceQueries(store, db).count_labels()
    assert counts == {(SENDER.device, SENDER.task, ""): {"human": 30, "verdict": 10}}


def test_people_who_disagree_leave_the_label_open(store: FleetStore) -> None:
    answers_by_row = answers(store)
    judge(store, 5, None, "eva")
    judge(store, 5, other(answers_by_row[5]), "otto")
    assert ask(store, "SELECT * FROM agreed_verdicts") == []
    assert metric_counts(store) == {}
    with store.snapshot() as db:
        assert verdicts.summarize(db)["disputed"] == 1
    judge(store, 5, None, "otto")
    assert ask(store, "SELECT row, label, people FROM agreed_verdicts") == [(5, answers_by_row[5], 2)]


def test_a_verdict_is_withdrawn_by_its_author_only(store: FleetStore) -> None:
    judge(store, 5, None, "eva")
    for by in ("otto", "eva"):
        with store.transaction() as db:
            author = Judge(by, "dashboard", NOW)
            if by == "otto":
                with pytest.raises(UsageError, match="otto gave no verdict"):
                    verdicts.withdraw(db, SENDER.device, SENDER.task, 5, author)
            else:
                verdicts.withdraw(db, SENDER.device, SENDER.task, 5, author)
    assert ask(store, "SELECT * FROM verdicts") == []
    assert metric_counts(store) == {}


@pytest.mark.parametrize(
    ("row", "text", "reason"),
    [(99, None, "no result"), (1, "sideways", "no label of this model"), (1, "x" * 300, "characters"), (1, "", "char")],
)
def test_a_verdict_that_means_nothing_is_refused(store: FleetStore, row: int, text: str | None, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        judge(store, row, text)
    assert ask(store, "SELECT * FROM verdicts") == []


def find_alert(store: FleetStore) -> Incident:
    [incident] = list_incidents(store, IncidentFilter(alert="result"), now=NOW)
    return incident


def test_after_a_card_was_replaced_verdicts_and_requests_keep_to_the_log_that_they_are_about(
    store: FleetStore,
) -> None:
    incident = find_alert(store)
    new = MessageSender(key=SENDER.key, log="6f0c2f6e-1a54-4d0b-9a53-7a4b3f0d9c22")
    store.ingest([Arrival(new.verify(new.results(30, rows_at=(1, 30))))], [], "2026-11-25T22:20:00.000000Z")
    with store.transaction() as db:
        db.execute("UPDATE logs SET live = (log = ?)", (new.log,))
        verdicts.judge_alert(db, incident, is_right=True, text=None, judge=Judge("eva", "dashboard", NOW))
    assert ask(store, "SELECT log, row FROM verdicts") == [(SENDER.log, 7)]
    with store.snapshot() as db:
        requests = candidates.list_next(db, device=SENDER.device, task=SENDER.task, limit=20)
    assert {request.log for request in requests} == {new.log}


def test_an_alert_about_a_result_gives_that_result_its_label(store: FleetStore) -> None:
    answers_by_row, incident = answers(store), find_alert(store)
    with store.transaction() as db:
        verdicts.judge_alert(db, incident, is_right=True, text=None, judge=Judge("eva", "dashboard", NOW))
    with store.transaction() as db:
        author = Judge("otto", "dashboard", NOW, "nobody there")
        verdicts.judge_alert(db, incident, is_right=False, text=other(answers_by_row[7]), judge=author)
    rows = ask(store, "SELECT row, given_by, label, alert FROM verdicts ORDER BY given_by")
    assert rows == [(7, "eva", answers_by_row[7], incident.id), (7, "otto", other(answers_by_row[7]), incident.id)]
    with store.snapshot() as db:
        assert [(v.given_by, v.verdict) for v in table.load_of_alert(db, incident.key)] == [
            ("eva", "confirmed"),
            ("otto", "false_alarm"),
        ]
        assert verdicts.summarize(db)["alerts"] == [
            {"alert": "result", "verdict": "confirmed", "n": 1},
            {"alert": "result", "verdict": "false_alarm", "n": 1},
        ]


def test_what_to_label_next_is_uncertain_drifted_rare_or_random_and_has_no_label_yet(store: FleetStore) -> None:
    judge(store, 1, None)
    with store.snapshot() as db:
        requests = candidates.list_next(db, device=None, task=None, limit=40)
        again = candidates.list_next(db, device=SENDER.device, task=SENDER.task, limit=40)
        assert candidates.list_next(db, device="pi-99", task=None, limit=40) == []
    assert requests == again
    by_reason = {each.reason: each for each in reversed(requests)}
    assert by_reason["uncertain"].row == 2
    assert 20 <= by_reason["drifted"].row <= 40
    assert by_reason["drifted"].strength == 0.7
    assert "random" in by_reason
    assert 1 not in {each.row for each in requests}


def test_somebody_who_confirms_everything_is_named_as_a_feedback_loop(store: FleetStore) -> None:
    judge_all(store, dict.fromkeys(range(1, 61)))
    with store.snapshot() as db:
        few = feedback_loops.find(db)
    # 60 are too few to say.
    assert few == []
    more = SENDER.results(150, rows_at=(101, 250))
    store.ingest([Arrival(SENDER.verify(more))], [], NOW)
    judge_all(store, dict.fromkeys(range(101, 251)))
    with store.snapshot() as db:
        [warning] = feedback_loops.find(db)
    assert (warning["by"], warning["kind"], warning["n"], warning["wrong"]) == ("eva", "agrees", 210, 0)
    answers_by_row = answers(store)
    judge_all(store, {row: other(answers_by_row[row]) for row in range(101, 141)})
    with store.snapshot() as db:
        assert feedback_loops.find(db) == []


def test_labels_with_the_source_model_are_a_feedback_loop(store: FleetStore) -> None:
    answers_by_row = answers(store)
    with store.transaction() as db:
        own = [Label(row, None, answers_by_row[row], "model") for row in range(1, 31)]
        given_labels.add(db, SENDER.device, SENDER.task, own, NOW, "pipeline")
    with store.snapshot() as db:
        [warning] = feedback_loops.find(db)
    assert (warning["kind"], warning["own"], warning["n"]) == ("own_answers", 30, 30)


def test_a_number_is_corrected_and_never_confirmed(fresh: Callable[[], FleetStore]) -> None:
    store, sender = fresh(), MessageSender("pi-08", key=new_key(8))
    store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
    columns = {"row": [10], "t": [1_764_022_680_000_000], "value": [1.25]}
    message = sender.results(1, rows_at=(1, 10), columns=columns, model=MODEL)
    store.ingest([Arrival(sender.verify(message))], [], NOW)
    with store.transaction() as db, pytest.raises(UsageError, match="needs the true one"):
        verdicts.judge_result(db, sender.device, sender.task, 10, None, Judge("eva", "cli", NOW))
    with store.transaction() as db:
        verdicts.judge_result(db, sender.device, sender.task, 10, "1.5", Judge("eva", "cli", NOW))
    assert ask(store, "SELECT verdict, label, predicted FROM verdicts") == [("corrected", "1.5", "1.25")]
    assert ask(store, "SELECT value FROM metrics WHERE metric = 'mae'") == [(0.25,)]
    store.close()

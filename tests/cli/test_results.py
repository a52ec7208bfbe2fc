"""Commands `outstation results` and `tail`: the newest results and readings of a store, and new ones as they come."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device import newest
from outstation.device.cli.data import results
from outstation.device.store.outbox import OutboxMessage
from outstation.device.store.rows import Rows
from outstation.foundation.cli.follow import Column, LinePrinter
from scripts.kit.bundles import CLASSIFY, REGRESS, activated
from tests.device.pipeline.test_relearn import Site, work
from tests.kit.commands import call_outstation
from tests.kit.devices import T0, Device


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path / "data", CLASSIFY, activated(CLASSIFY))
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("results"))
    with made.open() as store:
        work(made, store, 1)
    return made


def test_the_newest_results_come_last_however_many_messages_hold_them(device: Device) -> None:
    for _ in range(30):
        device.feed(CLASSIFY.rows(3))
        device.run_all()
    shown = newest.read_results(device.store, "tiny", 50)
    assert [row["row"] for row in shown.rows] == list(range(41, 91))
    assert shown.rows[-1]["label"] in ("left", "right", "rest")
    assert (shown.rows[-1]["clock"], shown.rows[-1]["faults"]) == ("synced", [])
    assert shown.rows == newest.read_results(device.store, None, 50).rows
    assert newest.read_results(device.store, "other", 50).rows == []


def test_only_results_after_those_already_shown_are_new(device: Device) -> None:
    assert newest.read_results(device.store, None, 5).rows == []
    shown = newest.read_results(device.store, "tiny", 5)
    for _ in range(2):
        device.feed(CLASSIFY.rows(3))
        device.run_all()
    new = newest.read_new_results(device.store, "tiny", shown.last_seq)
    assert [row["row"] for row in new.rows] == [1, 2, 3, 4, 5, 6]
    assert newest.read_new_results(device.store, "tiny", new.last_seq) == newest.ResultRows([], new.last_seq)


def test_other_messages_of_a_device_named_results_are_no_results(device: Device) -> None:
    with device.store.transaction() as tx:
        for seq, topic in enumerate(
            ("results/health", "results/drift/tiny", "results/results/tiny"), tx.log_head()[0] + 1
        ):
            tx.enqueue(OutboxMessage(seq, f"outstation/acme/{topic}", b"{}", "jws", "now"), f"digest {seq}")
    for task in (None, "tiny"):
        (message,) = device.store.recent_messages("results", task, 5)
        assert message.topic == "outstation/acme/results/results/tiny"


def test_a_damaged_results_message_is_left_out(device: Device) -> None:
    damaged = OutboxMessage(1, "", b"", "", "", intact=False)
    assert newest.expand_results(damaged) == []
    for payload in (b"[]", b"{}", b'{"columns":{"row":[1],"t":[]}}', b'{"columns":3}', b"\xff"):
        assert newest.expand_results(OutboxMessage(1, "t", payload, "", "")) == []


def test_each_row_has_the_clock_quality_and_faults_of_its_message() -> None:
    body = {
        "task": "tiny",
        "model": {"name": "m", "version": "1"},
        "columns": {"row": [5, 10, 15], "t": [1, 2, 3], "label": ["a", "b", "b"], "score_a": [0.1, 0.2, 0.3]},
        "clocks": [[1, 1, 0, 2], [10, 1, 0, 0]],
        "faults": ["ax"],
    }
    rows = newest.expand_results(OutboxMessage(7, "t", msgspec.json.encode(body), "", ""))
    assert [row["clock"] for row in rows] == ["unsynced", "synced", "synced"]
    assert [(row["faults"], row["score_a"], row["seq"]) for row in rows] == [
        (["ax"], score, 7) for score in (0.1, 0.2, 0.3)
    ]


def test_values_of_a_regression_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device(tmp_path / "data", REGRESS, activated(REGRESS))
    device.feed(REGRESS.rows(3))
    device.run_all()
    rows = newest.read_results(device.store, "tiny", 3).rows
    device.store.close()
    LinePrinter(results._COLUMNS, results._to_cells).print_rows(rows)
    assert f"{rows[-1]['value']:.6g}" in capsys.readouterr().out


def test_readings_of_a_stream_are_shown_as_they_are_stored(device: Device) -> None:
    device.feed(np.array([[0.1, 2, np.nan, 4]] * 3, np.float32))
    rows = newest.read_readings(device.store, "watch", device.stream, 2)
    assert [row["row"] for row in rows] == [2, 3]
    assert rows[-1]["values"] == {"extra": 2.0, "a": 0.1, "b": 2.0, "c": None, "d": 4.0}
    assert rows[-1]["time"].startswith("2025-11-24T16:00:00.02")
    assert newest.read_new_readings(device.store, "watch", device.stream, 3) == []
    device.feed(CLASSIFY.rows(2))
    assert [row["row"] for row in newest.read_new_readings(device.store, "watch", device.stream, 3)] == [4, 5]


def test_rows_after_more_lost_ones_than_a_look_takes_are_shown(device: Device) -> None:
    for _ in range(4):
        device.feed(CLASSIFY.rows(3))
    with contextlib.closing(sqlite3.connect(device.folder / "outstation.db")) as db, db:
        db.execute("DELETE FROM chunks WHERE first_row BETWEEN 4 AND 9")
    assert [row["row"] for row in newest.read_new_readings(device.store, "watch", device.stream, 3, 2)] == [10, 11]


def test_an_empty_stream_and_one_row_have_newest_rows(device: Device) -> None:
    assert newest.read_readings(device.store, "watch", device.stream, 10) == []
    with device.store.transaction() as tx:
        columns = tuple(np.zeros(1, "<f4") for _ in device.stream.fields)
        tx.append("watch", Rows(np.array([T0], np.int64), columns), "unsynced")
    [row] = newest.read_readings(device.store, "watch", device.stream, 10)
    assert row["clock"] == "unsynced"


def test_text_that_could_steer_the_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LinePrinter([Column("a\x1b[31m", 0), Column("n", 3, is_number=True)], lambda row: [row["a"], "1"])
    printer.print_rows([{"a": "x\x1b]0;title\x07\u202e"}])
    printer.print_rows([])
    shown = capsys.readouterr().out
    assert "\\x1b]0;title\\x07\\u202e    1\n" in shown
    assert "\x1b]" not in shown


def call(site: Site, *args: str) -> Any:
    done = call_outstation(*args, "-c", str(site.file), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_commands_print_documents(site: Site) -> None:
    shown = call(site, "results", "exercise", "--last", "3")
    assert [row["task"] for row in shown] == ["exercise"] * 3
    readings = call(site, "tail", "watch", "--last", "2")
    assert [set(row["values"]) for row in readings] == [{"ax", "ay", "az", "wx", "wy", "wz"}] * 2
    [stream] = call(site, "status")["streams"]
    assert stream["last"]["values"] == readings[-1]["values"]
    assert stream["last"]["time"] == readings[-1]["time"]


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("results", "exercize"), "there is no task 'exercize'; did you mean 'exercise'?"),
        (("tail", "wach"), "there is no stream 'wach'; did you mean 'watch'?"),
        (("tail", "watch", "--last", "0"), "--last"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_suggestion(site: Site, args: tuple[str, ...], problem: str) -> None:
    done = call_outstation(*args, "-c", str(site.file))
    assert done.returncode == 2
    assert problem in done.stderr


def test_following_prints_a_line_of_json_each_until_interrupted(site: Site) -> None:
    command = [sys.executable, "-m", "outstation", "results", "--last", "2", "--follow", "--json", "-c", str(site.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert [set(line) >= {"task", "row", "label"} for line in lines] == [True, True]

"""Connections cut at every byte: only whole lines count, and a producer that comes back loses and doubles nothing."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.listener import load_token
from outstation.foundation.config.quantities import Duration
from outstation.ml.performance.labels import LabelSchema, LabelTarget
from outstation.protocol.client import _encode_frame
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import ROOT, Killable, Line, Station, conf

TARGETS = {"judge": LabelTarget("watch", {"": LabelSchema("classify", ("up", "down"))})}


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    with Station(conf(tmp_path), label_targets=lambda: TARGETS) as station:
        yield station
        assert station.failures == []


def counts(station: Station) -> list[int]:
    rows: list[int] = station.rows("machine").columns[1].tolist()
    return rows


def every_kind_of_line(first: int) -> list[bytes]:
    """Return one line of each kind; their rows have the counts from `first` to `first` + 4."""
    packed = {
        "power": ["f8", base64.b64encode(np.ones(2, "<f8").tobytes()).decode()],
        "count": ["i8", base64.b64encode(np.arange(first + 3, first + 5, dtype="<i8").tobytes()).decode()],
    }
    lines: list[Any] = [
        {"stream": "machine", "power": 1, "count": first, "mode": "on"},
        {"stream": "machine", "columns": {"power": [1, 2], "count": [first + 1, first + 2], "mode": ["on", "on"]}},
        {"stream": "machine", "columns": {"mode": ["on", "on"]}, "packed": packed},
        {"labels": "judge", "t": 1_764_000_000 + first, "label": "up"},
        {"stream": "machine", "power": "no number", "count": 0, "mode": "on"},
    ]
    return [msgspec.json.encode(line) for line in lines]


def test_a_named_producer_that_dies_at_any_byte_sends_the_rest_and_nothing_is_lost_or_doubled(
    station: Station,
) -> None:
    length = sum(len(line) + 1 for line in every_kind_of_line(10_000))
    for start in range(0, length + 1, 150):
        by_cut = {cut: every_kind_of_line(10_000 + 10 * cut) for cut in range(start, min(start + 150, length + 1))}
        with contextlib.ExitStack() as connections:
            for cut, lines in by_cut.items():
                line = connections.enter_context(station.line())
                line.send({"client": f"cut-{cut}"})
                # Unread, it would make the kernel reset the connection.
                assert line.answer()["through"] == 0
                line.socket.sendall(b"".join(text + b"\n" for text in lines)[:cut])
        with contextlib.ExitStack() as connections:
            returned = {cut: connections.enter_context(station.line()) for cut in by_cut}
            for cut, line in returned.items():
                line.send({"client": f"cut-{cut}"})
            whole = {cut: b"".join(text + b"\n" for text in by_cut[cut])[:cut].count(b"\n") for cut in by_cut}
            assert {cut: line.answer()["through"] for cut, line in returned.items()} == whole
            for cut, line in returned.items():
                line.send(*by_cut[cut][whole[cut] :])
            for cut, line in returned.items():
                if whole[cut] < 5:
                    assert [item["line"] for item in line.through(5)["rejected"]] == [5]
    expected = [10_000 + 10 * cut + row for cut in range(length + 1) for row in range(5)]
    assert sorted(counts(station)) == expected
    assert station.store.counters()["labels early.judge"] == length + 1
    assert station.store.counters()["lines rejected"] == length + 1


def test_frames_and_lines_cut_at_any_byte_are_each_stored_once(tmp_path: Path) -> None:
    def records(first: int) -> list[bytes]:
        numbers, more = (np.arange(first + i, first + i + 2, dtype="<i8") for i in (0, 2))
        columns = ({"n": numbers}, {"n": more, "t": more + 1_764_000_000})
        frames = [_encode_frame("s", each) or b"" for each in columns]
        return [frames[0], b'{"stream":"s","n":%d}\n' % (first + 4), frames[1]]

    plain = StreamConfig(fields=[FieldConfig(name="n", type="i64")], allowed_lateness=Duration(1e9))
    length = len(b"".join(records(10_000)))
    with Station(conf(tmp_path, s=plain)) as station:
        for start in range(0, length + 1, 150):
            cuts = range(start, min(start + 150, length + 1))
            with contextlib.ExitStack() as connections:
                for cut in cuts:
                    line = connections.enter_context(station.line())
                    line.send({"client": f"cut-{cut}"})
                    assert line.answer()["through"] == 0
                    line.socket.sendall(b"".join(records(10_000 + 10 * cut))[:cut])
            with contextlib.ExitStack() as connections:
                returned = {cut: connections.enter_context(station.line()) for cut in cuts}
                for cut, line in returned.items():
                    line.send({"client": f"cut-{cut}"})
                for cut, line in returned.items():
                    sent = records(10_000 + 10 * cut)
                    whole = sum(len(b"".join(sent[:n])) <= cut for n in range(1, 4))
                    assert line.answer()["through"] == whole
                    line.socket.sendall(b"".join(sent[whole:]))
                    if whole < 3:
                        assert line.through(3)["rejected"] == []
        stored: list[int] = station.rows("s").columns[0].tolist()
        assert sorted(stored) == [10_000 + 10 * cut + row for cut in range(length + 1) for row in range(5)]
        assert station.failures == []


def test_a_frame_that_is_cut_off_is_counted_and_reported_to_a_producer_that_still_reads(station: Station) -> None:
    frame = _encode_frame("watch", {"ax": np.ones(3, "<f4"), "ay": np.ones(3, "<f4")}) or b""
    for cut in range(1, len(frame)):
        with station.line() as line:
            line.socket.sendall(frame + frame[:cut])
            line.hang_up()
            first, last = line.rest()
            assert (first["through"], first["accepted"], first["rejected"]) == (1, 3, [])
            assert (last["through"], last["accepted"]) == (1, 0)
            assert "the connection ended inside this frame; send all bytes" in last["rejected"][0]["reason"]
    assert station.store.counters()["lines cut off"] == len(frame) - 1
    assert station.store.last_row("watch") == 3 * (len(frame) - 1)


def test_a_line_that_is_cut_off_is_counted_and_reported_to_a_producer_that_still_reads(station: Station) -> None:
    row = b'{"stream":"machine","power":1,"count":7,"mode":"on"}'
    for cut in range(1, len(row)):
        with station.line() as line:
            line.socket.sendall(row + b"\n" + row[:cut])
            line.hang_up()
            first, last = line.rest()
            assert (first["through"], first["accepted"], first["rejected"]) == (1, 1, [])
            assert (last["through"], last["accepted"]) == (1, 0)
            assert "the connection ended inside this line" in last["rejected"][0]["reason"]
    with station.line() as line:
        line.send(row)
        line.answer()
    assert station.store.counters()["lines cut off"] == len(row) - 1
    assert counts(station) == [7] * len(row)
    assert "lines rejected" not in station.store.counters()


def test_a_line_that_ends_with_a_reset_connection_is_counted(station: Station) -> None:
    row = b'{"stream":"machine","power":1,"count":7,"mode":"on"}'
    with station.line() as line:
        line.socket.sendall(row + b"\n" + row[:9])
        # Closed with the answer unread, the kernel resets the connection.
        wait_until("the first line is stored", lambda: station.store.last_row("machine") == 1)
    with station.line() as line:

        def is_counted() -> bool:
            line.send(row)
            line.answer()
            return station.store.counters().get("lines cut off") == 1

        wait_until("the end of the broken connection is counted", is_counted)


def test_a_whole_row_without_a_newline_counts_for_a_producer_that_cannot_come_back(station: Station) -> None:
    with station.line() as line:
        line.socket.sendall(b'{"stream":"machine","power":1,"count":7,"mode":"on"}')
        line.hang_up()
        assert line.rest() == [{"through": 1, "accepted": 1, "rejected": []}]


def test_a_token_cut_at_any_byte_lets_nothing_in(tmp_path: Path) -> None:
    port = free_port()
    with Station(conf(tmp_path, tcp=f"127.0.0.1:{port}")) as station:
        token = load_token(station.conf.intake_token_file)
        row = b'{"stream":"machine","power":1,"count":7,"mode":"on"}\n'
        hello = msgspec.json.encode({"client": "g", "token": token}) + b"\n"
        for cut in range(len(hello)):
            with Line(("127.0.0.1", port)) as line:
                line.socket.sendall(hello[:cut])
                line.hang_up()
                assert [list(answer) for answer in line.rest()] in (
                    [],
                    [["error", "retry"]],
                    [["through", "accepted", "rejected"]],
                )
            with Line(("127.0.0.1", port)) as line:
                line.socket.sendall(hello[:cut] + row)
                line.hang_up()
                list(line.rest())
        assert station.store.last_row("machine") == 0
        with Line(("127.0.0.1", port)) as line:
            line.socket.sendall(hello + row)
            assert [line.answer()["through"], line.answer()["through"]] == [0, 1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_any_cuts_in_a_row_leave_each_line_stored_once(station: Station, cuts: list[float]) -> None:
    name = f"property-{time.monotonic_ns()}"
    first = station.store.last_row("machine") * 10 + 1_000_000
    lines = [line for block in range(3) for line in every_kind_of_line(first + 10 * block)]
    before = set(counts(station)) if station.store.last_row("machine") else set()
    through = 0
    for cut in cuts:
        with station.line() as line:
            line.send({"client": name})
            through = line.answer()["through"]
            rest = b"".join(item + b"\n" for item in lines[through:])
            line.socket.sendall(rest[: round(cut * len(rest))])
    with station.line() as line:
        line.send({"client": name})
        through = line.answer()["through"]
        if through < len(lines):
            line.send(*lines[through:])
            line.through(len(lines))
    new = Counter(n for n in counts(station) if n not in before)
    assert new == Counter(first + 10 * block + row for block in range(3) for row in range(5))


_PRODUCER = """\
import sys
from outstation.protocol.client import Client

client = Client(sys.argv[1], name="gateway", patience_s=20)
n = client.through
while n < int(sys.argv[2]):
    n += 1
    client.send("machine", power=1, count=n, mode="x" * 60)
    if n % 97 == 0:
        client.flush()
client.flush()
"""


@pytest.mark.parametrize("disturbance", ["producer killed", "daemon killed", "daemon stopped", "socket file removed"])
def test_a_real_producer_loses_and_doubles_nothing(tmp_path: Path, disturbance: str) -> None:
    rng, total = random.Random(disturbance), 12_000
    command = [sys.executable, "-c", _PRODUCER, str(tmp_path / "intake.sock"), str(total)]
    with Killable(tmp_path) as killable:
        producer = subprocess.Popen(command, cwd=ROOT)
        try:
            for _ in range(2):
                time.sleep(rng.uniform(0.3, 0.6))
                if disturbance == "producer killed":
                    producer.kill()
                    producer.wait()
                    producer = subprocess.Popen(command, cwd=ROOT)
                elif disturbance == "daemon killed":
                    killable.kill()
                    killable.start()
                elif disturbance == "daemon stopped":
                    os.kill(killable.pid, signal.SIGSTOP)
                    time.sleep(0.3)
                    producer.kill()
                    producer.wait()
                    producer = subprocess.Popen(command, cwd=ROOT)
                    time.sleep(0.3)
                    os.kill(killable.pid, signal.SIGCONT)
                else:
                    killable.socket.unlink(missing_ok=True)
                    killable.kill()
                    killable.start()
            assert producer.wait(60) == 0
        finally:
            producer.kill()
            producer.wait()
    with Station(conf(tmp_path)) as station:
        assert counts(station) == list(range(1, total + 1))

"""Intake server: lines that were answered are stored exactly once, through crashes of either side."""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.connection import CLIENT_SOURCE, MAX_CLIENTS
from outstation.device.intake.frames import MAGIC
from outstation.device.intake.group_commit import CommitOutcome, GroupCommit, SourcePosition
from outstation.device.intake.protocol import MAX_LINE_BYTES
from outstation.device.intake.source import SubmitRows
from outstation.device.recovery.open import open_store
from outstation.device.store.quota import PAGE_SIZE
from outstation.device.store.rows import RawColumns
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.errors import StorageError, StorageMoved, UsageError
from outstation.protocol.client import Client, _encode_frame
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import T0, Killable, Line, Station, conf

ROW = {"stream": "watch", "ax": 0.1, "ay": 0.2}
NUMBERS = StreamConfig(fields=[FieldConfig(name="n", type="i64")])


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    with Station(conf(tmp_path)) as station:
        yield station
        assert station.failures == []


def numbers(lines: range) -> list[dict[str, Any]]:
    return [{"stream": "machine", "power": 1, "count": n, "mode": "on"} for n in lines]


def counts(station: Station) -> list[int]:
    result: list[int] = station.rows("machine").columns[1].tolist()
    return result


# --- lines and answers of the protocol


def test_lines_of_rows_are_answered_with_counts(station: Station) -> None:
    with station.line() as line:
        line.send(b'{"stream":"watch","t":1764022680.123,"ax":0.1,"ay":-0.2}')
        assert line.answer() == {"through": 1, "accepted": 1, "rejected": []}
        line.send(b'{"stream":"watch","columns":{"t":[1764022680.2,1764022680.3],"ax":[0.3,0.4],"ay":[0,0]}}')
        assert line.answer() == {"through": 2, "accepted": 2, "rejected": []}
        line.send(b'{"stream":"watch","ax":17,"ay":0}')
        assert line.answer() == {
            "through": 3,
            "accepted": 0,
            "rejected": [{"line": 3, "reason": "ax is above max 16"}],
        }
    rows = station.rows("watch")
    assert rows.t.tolist() == [1764022680123000, 1764022680200000, 1764022680300000]
    assert rows.columns[0].tolist() == pytest.approx([0.1, 0.3, 0.4])


def test_a_row_without_a_time_gets_the_present_one(station: Station) -> None:
    with station.line() as line:
        before = time.time()
        line.send(ROW)
        line.answer()
    assert before - 1 < station.rows("watch").t[0] / 1e6 < time.time() + 1


def test_an_answer_comes_only_after_the_commit(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=1.0)) as station:
        reader = Store.open_read_only(tmp_path)
        with station.line() as line:
            began = time.monotonic()
            line.send(ROW)
            line.answer()
            assert reader.last_row("watch") == 1
            assert time.monotonic() - began > 0.9
        reader.close()


def test_what_is_answered_is_there_when_the_agent_is_killed_at_that_moment(tmp_path: Path) -> None:
    killable = Killable(tmp_path)
    with killable, Line(killable.socket) as line:
        line.send(*numbers(range(1000)))
        line.through(1000)
        killable.kill()
        with Station(conf(tmp_path)) as station:
            assert counts(station) == list(range(1000))


@pytest.mark.parametrize("lines", [6, 13, 20])
def test_answered_lines_of_a_flood_survive_a_kill_during_a_write(tmp_path: Path, lines: int) -> None:
    each = 6000
    with Killable(tmp_path) as killable, Line(killable.socket) as line:
        for first in range(0, lines * each, each):
            columns = {"power": [1] * each, "count": list(range(first, first + each)), "mode": ["on"] * each}
            line.send({"stream": "machine", "columns": columns})
        safe = line.through(lines // 2)["through"]
        killable.kill()
    with Station(conf(tmp_path)) as station:
        stored = counts(station)
    assert stored == list(range(len(stored)))
    assert safe * each <= len(stored) <= lines * each


def test_the_end_of_a_connection_commits_its_unterminated_last_line(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=60)) as station, station.line() as line:
        began = time.monotonic()
        line.send(ROW)
        line.socket.sendall(b'{"stream":"watch","ax":3,"ay":4}')
        line.hang_up()
        assert line.rest() == [{"through": 2, "accepted": 2, "rejected": []}]
        assert time.monotonic() - began < 30
        assert station.store.last_row("watch") == 2


def test_rows_of_several_connections_share_one_commit(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=60)) as station:
        lines = [station.line() for _ in range(5)]
        for index, line in enumerate(lines):
            line.send(*numbers(range(index * 10, index * 10 + 3)))
        wait_until("all rows are under way", lambda: station.intake.group_commit._rows == 15)
        lines[0].hang_up()
        answers = [line.answer() for line in lines]
        assert answers == [{"through": 3, "accepted": 3, "rejected": []}] * 5
        wait_until("the one commit", lambda: station.commits == 1)
        assert sorted(counts(station)) == sorted(i * 10 + j for i in range(5) for j in range(3))
        for line in lines:
            line.close()


def test_many_rows_do_not_wait_for_the_timer(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=60)) as station, station.line() as line:
        line.send({"stream": "watch", "columns": {"ax": [0] * 20_000, "ay": [0] * 20_000}})
        assert line.answer() == {"through": 1, "accepted": 20_000, "rejected": []}


def test_lines_are_read_during_a_write_and_answered_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    write = GroupCommit.write

    def waits(self: GroupCommit, shares: Any, now: Any) -> Any:
        slow.wait(30)
        return write(self, shares, now)

    many = {"stream": "watch", "columns": {"ax": [0] * 20_000, "ay": [0] * 20_000}}
    with Station(conf(tmp_path, commit_every_s=60)) as station, station.line() as line:
        monkeypatch.setattr(GroupCommit, "write", waits)
        line.send(many)
        wait_until("the first is being written", lambda: station.intake._background_write is not None)
        line.send(ROW)
        wait_until("the second is read", lambda: bool(station.intake.group_commit))
        assert station.commits == 0
        slow.set()
        assert line.answer() == {"through": 1, "accepted": 20_000, "rejected": []}
        line.hang_up()
        assert line.rest() == [{"through": 2, "accepted": 1, "rejected": []}]
        assert len(station.rows("watch")) == 20_001


def test_rows_of_frames_that_arrive_together_are_rejected_by_frame(station: Station) -> None:
    values, times = np.array([1, 2], "<f4"), ([0, 1], [2, 3], [4, 5])
    frames = [_encode_frame("watch", {"t": T0 + np.array(t), "ax": values, "ay": values}) or b"" for t in times]
    for sent, count in ((frames[1], 1), (b"".join(frames), 3)):
        with station.line() as line:
            line.socket.sendall(sent)
            answer = line.through(count)
    assert [item["line"] for item in answer["rejected"]] == [2]
    assert answer["rejected"][0]["reason"].count("of the columns: duplicate: ") == 2
    assert answer["accepted"] == 4


def test_a_large_group_commits_when_quiet_and_a_small_one_by_timer(tmp_path: Path) -> None:
    many, few = ({"stream": "watch", "columns": {"ax": [0] * n, "ay": [0] * n}} for n in (10_000, 10))
    with Station(conf(tmp_path, commit_every_s=60)) as station, station.line() as line:
        line.send(many)
        assert line.answer() == {"through": 1, "accepted": 10_000, "rejected": []}
        line.send(few)
        assert select.select([line.socket], [], [], 0.5)[0] == []


def test_lines_of_several_streams_may_be_mixed_and_cut_anywhere(station: Station) -> None:
    rng = random.Random(3)
    lines = [ROW, *numbers(range(1))] * 300
    data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    with station.line() as line:
        while data:
            cut = rng.randrange(1, 900)
            line.socket.sendall(data[:cut])
            data = data[cut:]
        total = line.through(600)
    assert total == {"through": 600, "accepted": 600, "rejected": []}
    assert (station.store.last_row("watch"), station.store.last_row("machine")) == (300, 300)


# --- what is no row


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"hello", "not one JSON object on one line"),
        (b"\x00\xff\x01", "binary data"),
        (b'{"stream":"nobody","ax":1}', "unknown stream 'nobody'"),
        (b'{"client":5}', 'no "stream"'),
        (b'{"client":""}', 'no "stream"'),
        (b'{"client":"a","client":"b"}', 'no "stream"'),
        (b'{"client":"' + b"x" * 65 + b'"}', 'no "stream"'),
        (b"[" * 200_000, "not one JSON object"),
        (b"[" * (2 * MAX_LINE_BYTES), f"line of {2 * MAX_LINE_BYTES} bytes, the limit is {MAX_LINE_BYTES}; split it"),
        (b'{"stream":"watch"' + b" " * MAX_LINE_BYTES + b"}", f"the limit is {MAX_LINE_BYTES}; split it"),
    ],
)
@pytest.mark.parametrize("place", [2, 4])
def test_an_invalid_line_is_rejected_by_number_and_others_accepted(
    station: Station, bad: bytes, reason: str, place: int
) -> None:
    lines: list[Any] = [ROW] * 4
    lines.insert(place - 1, bad)
    with station.line() as line:
        line.send(*lines)
        total = line.through(5)
    assert total["accepted"] == 4
    assert [entry["line"] for entry in total["rejected"]] == [place]
    assert reason in total["rejected"][0]["reason"]


def test_a_line_is_refused_by_its_length_however_it_arrives(station: Station) -> None:
    for length, taken in ((MAX_LINE_BYTES, 1), (MAX_LINE_BYTES + 1, 0)):
        row = b'{"stream":"watch","ax":1,"ay":2'
        row += b" " * (length - len(row) - 1) + b"}"
        for cut in (1, length // 2, length - 1, length):
            with station.line() as line:
                line.socket.sendall(row[:cut])
                time.sleep(0.01)
                line.socket.sendall(row[cut:] + b"\n")
                assert line.answer()["accepted"] == taken


def test_empty_lines_count_and_are_no_rows(station: Station) -> None:
    with station.line() as line:
        line.send(b"", ROW, b"  ", b"\r", b"no", ROW)
        total = line.through(6)
    assert total["accepted"] == 2
    assert [entry["line"] for entry in total["rejected"]] == [5]


def test_a_megabyte_of_noise_is_answered_line_by_line(station: Station) -> None:
    noise = random.Random(1).randbytes(1 << 20)
    with station.line() as line:
        sender = threading.Thread(target=line.send, args=(ROW, noise, ROW))
        sender.start()
        total = line.through(noise.count(b"\n") + 3)
        sender.join()
    assert total["accepted"] == 2
    assert len(total["rejected"]) > 3000


# --- many producers, slow producers


def test_two_hundred_connections_are_served_at_once(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=0.1)) as station:
        began = time.monotonic()
        lines = [station.line() for _ in range(200)]
        for index, line in enumerate(lines):
            line.send(*numbers(range(index * 100, index * 100 + 5)))
        for line in lines:
            assert line.through(5) == {"through": 5, "accepted": 5, "rejected": []}
            line.close()
        assert sorted(counts(station)) == sorted(i * 100 + j for i in range(200) for j in range(5))
        assert station.commits <= 2 * ((time.monotonic() - began) / 0.1 + 1)


def test_a_producer_that_never_reads_its_answers_holds_up_nobody_else(station: Station) -> None:
    with station.line() as deaf, station.line() as other:
        deaf.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):  # noqa: PT012
            deaf.send(ROW)
            while True:
                deaf.socket.sendall(b"x\n" * 50_000)
        for n in range(1, 6):
            began = time.monotonic()
            other.send(ROW)
            assert other.answer()["through"] == n
            assert time.monotonic() - began < 20


def test_a_producer_that_vanishes_does_no_harm(station: Station) -> None:
    for _ in range(20):
        line = station.line()
        line.send(ROW, b'{"stream":"watch","ax":1')
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        line.close()
    with station.line() as line:
        line.send(ROW)
        assert line.answer()["accepted"] == 1
    wait_until("rows of those who hung up", lambda: station.store.last_row("watch") >= 21)


# --- producers with a name


def test_a_named_client_gets_its_position_and_continues_there(station: Station) -> None:
    for through in (0, 3, 6):
        with station.line() as line:
            line.send({"client": "gateway-1"}, *numbers(range(through, through + 3)))
            assert line.answer() == {"through": through, "accepted": 0, "rejected": []}
            assert line.answer() == {"through": through + 3, "accepted": 3, "rejected": []}
    with station.line() as line:
        line.send({"client": "gateway-2"})
        assert line.answer()["through"] == 0
    assert counts(station) == list(range(9))


def test_the_last_client_names_and_all_file_positions_are_stored(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.declare_streams({"machine": conf(tmp_path).streams["machine"]})
    group = GroupCommit(store, conf(tmp_path).streams)

    def sent(source: str, item: str, through: int) -> None:
        group.advance(
            item, through, SourcePosition(source, item, through, MAX_CLIENTS if source == CLIENT_SOURCE else None)
        )

    for number in range(5):
        sent("files:machine", f"{number}.csv", 9)
    sent(CLIENT_SOURCE, "gateway", 1)
    for number in range(MAX_CLIENTS - 1):
        sent(CLIENT_SOURCE, f"sensor-{number}", 1)
    group.commit(clock.read())
    sent(CLIENT_SOURCE, "gateway", 2)
    for number in range(3):
        sent(CLIENT_SOURCE, f"another-{number}", 1)
    group.commit(clock.read())
    assert store._fetch_one("SELECT count(*) FROM source_positions WHERE source = ?", CLIENT_SOURCE) == (MAX_CLIENTS,)
    assert [store.source_position(CLIENT_SOURCE, f"sensor-{number}") for number in range(5)] == [0, 0, 0, 1, 1]
    assert store.source_position(CLIENT_SOURCE, "gateway") == 2
    assert [store.source_position("files:machine", f"{number}.csv") for number in range(5)] == [9] * 5
    store.close()


def test_lines_in_flight_count_before_a_client_gets_its_position(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=60)) as station, station.line() as first, station.line() as second:
        first.send({"client": "g"}, *numbers(range(5)))
        assert first.answer()["through"] == 0
        wait_until("the lines are under way", lambda: bool(station.intake.group_commit))
        second.send({"client": "g"})
        assert second.answer()["through"] == 5
        second.send(*numbers(range(5, 7)))
        second.hang_up()
        assert second.rest()[-1]["through"] == 7
        assert counts(station) == list(range(7))


def test_a_running_write_counts_before_a_client_gets_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = GroupCommit.write

    def slowly(self: GroupCommit, shares: Any, now: Any) -> Any:
        time.sleep(0.3)
        return write(self, shares, now)

    monkeypatch.setattr(GroupCommit, "write", slowly)
    many = {"stream": "watch", "columns": {"ax": [0] * 20_000, "ay": [0] * 20_000}}
    with Station(conf(tmp_path, commit_every_s=60)) as station, station.line() as first, station.line() as second:
        first.send({"client": "g"}, many)
        assert first.answer()["through"] == 0
        wait_until("the line is being written", lambda: station.intake._background_write is not None)
        second.send({"client": "g"})
        assert second.answer()["through"] == 1


def test_an_older_connection_of_a_name_is_closed_and_ignored(station: Station) -> None:
    with station.line() as first, station.line() as second:
        first.send({"client": "g"}, *numbers(range(5)))
        first.through(5)
        second.send({"client": "g"})
        assert second.answer()["through"] == 5
        with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012
            while True:
                first.send(*numbers(range(100, 110)))
                time.sleep(0.01)
        second.send(*numbers(range(5, 8)))
        assert second.answer()["through"] == 8
        assert counts(station) == list(range(8))


def test_a_named_client_loses_and_doubles_no_line_over_eight_kills(tmp_path: Path) -> None:
    rng = random.Random(11)
    killable = Killable(tmp_path, commit_every_s=0.002)
    killable.start()
    total, ended = 0, threading.Event()

    def produce() -> None:
        nonlocal total
        with Client(killable.socket, name="seeded", patience_s=60) as client:
            while not ended.is_set():
                for _ in range(rng.randrange(1, 60)):
                    if rng.random() < 0.1:
                        more = range(total, total + rng.randrange(1, 50))
                        client.send_columns(
                            "machine", {"power": [0] * len(more), "count": more, "mode": ["on"] * len(more)}
                        )
                        total += len(more)
                    else:
                        client.send("machine", power=0, count=total, mode="off")
                        total += 1
                if rng.random() < 0.3:
                    client.flush()

    producer = threading.Thread(target=produce)
    producer.start()
    kills = random.Random(12)
    for _ in range(8):
        time.sleep(kills.random() * 0.12)
        killable.kill()
        killable.start()
    wait_until("many lines", lambda: total > 1000 or not producer.is_alive())
    ended.set()
    producer.join(200)
    killable.kill()
    with Station(conf(tmp_path)) as station:
        assert total > 1000
        assert counts(station) == list(range(total))


# --- full and sick disks


def test_a_full_store_rejects_rows_with_a_reason_until_there_is_room(tmp_path: Path) -> None:
    with Station(conf(tmp_path), max_size=200 * PAGE_SIZE) as station, station.line() as line:
        sent = taken = 0
        refused: list[Any] = []
        while not refused:
            line.send({"stream": "watch", "columns": {"ax": [0] * 1000, "ay": [0] * 1000}})
            sent += 1
            answer = line.answer()
            assert answer["through"] == sent
            taken += answer["accepted"]
            refused = answer["rejected"]
        assert station.store.last_row("watch") == taken
        assert refused[0]["line"] == sent
        assert "not stored" in refused[0]["reason"]
        assert "send it again later" in refused[0]["reason"]
        with station.store.transaction() as tx:
            tx.trim_rows("watch", taken, 2**62, 1000)
        line.send(ROW)
        assert line.answer() == {"through": sent + 1, "accepted": 1, "rejected": []}
        assert station.store.counters()["lines refused while full"] == 1
        assert station.failures == []


def test_a_rejected_line_does_not_count_when_its_client_reconnects(tmp_path: Path) -> None:
    """The answer that refused it may have been lost with the connection."""
    with Station(conf(tmp_path), max_size=200 * PAGE_SIZE) as station:
        columns: dict[str, list[Any]] = {"power": [0] * 500, "count": [0] * 500, "mode": ["on"] * 500}
        with Client(station.socket, name="g") as client:
            while not client.flush().rejected:
                client.send_columns("machine", columns)
            refused = client.through
        with station.line() as again:
            again.send({"client": "g"})
            assert again.answer()["through"] == refused - 1
            with station.store.transaction() as tx:
                tx.trim_rows("machine", station.store.last_row("machine"), 2**62, 100)
            again.send({"stream": "machine", "columns": columns})
            assert again.answer() == {"through": refused, "accepted": 500, "rejected": []}


def test_rejected_lines_are_resent_after_their_answers_were_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, limit = [True], Store.limit_bytes
    monkeypatch.setattr(Store, "limit_bytes", lambda store: PAGE_SIZE if full[0] else limit(store))
    row = {"stream": "machine", "power": 0, "count": 1, "mode": "on"}
    with Station(conf(tmp_path)) as station:
        with station.line() as line:
            line.send({"client": "g"}, row)
            wait_until("the first line is refused", lambda: station.commits > 0)
            full[0] = False
            with contextlib.suppress(BrokenPipeError):
                line.send({**row, "count": 2})
            answers = line.rest()
            assert [(entry["through"], entry["accepted"], len(entry["rejected"])) for entry in answers] == [
                (0, 0, 0),
                (1, 0, 1),
            ]
        with station.line() as again:
            again.send({"client": "g"})
            assert again.answer()["through"] == 0
            again.send(row, {**row, "count": 2})
            assert again.through(2) == {"through": 2, "accepted": 2, "rejected": []}
        assert counts(station) == [1, 2]
        assert station.failures == []


@pytest.mark.parametrize("rows", [1, 20_000], ids=["written when due", "written beside what is read"])
def test_on_a_sick_disk_nobody_is_answered_and_nothing_more_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    block = {"stream": "watch", "columns": {"ax": [0] * rows, "ay": [0] * rows}}
    with Station(conf(tmp_path)) as station, station.line() as line, station.line() as other:
        line.send({"client": "g"}, ROW)
        line.through(1)
        sick = [True]
        write = GroupCommit.write

        def fails(self: GroupCommit, shares: Any, now: Any) -> Any:
            if sick[0]:
                raise StorageError("disk I/O error")
            return write(self, shares, now)

        monkeypatch.setattr(GroupCommit, "write", fails)
        line.send(block, ROW)
        wait_until("a failure", lambda: station.failures != [])
        assert [str(error) for error in station.failures] == ["disk I/O error"]
        # A later commit that worked would count the two lines that were lost.
        sick[0] = False
        line.send(ROW)
        other.send(ROW)
        other.hang_up()
        line.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            line.answer()
        assert other.rest() == []
        assert station.store.last_row("watch") == 1
        assert station.store.source_position("client", "g") == 1


# --- starting, stopping, TCP, sources


def test_stopping_commits_and_answers_what_waits(tmp_path: Path) -> None:
    station = Station(conf(tmp_path, commit_every_s=60))
    station.intake.start()
    with station.line() as line:
        line.send(ROW, ROW)
        wait_until("the lines are under way", lambda: bool(station.intake.group_commit))
        began = time.monotonic()
        station.intake.stop()
        assert line.rest() == [{"through": 2, "accepted": 2, "rejected": []}]
        assert time.monotonic() - began < 30
    assert station.store.last_row("watch") == 2
    station.store.close()
    assert station.failures == []


def test_after_a_stop_and_after_a_crash_the_socket_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "intake.sock").touch()
    for _ in range(2):
        with Station(conf(tmp_path)) as station, station.line() as line:
            line.send(ROW)
            assert line.answer()["accepted"] == 1


def test_the_socket_is_for_its_owner_and_group(station: Station) -> None:
    assert stat.S_IMODE(station.socket.stat().st_mode) == 0o660


def test_a_data_folder_with_too_long_a_path_is_named(tmp_path: Path) -> None:
    station = Station(conf(tmp_path / ("x" * 120)))
    with station:
        pass
    assert isinstance(station.failures[0], UsageError)
    assert "shorten data_dir" in str(station.failures[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tcp_on_loopback_is_served_if_configured(tmp_path: Path, host: str) -> None:
    port = free_port()
    with Station(conf(tmp_path, tcp=f"{host}:{port}")) as station:
        token = (tmp_path / "intake.token").read_text().strip()
        with Line(("127.0.0.1", port)) as line:
            line.send({"token": token}, ROW)
            assert line.answer() == {"through": 0, "accepted": 0, "rejected": []}
            assert line.answer() == {"through": 1, "accepted": 1, "rejected": []}
        with Client(f"{host}:{port}", name="tcp", token=token) as client:
            client.send("watch", ax=1, ay=2)
            assert client.flush().accepted == 1
        assert station.failures == []


def test_tcp_beyond_loopback_is_refused(tmp_path: Path) -> None:
    with Station(conf(tmp_path, tcp="0.0.0.0:7071")) as station:
        assert "must be a loopback address" in str(station.failures[0])


def test_a_tcp_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Station(conf(tmp_path, tcp=address)) as station:
            assert isinstance(station.failures[0], UsageError)
            assert f"intake.tcp {address}" in str(station.failures[0])


class Once:
    """A source that offers one block, and keeps what became of it."""

    def __init__(self, *blocks: tuple[RawColumns, SourcePosition]) -> None:
        self.blocks = blocks
        self.outcomes: list[CommitOutcome] = []

    async def run(self, offer: SubmitRows) -> None:
        self.outcomes += await asyncio.gather(*(offer("watch", raw, mark) for raw, mark in self.blocks))


def test_a_source_gets_the_outcome_and_its_position_is_committed(tmp_path: Path) -> None:
    raw = RawColumns(3, [T0, T0, T0], {"ax": [1, 99, 2], "ay": [0, 0, 0]})
    source = Once((raw, SourcePosition("files:watch", "a", 7)))
    with Station(conf(tmp_path), sources=lambda store: [source]) as station:
        wait_until("an outcome", lambda: bool(source.outcomes))
        (outcome,) = source.outcomes
        assert (outcome.through, outcome.accepted, outcome.is_store_full) == (3, 2, False)
        assert outcome.rejected == [(2, "ax is above max 16")]
        assert station.store.source_position("files:watch", "a") == 7


def test_a_source_that_stands_still_is_committed_at_once_with_what_waits(tmp_path: Path) -> None:
    class Stalled:
        async def run(self, offer: SubmitRows) -> None:
            wait = asyncio.ensure_future(offer("watch", RawColumns(1, None, {"ax": [1], "ay": [0]}), None))
            await asyncio.sleep(0.3)
            assert not wait.done()
            await offer("watch", RawColumns(1, None, {"ax": [2], "ay": [0]}), None, is_stalled=True)
            await wait

    with Station(conf(tmp_path, commit_every_s=60), sources=lambda store: [Stalled()]) as station:
        wait_until("both rows", lambda: station.store.last_row("watch") == 2)
        wait_until("the one commit", lambda: station.commits == 1)
    assert station.failures == []


def test_a_source_that_breaks_is_a_failure_of_the_intake(tmp_path: Path) -> None:
    class Broken:
        async def run(self, offer: SubmitRows) -> None:
            raise ZeroDivisionError

    with Station(conf(tmp_path), sources=lambda store: [Broken()]) as station:
        wait_until("a failure", lambda: station.failures != [])
    assert isinstance(station.failures[0], ZeroDivisionError)


def test_made_up_categories_are_stored_as_other_and_counted(tmp_path: Path) -> None:
    fields = [FieldConfig(name="n", type="i64"), FieldConfig(name="mode", type="category", max_categories=100)]
    with Station(conf(tmp_path, machine=StreamConfig(fields=fields))) as station, station.line() as line:
        line.send({"stream": "machine", "n": 0, "mode": "on"})
        for first in range(0, 66_000, 6000):
            values = [f"made-up-{n}" for n in range(first, first + 6000)]
            line.send({"stream": "machine", "columns": {"n": [1] * 6000, "mode": values}})
        line.send({"stream": "machine", "n": 2, "mode": "on"}, {"stream": "machine", "n": 3, "mode": "new"})
        assert line.through(14) == {"through": 14, "accepted": 66_003, "rejected": []}
        texts = station.store.categories("machine", "mode")
        assert (len(texts), texts[1], texts[100]) == (101, "on", "(other)")
        assert station.rows("machine").columns[1][[0, -2, -1]].tolist() == [1, 1, 100]
        assert station.store.counters()["categories over limit"] == 66_001 - 98


# --- the ground moved


def make_file(path: Path) -> None:
    path.write_text("no socket")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))


@pytest.mark.parametrize("kind", ["frame", "line"])
def test_a_first_item_beyond_the_limit_that_comes_in_parts_costs_itself_alone(station: Station, kind: str) -> None:
    size = 3 * MAX_LINE_BYTES
    item = MAGIC + size.to_bytes(4, "little") + b"x" * size if kind == "frame" else b"{" + b" " * size + b"}\n"
    with station.line() as line:
        for start in range(0, len(item), 200_000):
            line.socket.sendall(item[start : start + 200_000])
        line.send(*numbers(range(1)))
        answer = line.through(2)
    assert answer["accepted"] == 1
    assert "the limit is" in answer["rejected"][0]["reason"]


@pytest.mark.parametrize("put", [None, make_file, make_socket])
def test_a_deleted_socket_file_is_made_again_while_connections_go_on(
    station: Station, put: Callable[[Path], None] | None
) -> None:
    with station.line() as line:
        line.send(*numbers(range(3)))
        assert line.through(3)["accepted"] == 3
        station.socket.unlink()
        if put is not None:
            put(station.socket)
        wait_until("a producer connects", lambda: connects(station.socket))
        line.send(*numbers(range(3, 5)))
        assert line.through(5)["accepted"] == 2
    with station.line() as line:
        line.send(*numbers(range(5, 8)))
        assert line.through(3)["accepted"] == 3
    assert stat.S_IMODE(station.socket.stat().st_mode) == 0o660


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as attempt:
        return attempt.connect_ex(str(path)) == 0


def test_a_folder_in_the_place_of_the_socket_is_named_until_it_is_removed(
    station: Station, caplog: pytest.LogCaptureFixture
) -> None:
    station.socket.unlink()
    station.socket.mkdir()
    wait_until("the folder is named", lambda: "intake.sock: Is a directory" in caplog.text)
    station.socket.rmdir()
    wait_until("a producer connects", lambda: connects(station.socket))


def test_intake_fails_within_seconds_after_its_data_folder_was_moved_away(tmp_path: Path) -> None:
    with Station(conf(tmp_path / "data")) as station, station.line() as line:
        line.send(*numbers(range(3)))
        line.through(3)
        (tmp_path / "data").rename(tmp_path / "former")
        # Without a row or a commit.
        wait_until("the intake fails", lambda: bool(station.failures))
        assert isinstance(station.failures[0], StorageMoved)
        line.send(*numbers(range(3, 4)))
        line.hang_up()
        assert line.rest() == []
    assert not (tmp_path / "data").exists()

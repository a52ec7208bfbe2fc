"""Python client: exactly-once delivery, reconnects, replies."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device.intake.group_commit import MAX_GROUP_ROWS
from outstation.device.store.store import Store
from outstation.protocol.client import Client, FlushResult
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import T0, Killable, Station, conf


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    with Station(conf(tmp_path)) as station:
        yield station
        assert station.failures == []


def counts(station: Station) -> list[int]:
    values: list[int] = station.rows("machine").columns[1].tolist()
    return values


def number(client: Client, n: int) -> None:
    client.send("machine", power=1, count=n, mode="on")


@contextmanager
def agent(folder: Path, *conversations: Callable[[socket.socket], None]) -> Iterator[Path]:
    """An agent of our own making: it has one conversation per connection, then hangs up."""
    path = folder / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for talk in conversations:
                connection, _ = listener.accept()
                with connection:
                    talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join(60)


def lines(connection: socket.socket, n: int) -> list[bytes]:
    """The next `n` lines, and nothing after them."""
    data = b""
    while data.count(b"\n") < n:
        data += connection.recv(1)
    return data.splitlines()


def answer(connection: socket.socket, through: int, accepted: int = 0, rejected: Any = ()) -> None:
    connection.sendall(msgspec.json.encode({"through": through, "accepted": accepted, "rejected": rejected}) + b"\n")


def greet(connection: socket.socket, through: int = 0) -> None:
    """Answer the client's name with the number of its stored lines."""
    lines(connection, 1)
    answer(connection, through)


def lose(folder: Path, lost: threading.Event) -> Callable[[socket.socket], None]:
    """Return a conversation that ends after the greeting; no other is possible until `bring_back`."""

    def talk(connection: socket.socket) -> None:
        greet(connection)
        (folder / "agent.sock").rename(folder / "away")
        connection.close()
        lost.set()

    return talk


def bring_back(folder: Path) -> None:
    (folder / "away").rename(folder / "agent.sock")


def test_what_flush_says_is_on_the_disk(station: Station) -> None:
    with Client(station.socket) as client:
        client.send("watch", t=T0, ax=0.1, ay=0.2)
        client.send_columns("watch", {"t": [T0 + 1, T0 + 2], "ax": np.array([1, 2], "<f4"), "ay": range(2)})
        assert client.flush() == FlushResult(accepted=3, rejected=[])
        assert station.store.last_row("watch") == 3
        assert client.through == 2
        client.send("watch", ax=99, ay=0)
        client.send("watch", ax=1)
        assert client.flush() == FlushResult(0, [(3, "ax is above max 16"), (4, "field 'ay' is missing")])
        assert client.flush() == FlushResult(0, [])


def test_a_column_that_is_no_sequence_is_named(station: Station) -> None:
    with Client(station.socket) as client:
        with pytest.raises(TypeError, match="column 'ax' must be a sequence or a numpy array, not float"):
            client.send_columns("watch", {"t": [T0], "ax": 1.0, "ay": [2.0]})  # type: ignore[dict-item]
        assert client.flush() == FlushResult(0, [])


def test_the_context_flushes_unless_an_error_is_raised(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=0.3)) as station:
        with Client(station.socket) as client:
            number(client, 1)
        assert counts(station) == [1]
    with Station(conf(tmp_path, commit_every_s=60)) as station:
        began = time.monotonic()
        with pytest.raises(ZeroDivisionError), Client(station.socket) as client:  # noqa: PT012
            number(client, 2)
            raise ZeroDivisionError
        assert time.monotonic() - began < 30


def test_many_lines_do_not_wait_for_the_commit_timer(tmp_path: Path) -> None:
    with Station(conf(tmp_path, commit_every_s=600)) as station:
        client = Client(station.socket)
        for n in range(40_000):
            number(client, n)
        wait_until("all rows but the last ones", lambda: station.store.last_row("machine") > 40_000 - MAX_GROUP_ROWS)
        client.close()


def test_many_rejections_do_not_deadlock(station: Station) -> None:
    with Client(station.socket, patience_s=20) as client:
        for _ in range(30_000):
            client.send("watch", ax="no number at all")
        client.send_columns("watch", {"ax": [1.0] * 40_000, "ay": [1.0] * 40_000})
        got = client.flush()
    assert (got.accepted, len(got.rejected)) == (40_000, 30_000)


def test_an_unnamed_client_reports_unacknowledged_lines(tmp_path: Path) -> None:
    killable = Killable(tmp_path, commit_every_s=30)
    killable.start()
    client = Client(killable.socket)
    for n in range(7):
        number(client, n)
    killable.kill()
    with pytest.raises(ConnectionError, match="7 lines are not acknowledged; send them again"):
        client.flush()
    with pytest.raises(ConnectionError, match="8 lines are not acknowledged"):
        number(client, 7)
    client.close()


@pytest.mark.parametrize("name", [None, "g"])
def test_an_absent_daemon_is_an_error_with_the_address(tmp_path: Path, name: str | None) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=re.escape(str(tmp_path / "intake.sock"))):
        # One without a name does not wait.
        Client(tmp_path / "intake.sock", name=name, patience_s=0.3 if name else 600.0)
    assert name is None or time.monotonic() - began > 0.25
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1: Connection refused"):
        Client("127.0.0.1:1", name=name, patience_s=0.1)


def test_a_named_client_waits_for_the_daemon(tmp_path: Path) -> None:
    station = Station(conf(tmp_path))
    timer = threading.Timer(0.3, station.intake.start)
    timer.start()
    with Client(station.socket, name="g") as client:
        number(client, 1)
        assert client.flush().accepted == 1
    timer.join()
    station.intake.stop()
    station.store.close()


def test_a_named_client_resends_each_line_exactly_once(tmp_path: Path) -> None:
    killable = Killable(tmp_path, commit_every_s=0.05)
    killable.start()
    with Client(killable.socket, name="g") as client:
        for n in range(100):
            number(client, n)
        client.flush()
        for n in range(100, 200):
            number(client, n)
        killable.kill()
        killable.start()
        for n in range(200, 300):
            number(client, n)
        client.flush()
        assert client.through == 300
    killable.kill()
    with Station(conf(tmp_path)) as station:
        assert counts(station) == list(range(300))
        with Client(station.socket, name="g") as later:
            assert later.through == 300


def test_a_named_client_sends_while_the_daemon_is_away_and_loses_nothing(tmp_path: Path) -> None:
    killable = Killable(tmp_path, commit_every_s=0.05)
    killable.start()
    client = Client(killable.socket, name="g")
    number(client, 0)
    killable.kill()
    began = time.monotonic()
    for n in range(1, 1000):
        number(client, n)
    assert time.monotonic() - began < 30
    killable.start()
    client.flush()
    client.close()
    killable.kill()
    with Station(conf(tmp_path)) as station:
        assert counts(station) == list(range(1000))


def test_the_memory_of_a_client_without_a_daemon_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outstation.protocol.client._MAX_PENDING_LINES", 50)
    killable = Killable(tmp_path, commit_every_s=30)
    killable.start()
    client = Client(killable.socket, name="g", outage_s=4.0)
    killable.kill()
    began = time.monotonic()
    for n in range(50):
        number(client, n)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="50 lines are not acknowledged; send them again"):
            number(client, 50)
    assert time.monotonic() - began >= 4.0
    client.close()


def test_ctrl_c_ends_the_wait_for_the_daemon(tmp_path: Path) -> None:
    killable = Killable(tmp_path, commit_every_s=30)
    killable.start()
    waits = threading.Event()

    def interrupt() -> None:
        assert waits.wait(30)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    client = Client(killable.socket, name="g")
    number(client, 1)
    killable.kill()
    # A shell has programs in its background ignore this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt), client:
            waits.set()
        thread.join(30)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_outage_ends(tmp_path: Path) -> None:
    killable = Killable(tmp_path, commit_every_s=30)
    killable.start()
    client = Client(killable.socket, name="g", outage_s=0.4)
    number(client, 1)
    killable.kill()
    with pytest.raises(ConnectionError, match="1 lines are not acknowledged; send them again"):
        client.flush()
    killable.start()
    killable.kill()
    client.close()


def test_a_daemon_that_only_accepts_connections_does_not_hold_a_client_for_ever(tmp_path: Path) -> None:
    with agent(tmp_path, *[greet] * 4) as path:
        client = Client(path, name="g", patience_s=0.3, outage_s=0.2)
        number(client, 1)
        with pytest.raises(ConnectionError, match="1 lines are not acknowledged"):
            client.flush()
        client.close()
        for _ in range(4):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as spare:
                spare.connect(str(path))
                spare.sendall(b"{}\n")


class Clock:
    """Clock of the client that only its own waits and the test move."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        # The daemon's thread needs a turn, too.
        threading.Event().wait(0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("outstation.protocol.client.time", clock)
    return clock


@pytest.mark.parametrize("later_s", [3590.0, 7200.0], ids=["within outage_s", "after outage_s"])
def test_a_second_loss_after_answered_lines_begins_a_new_outage(tmp_path: Path, clock: Clock, later_s: float) -> None:
    """A slow producer's: it reads the replies to its few lines only when it next waits."""
    first_lost, answered, lose_again, second_lost = (threading.Event() for _ in range(4))

    def lose_first(connection: socket.socket) -> None:
        greet(connection)
        connection.close()
        first_lost.set()

    def answer_and_lose(connection: socket.socket) -> None:
        greet(connection)
        lines(connection, 1)
        answer(connection, 1, 1)
        answered.set()
        lose_again.wait(60)
        path.rename(tmp_path / "away")
        connection.close()
        second_lost.set()

    def answer_rest(connection: socket.socket) -> None:
        greet(connection, 1)
        lines(connection, 2)
        answer(connection, 3, 2)

    with agent(tmp_path, lose_first, answer_and_lose, answer_rest) as path, Client(path, name="slow") as client:
        assert first_lost.wait(60)
        number(client, 1)
        assert answered.wait(60)
        clock.now_s += later_s
        lose_again.set()
        assert second_lost.wait(60)
        number(client, 2)
        clock.now_s += 100
        number(client, 3)
        bring_back(tmp_path)
        assert client.flush().rejected == []
        assert client.through == 3


def test_a_daemon_that_dies_while_lines_are_resent_ends_the_outage_in_time(tmp_path: Path, clock: Clock) -> None:
    lost = threading.Event()

    def die_after_one_line(connection: socket.socket) -> None:
        greet(connection)
        connection.recv(1)
        answer(connection, 1, 1)
        # The client reads the reply: the lines it resends do not fit into the socket.
        threading.Event().wait(0.1)
        path.unlink()

    with agent(tmp_path, lose(tmp_path, lost), die_after_one_line) as path:
        client = Client(path, name="g", outage_s=5.0)
        assert lost.wait(60)
        for _ in range(4):
            client.send("machine", mode="x" * 1_000_000)
        bring_back(tmp_path)
        with pytest.raises(ConnectionError, match=r"[34] lines are not acknowledged"):
            client.flush()
        client.close()


def test_a_send_that_raises_after_an_outage_does_not_keep_its_row(tmp_path: Path, clock: Clock) -> None:
    lost = threading.Event()
    received: list[bytes] = []

    def receive_all(connection: socket.socket) -> None:
        greet(connection)
        for through in (1, 2):
            received.extend(lines(connection, 1))
            answer(connection, through, 1)

    with agent(tmp_path, lose(tmp_path, lost), receive_all) as path:
        client = Client(path, name="g", outage_s=1.0)
        assert lost.wait(60)
        number(client, 1)
        clock.now_s += 2
        for _ in range(3):
            with pytest.raises(ConnectionError, match="; 1 lines are not acknowledged; send them again, unless"):
                number(client, 2)
        bring_back(tmp_path)
        number(client, 2)
        assert client.flush() == FlushResult(2, [])
        client.close()
    assert [msgspec.json.decode(line)["count"] for line in received] == [1, 2]


def test_a_flush_does_not_wait_for_replies_to_lines_that_were_committed_before(tmp_path: Path) -> None:
    flushed = threading.Event()

    def commit_without_reply(connection: socket.socket) -> None:
        greet(connection)
        lines(connection, 1)

    def greet_and_wait(connection: socket.socket) -> None:
        greet(connection, 1)
        flushed.wait(60)

    with agent(tmp_path, commit_without_reply, greet_and_wait) as path:
        client = Client(path, name="g", patience_s=20.0)
        number(client, 1)
        began = time.monotonic()
        client.flush()
        assert time.monotonic() - began < 15
        flushed.set()
        client.close()


def test_a_row_with_a_lost_reply_is_not_resent(tmp_path: Path) -> None:
    again: list[bytes] = []

    def first(connection: socket.socket) -> None:
        greet(connection)
        lines(connection, 3)

    def second(connection: socket.socket) -> None:
        lines(connection, 1)
        answer(connection, 2)
        again.extend(lines(connection, 1))
        answer(connection, 3, 1)

    with agent(tmp_path, first, second) as path, Client(path, name="g") as client:
        for n in range(3):
            number(client, n)
        client.flush()
        assert [msgspec.json.decode(line)["count"] for line in again] == [2]
        client.close()


def test_an_agent_that_lost_count_is_followed(tmp_path: Path) -> None:
    """Its store was full or is a new one: it counts less than it has answered."""
    again: list[bytes] = []

    def first(connection: socket.socket) -> None:
        greet(connection)
        lines(connection, 2)
        answer(connection, 2, 0, [{"line": 1, "reason": "not stored"}, {"line": 2, "reason": "not stored"}])

    def second(connection: socket.socket) -> None:
        greet(connection)
        again.extend(lines(connection, 1))
        answer(connection, 1, 0, [{"line": 1, "reason": "bad"}])

    with agent(tmp_path, first, second) as path, Client(path, name="g") as client:
        number(client, 0)
        number(client, 1)
        assert client.flush().rejected == [(1, "not stored"), (2, "not stored")]
        number(client, 2)
        assert client.flush().rejected == [(3, "bad")]
        assert client.through == 3
        assert [msgspec.json.decode(line)["count"] for line in again] == [2]
        client.close()


def test_rejected_lines_are_resent_only_if_the_rejection_was_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, limit = [True], Store.limit_bytes
    monkeypatch.setattr(Store, "limit_bytes", lambda store: 4096 if full[0] else limit(store))
    with Station(conf(tmp_path)) as station, Client(station.socket, name="g") as client:
        with monkeypatch.context() as deaf:
            deaf.setattr(client, "_read_replies", lambda: None)
            number(client, 1)
            wait_until("the first line is refused", lambda: station.commits > 0)
            full[0] = False
            number(client, 2)
        client._socket.close()
        assert client.flush().rejected == []
        assert (client.through, counts(station)) == (2, [1, 2])
        full[0] = True
        number(client, 3)
        ((line, reason),) = client.flush().rejected
        assert (line, "not stored" in reason) == (3, True)
        full[0] = False
        for n in range(4, 8):
            number(client, n)
        assert client.flush() == FlushResult(4, [])
        assert (client.through, counts(station)) == (7, [1, 2, 4, 5, 6, 7])
        assert station.failures == []


def test_a_second_producer_with_the_same_name_is_refused(tmp_path: Path) -> None:
    with Station(conf(tmp_path)) as station:
        first = Client(station.socket, name="g")
        number(first, 1)
        first.flush()
        with Client(station.socket, name="g") as other:
            number(other, 2)
            number(other, 3)
            other.flush()
        with pytest.raises(RuntimeError, match="another producer uses the name 'g'; give each its own"):  # noqa: PT012
            for n in range(4, 100):
                number(first, n)
                first.flush()
        first.close()
        assert counts(station) == [1, 2, 3]


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_has_1_to_64_characters(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="1-64 characters"):
        Client(tmp_path / "intake.sock", name=name)


def test_an_unresponsive_daemon_times_out(tmp_path: Path) -> None:
    held = threading.Event()

    def silent(connection: socket.socket) -> None:
        held.wait(60)

    with agent(tmp_path, silent) as path:
        client = Client(path, patience_s=0.2)
        number(client, 1)
        with pytest.raises(ConnectionError, match=r"no answer for 0\.2 s; 1 lines are not acknowledged"):
            client.flush()
        held.set()
        client.close()

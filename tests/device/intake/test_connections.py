"""Attacks on the intake's connections: floods, idle ones, other protocols, other users, and a lack of descriptors."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.device.intake import listener, server
from outstation.device.intake.connection import _READ_BYTES, ProducerConnection
from outstation.device.intake.listener import ConnectionTable, Refusal, User, load_token
from outstation.foundation.errors import UsageError
from outstation.protocol.client import Client, _encode_frame
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.patience import wait_until
from tests.kit.marks import root_only
from tests.kit.stations import ROOT, Killable, Line, Station, conf

pytestmark = pytest.mark.attack("connections")

ROW = {"stream": "watch", "ax": 0.1, "ay": 0.2}
ONE_ROW = b'{"stream":"watch","ax":1,"ay":2}\n'


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    with Station(conf(tmp_path)) as station:
        yield station
        assert station.failures == []


def counter(station: Station, name: str) -> int:
    return station.store.counters().get(name, 0)


# --- floods


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_descriptors")
def test_eleven_hundred_idle_connections_leave_room_and_do_not_end_the_daemon(tmp_path: Path) -> None:
    with Killable(tmp_path) as killable, contextlib.ExitStack() as flood:
        producer = flood.enter_context(Line(killable.socket))
        producer.send(ROW)
        assert producer.answer()["accepted"] == 1
        lines = [flood.enter_context(Line(killable.socket)) for _ in range(1100)]
        last = lines[-1].answer()
        assert last["retry"] is True
        assert f"{listener.MAX_PER_USER} a user" in last["error"]
        producer.send(ROW)
        assert producer.answer()["accepted"] == 1
        assert len(os.listdir(f"/proc/{killable.pid}/fd")) < listener.MAX_CONNECTIONS + 64


def test_refused_connections_leave_neither_memory_nor_log_lines(
    station: Station, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as attacker:
            attacker.connect(str(station.socket))
            attacker.sendall(b"GET / HTTP/1.1\r\n")
    wait_until("the refusals", lambda: station.intake.group_commit._counts["connections refused"] == 10)
    wait_until("the ends of the connections", lambda: not station.intake._serve_tasks)
    gc.collect()
    assert not [item for item in gc.get_objects() if isinstance(item, ProducerConnection)]
    assert caplog.messages == []


@pytest.mark.parametrize(("rows", "is_large"), [(1, False), (1000, True)])
def test_many_small_frames_do_not_come_in_one_large_read(
    station: Station, monkeypatch: pytest.MonkeyPatch, rows: int, is_large: bool
) -> None:
    sizes, get_buffer = [], ProducerConnection.get_buffer

    def measure(self: ProducerConnection, sizehint: int) -> memoryview:
        sizes.append(len(buffer := get_buffer(self, sizehint)))
        return buffer

    monkeypatch.setattr(ProducerConnection, "get_buffer", measure)
    column = np.ones(rows, "<f4")
    content = _encode_frame("watch", {"ax": column, "ay": column})
    with station.line() as line:
        for count in (1, 2, 3):
            line.socket.sendall(content or b"")
            line.through(count)
    assert (max(sizes) > _READ_BYTES) is is_large


class Idle:
    """Member of a connection table."""

    def __init__(self, user: User, last_read_s: float = 0.0, held: int = 0) -> None:
        self.user, self.last_read_s, self.held = user, last_read_s, held
        self.refusals: list[Refusal] = []

    def held_bytes(self) -> int:
        return self.held

    def refuse(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)


def test_a_user_who_takes_all_connections_keeps_no_other_user_out() -> None:
    table = ConnectionTable(8)
    attacker = [Idle(1000, n) for n in range(4)] + [Idle(1001, n) for n in range(4)]
    for connection in attacker:
        table.add(connection, 10.0)
    with pytest.raises(Refusal, match=r"user 1000 has too many"):
        table.add(Idle(1000), 10.0)
    table.add(Idle(0, 10.0), 10.0)
    assert [c.last_read_s for c in attacker if c.refusals] == [0]


def test_an_idle_connection_gives_way_to_a_new_one_of_its_user() -> None:
    table, old = ConnectionTable(4), Idle(1, 0.0)
    table.add(old, 0.0)
    table.add(Idle(1, 90.0), 90.0)
    table.add(Idle(1, 100.0), 100.0)
    assert [str(r) for r in old.refusals] == [
        "user 1 has too many connections (2 a user, 4 in all), and this one was idle longest; connect again"
    ]


def test_connections_without_a_byte_for_an_hour_are_closed() -> None:
    table, old, new = ConnectionTable(4), Idle(1, 0.0), Idle(1, 3000.0)
    table.add(old, 0.0)
    table.add(new, 3000.0)
    table.close_idle(4000.0)
    assert (len(old.refusals), len(new.refusals)) == (1, 0)


def test_unfinished_lines_of_many_connections_do_not_fill_the_memory() -> None:
    table = ConnectionTable(100)
    flood = [Idle(1, held=1 << 20) for _ in range(40)]
    small = Idle(2, held=500)
    for connection in [*flood, small]:
        table.add(connection, 0.0)
    table.limit_memory(flood[-1])
    assert sum(not connection.refusals for connection in flood) <= 16
    assert small.refusals == []


@pytest.mark.parametrize("line", [ONE_ROW, b'{"client":"%d"}\n{"stream":"watch","ax":1,"ay":2}\n'])
def test_a_hundred_connections_of_one_line_each_share_a_few_commits(tmp_path: Path, line: bytes) -> None:
    with Station(conf(tmp_path, commit_every_s=2.0)) as station:
        began = time.monotonic()
        for n in range(100):
            with Line(station.socket) as connection:
                connection.socket.sendall(line.replace(b"%d", b"%d" % n))
                connection.hang_up()
        wait_until("the rows", lambda: station.store.last_row("watch") == 100)
        assert station.commits <= 8 + 2 * ((time.monotonic() - began) / 2.0 + 1)


def test_a_lack_of_descriptors_delays_connections_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_RETRY_S", 0.05)
    with Station(conf(tmp_path)) as station:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as late:
            late.settimeout(30)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
            try:
                late.connect(str(station.socket))
                late.sendall(ONE_ROW)
                wait_until("two tries", lambda: bool(station.intake.group_commit._counts["connections delayed"] > 1))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            assert b'"accepted":1' in late.recv(4096)
        wait_until("the count", lambda: counter(station, "connections delayed") > 1)
        assert [r.message for r in caplog.records if "accepted" in r.message] == [
            f"no new connection can be accepted: {os.strerror(errno.EMFILE)}; producers wait, the others go on"
        ]
        assert station.failures == []


def test_the_intake_raises_its_limit_of_open_files() -> None:
    program = "from outstation.device.intake.listener import raise_descriptor_limit as r; import resource\n"
    program += "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1500))\n"
    program += "print(r(), resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    program += "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); print(r())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "512 (1500, 1500)\n72\n"


# --- other protocols


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1:7071\r\nContent-Type: text/plain\r\n\r\n" + ONE_ROW,
        b"\n\nPOST / HTTP/1.1\r\n\r\n" + ONE_ROW,
        b"\x16\x03\x01\x02\x00\x01\x00\n" + ONE_ROW,
        b"[1]\n" + ONE_ROW,
    ],
)
def test_a_web_pages_post_is_refused_before_any_of_its_rows(station: Station, request_bytes: bytes) -> None:
    with station.line() as line:
        line.socket.sendall(request_bytes)
        (answer,) = line.rest()
    assert "not the intake protocol: the first line must be a JSON object or a frame" in answer["error"]
    with station.line() as line:
        line.send(ROW)
        line.answer()
    assert station.store.last_row("watch") == 1
    assert counter(station, "connections refused") == 1


@pytest.mark.parametrize("before", [b"\n", b" \r\n", b"\xef\xbb\xbf"])
def test_white_space_and_a_byte_order_mark_may_come_first(station: Station, before: bytes) -> None:
    with station.line() as line:
        line.socket.sendall(before)
        time.sleep(0.02)
        line.send(ROW, ROW)
        assert line.through(2)["accepted"] >= 1


def test_a_producer_that_hangs_up_and_never_reads_its_answers_takes_no_descriptor_for_ever(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outstation.device.intake.connection._FLUSH_S", 1.0)
    table, close, unread = station.intake._table, ProducerConnection.close, list[int]()

    async def count_and_close(connection: ProducerConnection) -> None:
        unread.append(connection.held_bytes())
        await close(connection)

    monkeypatch.setattr(ProducerConnection, "close", count_and_close)
    with Line(station.socket) as line:
        wait_until("the connection", lambda: table._connections)
        descriptors = len(os.listdir("/proc/self/fd"))
        # Answers of 40 times as many bytes: more than the kernel holds.
        line.socket.sendall(b"{\n" * 20_000)
        line.hang_up()
        wait_until("the end of the connection", lambda: unread and not table._connections)
        assert unread[0] > 0
        wait_until("its descriptor", lambda: len(os.listdir("/proc/self/fd")) < descriptors)


# --- the token of TCP


def test_a_tcp_producer_without_the_token_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with Station(conf(tmp_path, tcp=f"127.0.0.1:{port}")) as station:
        token = load_token(tmp_path / "intake.token")
        openings: list[Any] = [
            ROW,
            {"client": "g"},
            {"token": ""},
            {"token": token[:-1]},
            {"token": "é" * 43},
            {"token": token, "client": ""},
            b"",
            b'{"token":"' + token.encode() + b'","token":"x"}',
            b'{"x":"' + b"x" * (1 << 20),
        ]
        for opening in openings:
            with Line(("127.0.0.1", port)) as line:
                with contextlib.suppress(ConnectionError):
                    line.send(opening, ROW)
                with contextlib.suppress(ConnectionError):
                    assert [a for a in line.rest() if "first line on TCP must be" not in a["error"]] == []
        with pytest.raises(PermissionError, match="first line on TCP must be"):
            Client(f"127.0.0.1:{port}", name="g", token="wrong")
        with Client(f"127.0.0.1:{port}", token=token) as client:
            client.send("watch", ax=1, ay=2)
            assert client.flush().accepted == 1
        assert station.store.last_row("watch") == 1


@pytest.mark.attack("connections", control=True)
def test_without_a_token_any_program_that_reaches_the_port_sends_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "load_token", lambda _: None)
    port = free_port()
    with Station(conf(tmp_path, tcp=f"127.0.0.1:{port}")) as station:
        with Line(("127.0.0.1", port)) as line:
            line.send(ROW)
            assert line.answer()["accepted"] == 1
        assert station.store.last_row("watch") == 1


@pytest.mark.attack("connections", control=True)
def test_without_caps_eleven_hundred_idle_connections_all_stay(
    tmp_path: Path, many_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_PER_USER", 10_000)
    monkeypatch.setattr(server, "raise_descriptor_limit", lambda: 10_000)
    with Station(conf(tmp_path)) as station, contextlib.ExitStack() as flood:
        for _ in range(1100):
            flood.enter_context(Line(station.socket))
        wait_until("1,100 open connections", lambda: len(station.intake._table._connections) == 1100)
        # With 1,024 descriptors, as a service has them, there was none left for the store.
        assert len(os.listdir("/proc/self/fd")) > 1024


def test_the_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "intake.token"
    token = load_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_token(path) == token
    path.chmod(0o640)
    with pytest.raises(UsageError, match="others can read this token"):
        load_token(path)
    path.write_text("short")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="at least 32 characters"):
        load_token(path)


# --- client names


_AS_NOBODY = """\
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(b'{"client":"gateway"}\\n')
print(s.makefile().readline(), end="")
"""


@root_only
@pytest.mark.usefixtures("shared_path")
def test_a_name_claimed_by_another_user_leaves_the_genuine_producer_alone(station: Station) -> None:
    station.socket.chmod(0o666)

    def claim() -> str:
        command = [sys.executable, "-c", _AS_NOBODY, str(station.socket)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout

    with station.line() as genuine:
        genuine.send({"client": "gateway"}, ROW)
        assert genuine.through(1)["accepted"] == 1
        assert claim() == (
            '{"error":"client name \'gateway\' is in use by another user; choose another name","retry":false}\n'
        )
        genuine.send(ROW)
        assert genuine.answer()["through"] == 2
    wait_until("the end of the genuine producer", lambda: station.intake._connections_by_client == {})
    assert claim().startswith('{"through":2')

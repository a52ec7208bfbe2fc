"""The way in: JSON lines on a socket, answered once per commit, and the sources this device runs itself.

A producer that begins with `{"client":"NAME"}` is told how many of its lines are safe already, and its line count
goes on from there: lines it sends again after a broken connection are taken once. A name has one connection: the
newest; what an older one still had under way is not taken any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from agent import config
from agent.clock import ClockReading
from agent.device.intake.connection import CLIENT_SOURCE, ProducerConnection
from agent.device.intake.group_commit import CommitOutcome, GroupCommit, SourcePosition
from agent.device.intake.protocol import LineParser
from agent.device.intake.source import Source
from agent.device.store.rows import RawColumns, validate_columns
from agent.device.store.store import Store
from agent.errors import StorageError, UsageError
from agent.performance.labels import LabelTarget

log = logging.getLogger("outstation.intake")

# So little that a producer of noise, two bytes a line, holds up the others for a tenth of a second at most.
_READ_BYTES = 1 << 16
# A line at a time costs twenty times what it costs among others. Rows wait for a commit anyway, for much longer.
_SMALL_READ_BYTES, _GATHER_S = _READ_BYTES // 4, 0.002
# What is worth a commit of its own waits only as long as more keeps coming.
_QUIET_S = 0.005
_HEARTBEAT_S = 10.0
_HEARTBEAT_TIMEOUT_S = 120.0
# Sources may do so much longer with what was committed last.
_SHUTDOWN_S = 3.0
# Where it is used up, a producer that connects with a time limit is turned away at once.
_BACKLOG = 1024


class Intake:
    """One thread with the sockets, the sources and the group they share.

    A second one writes while much comes: half of the time goes into the disk.
    """

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        sources: Sequence[Source],
        now: Callable[[], ClockReading],
        on_committed: Callable[[], None],
        on_failed: Callable[[Exception], None],
        label_targets: Callable[[], Mapping[str, LabelTarget]] = dict,
    ) -> None:
        self._conf, self._store, self._sources, self._now = conf, store, sources, now
        self._on_committed, self._on_failed = on_committed, on_failed
        self._group_commit = GroupCommit(store, conf.streams, label_targets)
        self._answer_callbacks: dict[object, Callable[[CommitOutcome], None]] = {}
        self._connections_by_client: dict[str, ProducerConnection] = {}
        self._open_writers: set[asyncio.StreamWriter] = set()
        self._serve_tasks: set[asyncio.Task[None]] = set()
        self._has_failed = False
        self._alive_until_s = now().boot_s + _HEARTBEAT_TIMEOUT_S
        self._timer: asyncio.TimerHandle | None = None
        self._writer = ThreadPoolExecutor(1, "intake-writes")
        self._background_write: Future[dict[Hashable, CommitOutcome]] | None = None
        # By then, on the clock of the loop, what waits is committed, whatever comes.
        self._commit_due_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_event: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="intake", daemon=True)

    def start(self) -> None:
        """Listen and run the sources; returns once the sockets are open."""
        self._thread.start()
        self._ready.wait(10)

    def is_alive(self, now: ClockReading) -> bool:
        """Whether the thread got round lately; one commit to a slow card is well within."""
        return now.boot_s < self._alive_until_s

    def stop(self) -> None:
        """Commit what waits, answer, and end."""
        if self._loop is not None and self._stop_event is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop_event.set)
        self._thread.join(5)

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:
            self._on_failed(error)
        finally:
            self._ready.set()

    async def _run(self) -> None:
        self._loop, self._stop_event = asyncio.get_running_loop(), asyncio.Event()
        servers: list[asyncio.Server] = []
        try:
            servers.append(await self._listen_unix())
            if self._conf.intake.tcp:
                servers.append(await self._listen_tcp(self._conf.intake.tcp))
            tasks = [asyncio.create_task(self._run_source(source)) for source in self._sources]
            tasks.append(asyncio.create_task(self._run_heartbeat()))
            self._ready.set()
            await self._stop_event.wait()
        finally:
            await _close_servers(servers)
        for task in tasks:
            task.cancel()
        self._commit()
        # Also those whose task has not begun: cancelled now, it would never close them.
        for writer in self._open_writers:
            writer.close()
        await asyncio.wait(tasks, timeout=_SHUTDOWN_S)
        self._writer.shutdown()

    async def _listen_unix(self) -> asyncio.Server:
        listener = _open_unix_socket(self._conf.data_dir)
        return await asyncio.start_unix_server(self._accept, sock=listener, limit=_READ_BYTES, backlog=_BACKLOG)

    async def _listen_tcp(self, address: str) -> asyncio.Server:
        host, port = config.parse_loopback(address)
        try:
            return await asyncio.start_server(self._accept, host, port, limit=_READ_BYTES)
        except OSError as error:
            raise UsageError(f"intake.tcp {address}: {error.strerror}; choose another port") from error

    async def _run_heartbeat(self) -> None:
        while True:
            self._alive_until_s = self._now().boot_s + _HEARTBEAT_TIMEOUT_S
            await asyncio.sleep(_HEARTBEAT_S)

    async def _run_source(self, source: Source) -> None:
        try:
            await source.run(self._submit_rows)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Nobody knows what reached the disk. No answer and no further commit: it could count lines lost before it."""
        self._has_failed = True
        self._on_failed(error)

    async def _submit_rows(
        self,
        stream: str,
        raw: RawColumns,
        position: SourcePosition | None,
        lines: Sequence[int] = (),
        refused: Mapping[int, str] = MappingProxyType({}),
    ) -> CommitOutcome:
        # Recorded times may lie before the last ones of an earlier file or session: the source has its own order.
        now = self._now()
        checked = validate_columns(raw, self._conf.streams[stream], now.wall_us, None)
        producer = object()
        future: asyncio.Future[CommitOutcome] = asyncio.get_running_loop().create_future()
        self._answer_callbacks[producer] = lambda outcome: None if future.done() else future.set_result(outcome)
        numbers = list(lines) or list(range(1, raw.n + 1))
        self._group_commit.add_rows(
            producer, stream, checked, [n for i, n in enumerate(numbers) if i not in checked.rejected], now
        )
        for index, reason in checked.rejected.items():
            self._group_commit.reject(producer, numbers[index], reason)
        for number, reason in refused.items():
            self._group_commit.reject(producer, number, reason)
        self._group_commit.advance(producer, max([*numbers[-1:], *refused]), position)
        self._schedule_commit()
        return await future

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open_writers.add(writer)
        if self._stop_event is None or self._stop_event.is_set():
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serve_tasks.add(task)
        task.add_done_callback(self._serve_tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        producer = ProducerConnection(self._group_commit, LineParser(self._conf.streams), self._greet, writer)
        self._answer_callbacks[producer] = producer.answer
        try:
            while data := await reader.read(_READ_BYTES):
                fed = producer.feed(data, self._now())
                self._schedule_commit()
                # A producer that does not read its answers waits here, and only that producer.
                await writer.drain()
                # Part of a long line is none of many short ones: to wait would only keep its producer waiting.
                if fed < _SMALL_READ_BYTES:
                    await _pause_reading(writer.transport)
            producer.end(self._now())
            self._commit()
        except ConnectionError:
            self._commit()
        except StorageError as error:
            self._fail(error)
        finally:
            self._answer_callbacks.pop(producer, None)
            if producer.name is not None and self._connections_by_client.get(producer.name) is producer:
                del self._connections_by_client[producer.name]
            self._open_writers.discard(writer)
            writer.close()

    def _greet(self, producer: ProducerConnection, name: str) -> int:
        """How many lines of `name` are safe, with what its older connection had sent so far; that one is done for."""
        older = self._connections_by_client.get(name)
        self._connections_by_client[name] = producer
        if older is not None:
            older.retire()
        self._commit()
        if self._has_failed:
            raise StorageError("the store failed; how far this client got cannot be told")
        return self._store.source_position(CLIENT_SOURCE, name)

    def _schedule_commit(self) -> None:
        if self._group_commit.is_full:
            self._commit_in_background()
        elif self._group_commit and (self._timer is None or self._group_commit.is_worth_committing):
            loop = asyncio.get_running_loop()
            now = loop.time()
            if self._timer is None:
                self._commit_due_s = now + self._conf.buffer.commit_every
            else:
                self._timer.cancel()
            at = (
                min(self._commit_due_s, now + _QUIET_S)
                if self._group_commit.is_worth_committing
                else self._commit_due_s
            )
            self._timer = loop.call_at(at, self._commit)

    def _commit(self) -> None:
        """All that came is on the disk and answered afterwards, unless the store is broken."""
        self._cancel_timer()
        self._answer_background_write()
        if self._group_commit and not self._has_failed:
            self._commit_and_answer(lambda: self._group_commit.commit(self._now()))

    def _commit_in_background(self) -> None:
        """Write what came while more is read; waits for what is being written."""
        self._cancel_timer()
        self._answer_background_write()
        if self._has_failed:
            return
        writing = self._writer.submit(self._group_commit.write, self._group_commit.drain(), self._now())
        self._background_write, loop = writing, asyncio.get_running_loop()

        def notify(_: object) -> None:
            # The loop may have waited for it and be closed by now.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._answer_background_write, writing)

        writing.add_done_callback(notify)

    def _answer_background_write(self, expected: object = None) -> None:
        """Answer for what the second thread writes, once it is done; only if it is `which`, where that is given."""
        writing = self._background_write
        if writing is not None and expected in (None, writing):
            self._background_write = None
            self._commit_and_answer(writing.result)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _commit_and_answer(self, commit: Callable[[], Mapping[Hashable, CommitOutcome]]) -> None:
        try:
            outcomes = commit()
        except Exception as error:
            self._fail(error)
            return
        for producer, outcome in outcomes.items():
            answer = self._answer_callbacks.get(producer)
            if answer is not None:
                answer(outcome)
            if not isinstance(producer, ProducerConnection):
                self._answer_callbacks.pop(producer, None)
        self._on_committed()


async def _pause_reading(transport: asyncio.BaseTransport) -> None:
    """Leave what comes to the kernel for a moment: read at once it costs less, and no line wakes this thread."""
    if isinstance(transport, asyncio.ReadTransport):
        transport.pause_reading()
        await asyncio.sleep(_GATHER_S)
        transport.resume_reading()


async def _close_servers(servers: Sequence[asyncio.Server]) -> None:
    """Accept nothing more; what was just accepted becomes a connection first, which a closed server forgets."""
    loop = asyncio.get_running_loop()
    for listener in [listener for server in servers for listener in server.sockets]:
        loop.remove_reader(listener.fileno())
    for _ in range(3):
        await asyncio.sleep(0)
    for server in servers:
        server.close()


def _open_unix_socket(folder: Path) -> socket.socket:
    """A listening socket at `<data_dir>/intake.sock`; the folder's lock says no other daemon has it."""
    path = folder / "intake.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise UsageError(f"{path}: {error}; a socket path has at most 107 bytes, choose a shorter data_dir") from error
    path.chmod(0o660)
    return listener

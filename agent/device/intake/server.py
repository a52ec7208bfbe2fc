"""Intake server: JSON lines on sockets, answered once per commit, and the daemon's own sources.

A producer that begins with `{"client":"NAME"}` is told how many of its lines are stored, and its line count continues
from there: lines that it repeats after a broken connection are stored once. A name has one connection, the newest one;
lines that an older connection has in flight are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

# Small enough that a producer of noise, two bytes a line, delays the others by a tenth of a second at most.
_READ_BYTES = 1 << 16
# A single line costs twenty times as much as a line among others. Rows wait much longer for a commit anyway.
_SMALL_READ_BYTES, _GATHER_S = _READ_BYTES // 4, 0.002
# A group that is worth a commit waits only while more data keeps arriving.
_QUIET_S = 0.005
_HEARTBEAT_S = 10.0
_HEARTBEAT_TIMEOUT_S = 120.0
# Time that sources have to handle the last commit.
_SHUTDOWN_S = 3.0
# If it is full, a producer that connects with a timeout fails at once.
_BACKLOG = 1024


class Intake:
    """Intake thread with the sockets, the sources and their group commit.

    Under load a second thread writes: half of the time is spent on the disk.
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
        # Latest time of the next commit, on the clock of the loop.
        self._commit_due_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_event: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="intake", daemon=True)

    def start(self) -> None:
        """Listen and run the sources; return once the sockets are open."""
        self._thread.start()
        self._ready.wait(10)

    def is_alive(self, now: ClockReading) -> bool:
        """Return False if the thread is stuck; a commit to a slow card is well within the timeout."""
        return now.boot_s < self._alive_until_s

    def stop(self) -> None:
        """Commit and answer everything that waits, and end the thread."""
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
                host, port = config.parse_loopback(self._conf.intake.tcp)
                try:
                    servers.append(await asyncio.start_server(self._accept, host, port, limit=_READ_BYTES))
                except OSError as error:
                    problem = f"intake.tcp {self._conf.intake.tcp}: {error.strerror}; choose another port"
                    raise UsageError(problem) from error
            tasks = [asyncio.create_task(self._run_source(source)) for source in self._sources]
            tasks.append(asyncio.create_task(self._run_heartbeat()))
            self._ready.set()
            await self._stop_event.wait()
        finally:
            # A closed server would drop connections that were just accepted: they are set up first.
            loop = asyncio.get_running_loop()
            for listener in [listener for server in servers for listener in server.sockets]:
                loop.remove_reader(listener.fileno())
            for _ in range(3):
                await asyncio.sleep(0)
            for server in servers:
                server.close()
        for task in tasks:
            task.cancel()
        self._commit()
        # Also writers whose task has not begun: a cancelled task would never close them.
        for writer in self._open_writers:
            writer.close()
        await asyncio.wait(tasks, timeout=_SHUTDOWN_S)
        self._writer.shutdown()

    async def _listen_unix(self) -> asyncio.Server:
        # The folder's lock excludes another daemon.
        path = self._conf.data_dir / "intake.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
        except OSError as error:
            listener.close()
            raise UsageError(f"{path}: {error}; a socket path has at most 107 bytes; shorten data_dir") from error
        path.chmod(0o660)
        return await asyncio.start_unix_server(self._accept, sock=listener, limit=_READ_BYTES, backlog=_BACKLOG)

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
        """Stop committing and answering: it is unknown what reached the disk, and a later answer would count it."""
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
        # Recorded times may be before those of an earlier file or session: the source has its own order.
        now = self._now()
        validated = validate_columns(raw, self._conf.streams[stream], now.wall_us, None)
        producer = object()
        future: asyncio.Future[CommitOutcome] = asyncio.get_running_loop().create_future()
        self._answer_callbacks[producer] = lambda outcome: None if future.done() else future.set_result(outcome)
        numbers = list(lines) or list(range(1, raw.n + 1))
        self._group_commit.add_rows(
            producer, stream, validated, [n for i, n in enumerate(numbers) if i not in validated.rejected], now
        )
        for index, reason in validated.rejected.items():
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
                size = producer.feed(data, self._now())
                self._schedule_commit()
                # Only a producer that does not read its answers waits here.
                await writer.drain()
                # Short lines gather in the kernel's buffer for a moment: one read costs less, and no single line wakes
                # this thread. Part of a long line would gain nothing.
                if size < _SMALL_READ_BYTES and isinstance(writer.transport, asyncio.ReadTransport):
                    writer.transport.pause_reading()
                    await asyncio.sleep(_GATHER_S)
                    writer.transport.resume_reading()
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
        """Retire an older connection of `name`, and return how many of its lines are stored."""
        older = self._connections_by_client.get(name)
        self._connections_by_client[name] = producer
        if older is not None:
            older.retire()
        self._commit()
        if self._has_failed:
            raise StorageError("the store failed; the position of this client is unknown")
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
            due_s = self._commit_due_s
            if self._group_commit.is_worth_committing:
                due_s = min(due_s, now + _QUIET_S)
            self._timer = loop.call_at(due_s, self._commit)

    def _commit(self) -> None:
        """Write and answer everything that has arrived, unless the store has failed."""
        self._cancel_timer()
        self._answer_background_write()
        if self._group_commit and not self._has_failed:
            self._commit_and_answer(lambda: self._group_commit.commit(self._now()))

    def _commit_in_background(self) -> None:
        """Write in the second thread while more is read, after waiting for its current write."""
        self._cancel_timer()
        self._answer_background_write()
        if self._has_failed:
            return
        write = self._writer.submit(self._group_commit.write, self._group_commit.drain(), self._now())
        self._background_write, loop = write, asyncio.get_running_loop()

        def notify(_: object) -> None:
            # The loop may have waited for the write and be closed by now.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._answer_background_write, write)

        write.add_done_callback(notify)

    def _answer_background_write(self, expected: object = None) -> None:
        """Wait for the second thread's write and answer; if `expected` is given, only for that write."""
        write = self._background_write
        if write is not None and expected in (None, write):
            self._background_write = None
            self._commit_and_answer(write.result)

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

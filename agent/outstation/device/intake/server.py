"""Intake server: JSON lines on sockets, answered once per commit, and the daemon's own sources.

A producer that begins with `{"client":"NAME"}` gets the number of its stored lines, and its line count continues
from there: lines that it repeats after a broken connection are stored once. A name has one connection, the newest one
of the user that holds it; lines that an older connection has in flight are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType

from outstation.device import config
from outstation.device.intake.connection import ProducerConnection, client_source, make_buffer
from outstation.device.intake.group_commit import CommitOutcome, GroupCommit, SourcePosition
from outstation.device.intake.listener import (
    ConnectionTable,
    Listener,
    Refusal,
    UnixListener,
    User,
    bind_tcp,
    load_token,
    raise_descriptor_limit,
)
from outstation.device.intake.protocol import LineParser
from outstation.device.intake.source import Source
from outstation.device.store.rows import RawColumns, validate_columns
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageError, StorageFull
from outstation.ml.performance.labels import LabelTarget

# A group that is worth a commit waits only while more data keeps arriving.
_QUIET_S = 0.005
_HEARTBEAT_S = 10.0
_WATCH_S = 1.0
_HEARTBEAT_TIMEOUT_S = 120.0
# Time that sources have to handle the last commit.
_SHUTDOWN_S = 3.0
# Greetings and ends are answered by a commit of their own this many times, and once more for each usual commit: a
# program that only connects and leaves costs no more flash than one that sends a row now and then.
_MAX_EARLY_COMMITS = 8


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
        label_key: bytes | None = None,
    ) -> None:
        self._conf, self._store, self._sources, self._now = conf, store, sources, now
        self._on_committed, self._on_failed = on_committed, on_failed
        self.group_commit = GroupCommit(store, conf.streams, label_targets, label_key)
        self._buffer = make_buffer(self.group_commit)
        self._answer_callbacks: dict[object, Callable[[CommitOutcome], None]] = {}
        self._connections_by_client: dict[str, ProducerConnection] = {}
        self._table = ConnectionTable(raise_descriptor_limit())
        self._open_connections: set[socket.socket | asyncio.Transport] = set()
        self._early_commits, self._early_counted_s = float(_MAX_EARLY_COMMITS), 0.0
        self._commit_waiters: list[asyncio.Future[None]] = []
        self._serve_tasks: set[asyncio.Task[None]] = set()
        self._has_failed = self._is_stopping = False
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
        listeners: list[Listener | UnixListener] = []
        try:
            listeners.append(unix := UnixListener(self._conf.data_dir / "intake.sock", self._listen_unix))
            if (tcp := self._conf.intake.tcp) is not None:
                host, port = config.parse_loopback(tcp)
                token = load_token(self._conf.intake_token_file)
                listeners += [self._listen(bound, token) for bound in bind_tcp(tcp, host, port)]
            tasks = [asyncio.create_task(self._run_source(source)) for source in self._sources]
            tasks.append(asyncio.create_task(self._run_heartbeat()))
            tasks.append(asyncio.create_task(self._watch_paths(unix)))
            self._ready.set()
            await self._stop_event.wait()
        finally:
            for listener in listeners:
                listener.close()
        self._is_stopping = True
        for task in tasks:
            task.cancel()
        self._commit()
        # Also connections whose task has not begun: a cancelled task would never close them.
        for connection in self._open_connections:
            connection.close()
        await asyncio.wait(tasks, timeout=_SHUTDOWN_S)
        self._writer.shutdown()

    def _listen_unix(self, bound: socket.socket) -> Listener:
        return self._listen(bound, None)

    def _listen(self, bound: socket.socket, token: str | None) -> Listener:
        return Listener(
            bound,
            lambda connected, user: self._accept(connected, user, token),
            lambda: self.group_commit.count("connections delayed"),
        )

    async def _run_heartbeat(self) -> None:
        while True:
            self._alive_until_s = self._now().boot_s + _HEARTBEAT_TIMEOUT_S
            self._table.close_idle(asyncio.get_running_loop().time())
            await asyncio.sleep(_HEARTBEAT_S)

    async def _watch_paths(self, unix: UnixListener) -> None:
        """Bind the socket again if its file is gone, and fail if the data folder or a file of the store is."""
        while not self._has_failed:
            await asyncio.sleep(_WATCH_S)
            try:
                self._store.require_in_place()
            except StorageError as error:
                self._fail(error)
            else:
                unix.restore()

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
        self._wake_waiters()
        self._on_failed(error)

    def _wake_waiters(self) -> None:
        waiters, self._commit_waiters = self._commit_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _submit_rows(
        self,
        stream: str,
        raw: RawColumns,
        position: SourcePosition | None,
        lines: Sequence[int] = (),
        refused: Mapping[int, str] = MappingProxyType({}),
        *,
        is_stalled: bool = False,
    ) -> CommitOutcome:
        # Recorded times may be before those of an earlier file or session: the source has its own order.
        now = self._now()
        show_values = self._conf.privacy.values_in_logs
        validated = validate_columns(raw, self._conf.streams[stream], now.wall_us, None, show_values=show_values)
        producer = object()
        future: asyncio.Future[CommitOutcome] = asyncio.get_running_loop().create_future()
        self._answer_callbacks[producer] = lambda outcome: None if future.done() else future.set_result(outcome)
        numbers = list(lines) or list(range(1, raw.n + 1))
        self.group_commit.add_rows(
            *(producer, stream, validated, [n for i, n in enumerate(numbers) if i not in validated.rejected], now),
            is_recording=self._conf.streams[stream].source.reads_recordings,
        )
        for index, reason in validated.rejected.items():
            self.group_commit.reject(producer, numbers[index], reason)
        for number, reason in refused.items():
            self.group_commit.reject(producer, number, reason)
        self.group_commit.advance(producer, max([*numbers[-1:], *refused]), position)
        self._schedule_commit(at_once=is_stalled)
        return await future

    def _accept(self, connected: socket.socket, user: User, token: str | None) -> None:
        self._open_connections.add(connected)
        task = asyncio.get_running_loop().create_task(self._serve(connected, user, token))
        self._serve_tasks.add(task)
        task.add_done_callback(self._serve_tasks.discard)

    async def _serve(self, connected: socket.socket, user: User, token: str | None) -> None:
        loop = asyncio.get_running_loop()
        producer = ProducerConnection(
            self.group_commit,
            LineParser(self._conf.streams, show_values=self._conf.privacy.values_in_logs),
            self._greet,
            self._handle_received,
            self._now,
            self._buffer,
            user,
            token,
        )
        await loop.connect_accepted_socket(lambda: producer, connected)
        self._open_connections.discard(connected)
        self._open_connections.add(producer.transport)
        self._answer_callbacks[producer] = producer.answer
        try:
            self._table.add(producer, loop.time())
            await producer.receive()
            await producer.end()
            await self._commit_early(lambda: producer.awaits_answer)
            producer.report_cut_off_line()
        except Refusal as refusal:
            producer.refuse(refusal)
        except ConnectionError:
            producer.lose()
            self._schedule_commit()
        except StorageError as error:
            self._fail(error)
        finally:
            self._answer_callbacks.pop(producer, None)
            if producer.name is not None and self._connections_by_client.get(producer.name) is producer:
                del self._connections_by_client[producer.name]
            try:
                await producer.close()
            finally:
                # Its descriptor and unread answers count until they are gone.
                self._table.remove(producer)
                self._open_connections.discard(producer.transport)

    def _handle_received(self, producer: ProducerConnection) -> None:
        self._schedule_commit()
        self._table.limit_memory(producer)

    async def _greet(self, producer: ProducerConnection, name: str, forget: bool) -> int:
        """Retire an older connection of `name`, and return how many of its lines are stored. Raises Refusal.

        `forget`: its next line is the first one again, unless the store is full.
        """
        older = self._connections_by_client.get(name)
        if older is not None and older.user != producer.user:
            raise Refusal(f"client name {name!r} is in use by another user; choose another name")
        self._connections_by_client[name] = producer
        if older is not None:
            older.retire()
        await self._commit_early(
            lambda: self._background_write is not None or self.group_commit.holds_position(client_source(name), name)
        )
        if self._has_failed:
            raise StorageError("the store failed; the position of this client is unknown")
        if forget:
            with contextlib.suppress(StorageFull), self._store.transaction() as tx:
                tx.delete_source_position(client_source(name), name)
        return self._store.source_position(client_source(name), name)

    async def _commit_early(self, is_pending: Callable[[], bool]) -> None:
        """Commit what is pending at once if that was not done often of late, else wait for the next commit."""
        loop = asyncio.get_running_loop()
        while is_pending() and not self._has_failed:
            interval_s = max(self._conf.buffer.commit_every, _QUIET_S)
            earned = (loop.time() - self._early_counted_s) / interval_s
            self._early_commits = min(_MAX_EARLY_COMMITS, self._early_commits + earned)
            self._early_counted_s = loop.time()
            if self._early_commits >= 1:
                self._early_commits -= 1
                self._commit()
            else:
                self._schedule_commit()
                self._commit_waiters.append(waiter := loop.create_future())
                await waiter

    def _schedule_commit(self, *, at_once: bool = False) -> None:
        # Once stopping, sources hand over their last rows.
        at_once = at_once or self._is_stopping
        if self.group_commit.is_full:
            self._commit_in_background()
        elif self.group_commit and (self._timer is None or at_once or self.group_commit.is_worth_committing):
            loop = asyncio.get_running_loop()
            now = loop.time()
            if at_once:
                self._commit_due_s = now
            elif self._timer is None:
                self._commit_due_s = now + self._conf.buffer.commit_every
            if self._timer is not None:
                self._timer.cancel()
            due_s = self._commit_due_s
            if self.group_commit.is_worth_committing:
                due_s = min(due_s, now + _QUIET_S)
            self._timer = loop.call_at(due_s, self._commit)

    def _commit(self) -> None:
        """Write and answer everything that has arrived, unless the store has failed."""
        self._cancel_timer()
        self._answer_background_write()
        if self.group_commit and not self._has_failed:
            self._commit_and_answer(lambda: self.group_commit.commit(self._now()))

    def _commit_in_background(self) -> None:
        """Write in the second thread while more is read, after waiting for its current write."""
        self._cancel_timer()
        self._answer_background_write()
        if self._has_failed:
            return
        write = self._writer.submit(self.group_commit.write, self.group_commit.drain(), self._now())
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
        self._wake_waiters()
        self._on_committed()

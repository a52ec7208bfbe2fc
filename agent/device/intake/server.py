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
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from agent import config
from agent.clock import Now
from agent.device.intake.connection import CLIENTS, Producer
from agent.device.intake.group_commit import Group, Mark, Outcome
from agent.device.intake.labels import Asked
from agent.device.intake.protocol import Reader
from agent.device.store.rows import Raw, check
from agent.device.store.store import Store
from agent.errors import StorageError, UsageError

log = logging.getLogger("outstation.intake")

# So little that a producer of noise, two bytes a line, holds up the others for a tenth of a second at most.
_READ = 1 << 16
# A line at a time costs twenty times what it costs among others. Rows wait for a commit anyway, for much longer.
_LITTLE, _GATHER_S = _READ // 4, 0.002
# What is worth a commit of its own waits only as long as more keeps coming.
_QUIET_S = 0.005
_PULSE_S = 10.0
_SIGN_OF_LIFE_S = 120.0
# Sources may do so much longer with what was committed last.
_END_S = 3.0
# Where it is used up, a producer that connects with a time limit is turned away at once.
_BACKLOG = 1024


class Offer(Protocol):
    def __call__(
        self, stream: str, raw: Raw, mark: Mark | None, lines: Sequence[int] = (), refused: Mapping[int, str] = ...
    ) -> Awaitable[Outcome]:
        """Hand over rows; the outcome comes after their commit. Raises Rejected where none can be taken.

        `mark`: how far its source has got then, where it comes back to that; `refused`: lines that hold none, with the
        reason.
        """
        ...


class Source(Protocol):
    """Something that makes rows for one stream, run beside the socket."""

    async def run(self, offer: Offer) -> None: ...


class Intake:
    """One thread with the sockets, the sources and the group they share.

    A second one writes while much comes: half of the time goes into the disk.
    """

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        sources: Sequence[Source],
        now: Callable[[], Now],
        committed: Callable[[], None],
        failed: Callable[[Exception], None],
        asked: Callable[[], Mapping[str, Asked]] = dict,
    ) -> None:
        self._conf, self._store, self._sources, self._now = conf, store, sources, now
        self._committed, self._failed = committed, failed
        self._group = Group(store, conf.streams, asked)
        self._answers: dict[object, Callable[[Outcome], None]] = {}
        self._named: dict[str, Producer] = {}
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._broken = False
        self._alive_until_s = now().boot_s + _SIGN_OF_LIFE_S
        self._timer: asyncio.TimerHandle | None = None
        self._writer = ThreadPoolExecutor(1, "intake-writes")
        self._writing: Future[dict[Hashable, Outcome]] | None = None
        # By then, on the clock of the loop, what waits is committed, whatever comes.
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="intake", daemon=True)

    def start(self) -> None:
        """Listen and run the sources; returns once the sockets are open."""
        self._thread.start()
        self._ready.wait(10)

    def alive(self, now: Now) -> bool:
        """Whether the thread got round lately; one commit to a slow card is well within."""
        return now.boot_s < self._alive_until_s

    def stop(self) -> None:
        """Commit what waits, answer, and end."""
        if self._loop is not None and self._ending is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(5)

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:
            self._failed(error)
        finally:
            self._ready.set()

    async def _run(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        servers: list[asyncio.Server] = []
        try:
            servers.append(await self._listen_here())
            if self._conf.intake.tcp:
                servers.append(await self._listen(self._conf.intake.tcp))
            tasks = [asyncio.create_task(self._run_source(source)) for source in self._sources]
            tasks.append(asyncio.create_task(self._pulse()))
            self._ready.set()
            await self._ending.wait()
        finally:
            await _close(servers)
        for task in tasks:
            task.cancel()
        self._commit()
        # Also those whose task has not begun: cancelled now, it would never close them.
        for writer in self._open:
            writer.close()
        await asyncio.wait(tasks, timeout=_END_S)
        self._writer.shutdown()

    async def _listen_here(self) -> asyncio.Server:
        listener = _unix_socket(self._conf.data_dir)
        return await asyncio.start_unix_server(self._accept, sock=listener, limit=_READ, backlog=_BACKLOG)

    async def _listen(self, address: str) -> asyncio.Server:
        host, port = config.loopback(address)
        try:
            return await asyncio.start_server(self._accept, host, port, limit=_READ)
        except OSError as error:
            raise UsageError(f"intake.tcp {address}: {error.strerror}; choose another port") from error

    async def _pulse(self) -> None:
        while True:
            self._alive_until_s = self._now().boot_s + _SIGN_OF_LIFE_S
            await asyncio.sleep(_PULSE_S)

    async def _run_source(self, source: Source) -> None:
        try:
            await source.run(self._offer)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Nobody knows what reached the disk. No answer and no further commit: it could count lines lost before it."""
        self._broken = True
        self._failed(error)

    async def _offer(
        self,
        stream: str,
        raw: Raw,
        mark: Mark | None,
        lines: Sequence[int] = (),
        refused: Mapping[int, str] = MappingProxyType({}),
    ) -> Outcome:
        # Recorded times may lie before the last ones of an earlier file or session: the source has its own order.
        now = self._now()
        checked = check(raw, self._conf.streams[stream], now.wall_us, None)
        producer = object()
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._answers[producer] = lambda outcome: None if future.done() else future.set_result(outcome)
        numbers = list(lines) or list(range(1, raw.n + 1))
        self._group.add(producer, stream, checked, [n for i, n in enumerate(numbers) if i not in checked.bad], now)
        for index, reason in checked.bad.items():
            self._group.reject(producer, numbers[index], reason)
        for number, reason in refused.items():
            self._group.reject(producer, number, reason)
        self._group.reach(producer, max([*numbers[-1:], *refused]), mark)
        self._commit_soon()
        return await future

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        if self._ending is None or self._ending.is_set():
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        producer = Producer(self._group, Reader(self._conf.streams), self._greet, writer)
        self._answers[producer] = producer.answer
        try:
            while data := await reader.read(_READ):
                fed = producer.feed(data, self._now())
                self._commit_soon()
                # A producer that does not read its answers waits here, and only that producer.
                await writer.drain()
                # Part of a long line is none of many short ones: to wait would only keep its producer waiting.
                if fed < _LITTLE:
                    await _gather(writer.transport)
            producer.end(self._now())
            self._commit()
        except ConnectionError:
            self._commit()
        except StorageError as error:
            self._fail(error)
        finally:
            self._answers.pop(producer, None)
            if producer.name is not None and self._named.get(producer.name) is producer:
                del self._named[producer.name]
            self._open.discard(writer)
            writer.close()

    def _greet(self, producer: Producer, name: str) -> int:
        """How many lines of `name` are safe, with what its older connection had sent so far; that one is done for."""
        older = self._named.get(name)
        self._named[name] = producer
        if older is not None:
            older.retire()
        self._commit()
        if self._broken:
            raise StorageError("the store failed; how far this client got cannot be told")
        return self._store.mark(CLIENTS, name)

    def _commit_soon(self) -> None:
        if self._group.is_full:
            self._commit_beside()
        elif self._group and (self._timer is None or self._group.is_worth_it):
            loop = asyncio.get_running_loop()
            now = loop.time()
            if self._timer is None:
                self._due = now + self._conf.buffer.commit_every
            else:
                self._timer.cancel()
            at = min(self._due, now + _QUIET_S) if self._group.is_worth_it else self._due
            self._timer = loop.call_at(at, self._commit)

    def _commit(self) -> None:
        """All that came is on the disk and answered afterwards, unless the store is broken."""
        self._cancel_timer()
        self._answer_written()
        if self._group and not self._broken:
            self._answer(lambda: self._group.commit(self._now()))

    def _commit_beside(self) -> None:
        """Write what came while more is read; waits for what is being written."""
        self._cancel_timer()
        self._answer_written()
        if self._broken:
            return
        writing = self._writer.submit(self._group.write, self._group.take(), self._now())
        self._writing, loop = writing, asyncio.get_running_loop()

        def tell(_: object) -> None:
            # The loop may have waited for it and be closed by now.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._answer_written, writing)

        writing.add_done_callback(tell)

    def _answer_written(self, which: object = None) -> None:
        """Answer for what the second thread writes, once it is done; only if it is `which`, where that is given."""
        writing = self._writing
        if writing is not None and which in (None, writing):
            self._writing = None
            self._answer(writing.result)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answer(self, commit: Callable[[], Mapping[Hashable, Outcome]]) -> None:
        try:
            outcomes = commit()
        except Exception as error:
            self._fail(error)
            return
        for producer, outcome in outcomes.items():
            answer = self._answers.get(producer)
            if answer is not None:
                answer(outcome)
            if not isinstance(producer, Producer):
                self._answers.pop(producer, None)
        self._committed()


async def _gather(transport: asyncio.BaseTransport) -> None:
    """Leave what comes to the kernel for a moment: read at once it costs less, and no line wakes this thread."""
    if isinstance(transport, asyncio.ReadTransport):
        transport.pause_reading()
        await asyncio.sleep(_GATHER_S)
        transport.resume_reading()


async def _close(servers: Sequence[asyncio.Server]) -> None:
    """Accept nothing more; what was just accepted becomes a connection first, which a closed server forgets."""
    loop = asyncio.get_running_loop()
    for listener in [listener for server in servers for listener in server.sockets]:
        loop.remove_reader(listener.fileno())
    for _ in range(3):
        await asyncio.sleep(0)
    for server in servers:
        server.close()


def _unix_socket(folder: Path) -> socket.socket:
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

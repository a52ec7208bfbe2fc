"""The way in: JSON lines on a socket, answered once per commit, and the sources this device runs itself.

A producer that begins with `{"client":"NAME"}` is told how many of its lines are safe already, and its line count
goes on from there: lines it sends again after a broken connection are taken once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent import config
from agent.clock import Now
from agent.device.group import FULL_ROWS, Group, Mark, Outcome
from agent.device.parse import MAX_LINE, Reader
from agent.device.rows import Raw, check
from agent.device.store import Store
from agent.errors import ConfigError, StorageError, UsageError

log = logging.getLogger("outstation.intake")

_READ = 1 << 18
CLIENTS = "client"


class _Hello(msgspec.Struct, forbid_unknown_fields=True):
    client: str


class Offer(Protocol):
    def __call__(self, stream: str, raw: Raw, mark: Mark, lines: Sequence[int] = ()) -> Awaitable[Outcome]:
        """Hand over rows; the outcome comes after their commit. Raises Rejected where none can be taken."""
        ...


class Source(Protocol):
    """Something that makes rows for one stream, run beside the socket."""

    async def run(self, offer: Offer) -> None: ...


class Intake:
    """One thread with the sockets, the sources and the group they share."""

    def __init__(
        self,
        conf: config.Config,
        store: Store,
        sources: Sequence[Source],
        now: Callable[[], Now],
        committed: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._conf, self._store, self._sources, self._now = conf, store, sources, now
        self._committed, self._failed = committed, failed
        self._group = Group(store, conf.streams)
        self._answers: dict[object, Callable[[Outcome], None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="intake", daemon=True)

    def start(self) -> None:
        """Listen and run the sources; returns once the sockets are open."""
        self._thread.start()
        self._ready.wait(10)

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
        servers = [await asyncio.start_unix_server(self._serve, sock=_unix_socket(self._conf.data_dir), limit=_READ)]
        if self._conf.intake.tcp:
            host, port = _loopback(self._conf.intake.tcp)
            servers.append(await asyncio.start_server(self._serve, host, port, limit=_READ))
        tasks = [asyncio.create_task(self._run_source(source)) for source in self._sources]
        self._ready.set()
        await self._ending.wait()
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        self._commit()
        await asyncio.sleep(0)

    async def _run_source(self, source: Source) -> None:
        try:
            await source.run(self._offer)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(error)

    async def _offer(self, stream: str, raw: Raw, mark: Mark, lines: Sequence[int] = ()) -> Outcome:
        # Recorded times may lie before the last ones of an earlier file or session: the source has its own order.
        checked = check(raw, self._conf.streams[stream], self._now().wall_us, None)
        producer = object()
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._answers[producer] = lambda outcome: None if future.done() else future.set_result(outcome)
        numbers = list(lines) or list(range(1, raw.n + 1))
        self._group.add(producer, stream, checked, [n for i, n in enumerate(numbers) if i not in checked.bad])
        for index, reason in checked.bad.items():
            self._group.reject(producer, numbers[index], reason)
        self._group.reach(producer, numbers[-1], mark)
        self._commit_soon()
        return await future

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        producer = _Producer(self._group, Reader(self._conf.streams), self._store, writer)
        self._answers[producer] = producer.answer
        try:
            while data := await reader.read(_READ):
                producer.feed(data, self._now())
                self._commit_soon()
                await writer.drain()
            producer.end(self._now())
            self._commit()
        except (ConnectionError, asyncio.IncompleteReadError):
            self._commit()
        except StorageError as error:
            self._failed(error)
        finally:
            self._answers.pop(producer, None)
            writer.close()

    def _commit_soon(self) -> None:
        if self._group.rows >= FULL_ROWS:
            self._commit()
        elif self._group and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._conf.buffer.commit_every, self._commit)

    def _commit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._group:
            return
        try:
            outcomes = self._group.commit(self._now())
        except StorageError as error:
            # Nobody knows what reached the disk: no answer, a fresh start reads what is there.
            self._failed(error)
            return
        for producer, outcome in outcomes.items():
            answer = self._answers.get(producer)
            if answer is not None:
                answer(outcome)
            if not isinstance(producer, _Producer):
                self._answers.pop(producer, None)
        self._committed()


class _Producer:
    """One connection: bytes to lines, lines to rows of the group, outcomes to answer lines."""

    def __init__(self, group: Group, reader: Reader, store: Store, writer: asyncio.StreamWriter) -> None:
        self._group, self._reader, self._store, self._writer = group, reader, store, writer
        self._rest = b""
        self._skipping = 0
        self._lines = 0
        self._started = False
        self._name: str | None = None

    def feed(self, data: bytes, now: Now) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._skipping and lines:
            self._reject_long(self._skipping + len(lines.pop(0)))
            self._skipping = 0
        if len(self._rest) > MAX_LINE:
            # Not kept: a line without an end must not fill the memory.
            self._skipping += len(self._rest)
            self._rest = b""
        self._take(lines, now)

    def end(self, now: Now) -> None:
        """The producer has closed its side; a last line may come without a newline."""
        if self._skipping:
            self._reject_long(self._skipping)
        elif self._rest.strip():
            self._take([self._rest], now)

    def answer(self, outcome: Outcome) -> None:
        line = {"through": outcome.through, "accepted": outcome.accepted}
        rejected = [{"line": number, "reason": reason} for number, reason in outcome.rejected]
        self._writer.write(msgspec.json.encode({**line, "rejected": rejected}) + b"\n")

    def _take(self, lines: list[bytes], now: Now) -> None:
        if lines and not self._started:
            self._started = True
            if self._hello(lines[0]):
                lines = lines[1:]
        if not lines:
            return
        first = self._lines + 1
        self._lines += len(lines)
        whole = [(number, line) for number, line in enumerate(lines, first) if line.strip()]
        for run in _runs(whole):
            for taken in self._reader.read([line for _, line in run], run[0][0], now.wall_us):
                for number, reason in taken.bad.items():
                    self._group.reject(self, number, reason)
                if taken.checked is not None:
                    self._group.add(self, taken.stream, taken.checked, taken.lines)
        mark = Mark(CLIENTS, self._name, self._lines) if self._name else None
        self._group.reach(self, self._lines, mark)

    def _hello(self, line: bytes) -> bool:
        try:
            name = msgspec.json.decode(line, type=_Hello).client
        except (msgspec.MsgspecError, ValueError):
            return False
        self._name = name[:64]
        self._lines = self._store.mark(CLIENTS, self._name)
        self.answer(Outcome(self._lines, 0, []))
        return True

    def _reject_long(self, size: int) -> None:
        self._lines += 1
        self._group.reject(self, self._lines, f"line of {size} bytes, the limit is {MAX_LINE}; split it")
        self._group.reach(self, self._lines, Mark(CLIENTS, self._name, self._lines) if self._name else None)


def _runs(lines: list[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    """Lines in runs of consecutive numbers, as empty lines leave them."""
    runs: list[list[tuple[int, bytes]]] = []
    for item in lines:
        if runs and item[0] == runs[-1][-1][0] + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


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


def _loopback(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "::1", "[::1]") or not port.isdigit():
        raise ConfigError("outstation.toml", "intake.tcp", f'{address!r} must be on loopback, as "127.0.0.1:7071"')
    return host.strip("[]"), int(port)

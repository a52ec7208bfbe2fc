"""Sensor program: a child process in a session of its own, whose output is read in lines of bounded length.

The program cannot gain privilege, gets no variable of the daemon's environment that it does not need, and ends with all
processes of its session.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from outstation.ml.model.sandbox.child_process import describe_exit

MAX_LINE_BYTES = 64 << 10
# Between SIGTERM and SIGKILL; a stop of the daemon waits for it.
_END_S = 1.0
_LAST_ERRORS_S, _POLL_S, _KILLED_S = 0.2, 0.02, 0.5
_READ_BYTES = 64 << 10
_LAUNCHER = Path(__file__).with_name("program_launcher.py")
# Nothing with which it could speak for the service: systemd's socket and credentials stay with the daemon.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")


class LongLine(ValueError):
    """A line without an end within the limit."""


class Program:
    """Running program; its lines are read by `read_lines`, its errors go to `on_error_line`. Close it."""

    def __init__(self, command: Sequence[str], folder: Path, on_error_line: Callable[[str], None]) -> None:
        """Start `command` in `folder`, from the event loop that reads it. Raises OSError."""
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            # Python programs would hold their lines back until 8 KiB are full.
            env=environment | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._on_error_line = on_error_line
        self._errors: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._pipes: list[asyncio.BaseTransport | IO[bytes]] = [
            pipe for pipe in (self._process.stdout, self._process.stderr) if pipe is not None
        ]

    async def read_lines(self, timeout_s: float | None) -> AsyncIterator[list[bytes | LongLine]]:
        """Yield the lines that have come, at least one, until the program closes its output.

        Raises TimeoutError if none comes within `timeout_s`. Who does not ask for more holds the program back.
        """
        output, errors = await self._open_readers()
        self._errors = asyncio.create_task(self._read_errors(errors))
        lines = _LineSplitter()
        while True:
            async with asyncio.timeout(timeout_s):
                while not (complete := lines.split(chunk := await output.read(_READ_BYTES))) and chunk:
                    pass
            # A signal may have cut off the last line, and a part of a number is another number.
            if complete and (chunk or not self._is_stopped):
                yield complete
            if not chunk:
                return

    async def _open_readers(self) -> list[asyncio.StreamReader]:
        """Return readers of output and errors, which hold at most a few chunks."""
        loop, readers = asyncio.get_running_loop(), []
        for at, pipe in enumerate(self._pipes):
            reader = asyncio.StreamReader(limit=_READ_BYTES)
            self._pipes[at], _ = await loop.connect_read_pipe(partial(asyncio.StreamReaderProtocol, reader), pipe)
            readers.append(reader)
        return readers

    async def _read_errors(self, errors: asyncio.StreamReader) -> None:
        lines = _LineSplitter()
        while True:
            chunk = await errors.read(_READ_BYTES)
            for line in lines.split(chunk):
                text = f"({line})" if isinstance(line, LongLine) else line.decode("utf-8", "backslashreplace")
                self._on_error_line(text)
            if not chunk:
                return

    async def stop(self) -> None:
        """End all processes of the session; what they have printed can still be read."""
        self._is_stopped = True
        self._signal_group(signal.SIGTERM)
        await self._wait_for_end()
        self._signal_group(signal.SIGKILL)

    async def close(self) -> str:
        """End all processes of the session, and return how the program ended, "" for success."""
        try:
            self._signal_group(signal.SIGTERM)
            await self._wait_for_end()
            if self._errors is not None:
                # Its last errors, unless a process that it left behind keeps the pipe open.
                await asyncio.wait([self._errors], timeout=_LAST_ERRORS_S)
        finally:
            # Before its exit code is collected: until then no other process gets the number of its group.
            self._signal_group(signal.SIGKILL)
            for pipe in self._pipes:
                pipe.close()
            if self._errors is not None:
                self._errors.cancel()
            # It ends at once, and also where the daemon stops meanwhile; so the loop may wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILLED_S)
        code = self._process.returncode
        if code is None:
            return "no end: it waits for the kernel, which waits for a device"
        return describe_exit(code) if code else ""

    async def _wait_for_end(self) -> None:
        """Wait a second for the end of the program."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                while not self._has_ended():
                    await asyncio.sleep(_POLL_S)

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class _LineSplitter:
    """Lines of chunks; of a line that is too long one LongLine is left."""

    def __init__(self) -> None:
        self._pending = b""
        self._is_skipping = False

    def split(self, chunk: bytes) -> list[bytes | LongLine]:
        """Return the lines that `chunk` completes; an empty one, the end, completes the last."""
        *complete, self._pending = (self._pending + chunk).split(b"\n")
        if not chunk:
            complete, self._pending = [*complete, self._pending], b""
        lines: list[bytes | LongLine] = []
        for line in complete:
            if self._is_skipping:
                self._is_skipping = False
            elif len(line) > MAX_LINE_BYTES:
                lines.append(_make_long_line())
            elif line.strip():
                lines.append(line)
        if len(self._pending) > MAX_LINE_BYTES:
            if not self._is_skipping:
                lines.append(_make_long_line())
            self._is_skipping, self._pending = True, b""
        return lines


def _make_long_line() -> LongLine:
    return LongLine(f"a line longer than {MAX_LINE_BYTES} bytes; print a row on each line")

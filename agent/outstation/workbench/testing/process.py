"""Processes of the `outstation` command that a test starts, kills and waits for."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from outstation.workbench.testing.patience import TIMEOUT_S


class MissingProgram(Exception):
    """A program that a test needs is not installed: the pytest plugin skips the test; on CI it fails."""


def find_program(name: str, package: str = "") -> str:
    """Return the path of a program. Raises MissingProgram."""
    # Debian installs daemons where only root's PATH looks.
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise MissingProgram(f"{name} is not installed: apt-get install {package or name}")
    return path


def run_outstation(*arguments: str, timeout_s: float = TIMEOUT_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one `outstation` command to its end."""
    command = [sys.executable, "-m", "outstation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)


class ManagedProcess:
    """A program in a process of its own, which a test ends."""

    _process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self._end(signal.SIGKILL)

    def _end(self, number: int, timeout_s: float = 60.0) -> int | None:
        """Send a signal and return the exit code; kill what runs on after `timeout_s`. None if nothing runs."""
        if self._process is None:
            return None
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout_s)
        finally:
            self._process.kill()
            self._process.wait(60)
            self._process = None


class OutstationProcess(ManagedProcess):
    """An `outstation` command in a process of its own; its output goes to a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self._arguments = arguments
        self.launcher: Sequence[str] = ("-m", "outstation")
        self.prefix: Sequence[str] = ()

    def set_launcher(self, launcher: Sequence[str], prefix: Sequence[str] = ()) -> None:
        """Set the arguments of Python in place of `-m agent`, and the command before Python, from the next start on."""
        self.launcher, self.prefix = launcher, prefix

    def start(self, **environment: str) -> Self:
        command = [*self.prefix, sys.executable, *self.launcher, *self._arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment}
            )
        return self

    def stop(self, timeout_s: float = 60.0) -> int:
        """Send SIGTERM and return the exit code."""
        code = self._end(signal.SIGTERM, timeout_s)
        assert code is not None
        return code

    def wait(self, timeout_s: float) -> int:
        """Wait until the process ends by itself and return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def log_contains(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text(encoding="utf-8", errors="replace")


class NotifySocket:
    """The end of NOTIFY_SOCKET that systemd holds; `messages` are the datagrams received."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while word := self._socket.recv(4096):
            self.messages.append(word.decode())

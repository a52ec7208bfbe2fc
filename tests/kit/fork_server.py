"""Child processes of a device as forks of one process that has imported what they need: 0.02 s instead of 0.3.

A fork is a child of the process that asks for it, with the same arguments, environment, descriptors and signal mask as
if it had been started. Tests marked `exec` start theirs as a device does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODULES = ("agent.model.sandbox.worker", "agent.model.sandbox.probe", "agent.evaluation.latency",
           "agent.device.rollout.fetch.worker")  # fmt: skip
# Tests replace that of `sys`.
_PYTHON = sys.executable
# They import these when they have begun.
_LATER = (
    "agent.model.inference.runtime",
    "agent.model.bundle.golden_vectors",
    "agent.model.sandbox.autotune",
    "psutil",
)
_PR_SET_CHILD_SUBREAPER = 36
# The process that asks may have ended.
_PATIENCE_S = 30.0
_MAX_REQUEST_BYTES, _MAX_DESCRIPTORS = 1 << 17, 16


class ForkServer:
    """Handle of the process that forks; it starts at the first request, and ends with the one that asks."""

    def __init__(self) -> None:
        self.is_used = True
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def fork(
        self, command: Sequence[str], env: Mapping[str, str] | None, cwd: str | None, descriptors: Mapping[int, int]
    ) -> int:
        """Fork a process that runs `command`, and return its id; `descriptors` maps numbers of its own to ours."""
        request = {
            "module": command[3],
            "arguments": command[4:],
            "env": dict(os.environ if env is None else env),
            "cwd": cwd or os.getcwd(),
            "mask": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "parent": os.getpid(),
            "descriptors": list(descriptors),
        }
        set_subreaper = ctypes.CDLL(None).prctl
        with self._lock:
            if self._socket is None:
                self._start()
            assert self._socket is not None
            set_subreaper(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], list(descriptors.values()))
                return int(self._socket.recv(32))
            finally:
                set_subreaper(_PR_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        """End the process, which no fork needs."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait(60)
            self._socket = self._process = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.fork_server", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )


server = ForkServer()


def install() -> None:
    """Have `subprocess` fork the processes of MODULES while `server.is_used`."""
    execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_child(popen: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any,
                      env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
                      c2pread: int, c2pwrite: int, errread: int, errwrite: int, *others: Any) -> None:  # fmt: skip
        if not server.is_used or list(args[:3]) != [_PYTHON, "-P", "-m"] or args[3] not in MODULES:
            execute(popen, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                    shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others)  # fmt: skip
            return
        standard = {number: number if given == -1 else given for number, given in
                    enumerate((p2cread, c2pwrite, errwrite))}  # fmt: skip
        popen.pid = server.fork(args, env, cwd, {**standard, **{number: number for number in pass_fds}})
        popen._child_created = True
        popen._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]


def main() -> None:
    for module in (*MODULES, *_LATER):
        importlib.import_module(module)
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, received, *_ = socket.recv_fds(requests, _MAX_REQUEST_BYTES, _MAX_DESCRIPTORS)
        if not data:
            return
        reading, writing = os.pipe()
        between = os.fork()
        if not between:
            # Its end makes the process that asks the parent of the fork.
            if pid := os.fork():
                os.write(writing, str(pid).encode())
                os._exit(0)
            _run(json.loads(data), received)
        os.close(writing)
        for descriptor in received:
            os.close(descriptor)
        pid = int(os.read(reading, 32))
        os.close(reading)
        os.waitpid(between, 0)
        requests.send(str(pid).encode())


def _run(request: Mapping[str, Any], received: Sequence[int]) -> None:
    """Run the module as its process would, and end."""
    code = 1
    try:
        began_s = time.monotonic()
        while os.getppid() != request["parent"]:
            if time.monotonic() > began_s + _PATIENCE_S:
                os._exit(1)
            time.sleep(0.001)
        _place(request["descriptors"], received)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
        sys.argv[1:] = request["arguments"]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _place(numbers: Sequence[int], received: Sequence[int]) -> None:
    """Give the received descriptors these numbers, and close all others."""
    above = max(*numbers, *received) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in received]
    os.closerange(3, above)
    for number, descriptor in zip(numbers, moved, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    main()

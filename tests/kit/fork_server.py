"""Python processes of tests as forks of one process that has imported the program: 0.02 s instead of 0.3 to 0.5.

A fork is a child of the process that asks for it, with the same arguments, environment, descriptors, limits and signal
mask as if it had been started. A fork that starts processes, such as a daemon, has a fork server of its own: a child.
Tests marked `exec` start theirs as a user or a device does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import outstation
from outstation.foundation.errors import UsageError

ROOT = Path(__file__).parents[2]
MODULES = (
    "outstation.ml.model.sandbox.worker",
    "outstation.ml.model.sandbox.probe",
    "outstation.workbench.evaluation.latency",
    "outstation.device.rollout.fetch.worker",
    "outstation.device.intake.decode_worker",
)
# Tests replace that of `sys`.
_PYTHON = sys.executable
# These run code when they are imported, or are no modules of Python.
_NOT_IMPORTED = {"outstation.__main__", "outstation.ml.kernel.kernel"}
# An interpreter reads these variables before its first module, and so does the C library.
_READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "FAKETIME")
# Commands that start processes of `MODULES` or of the program.
_STARTS = {"run", "batch", "check", "demo", "ingest", "model", "simulate"}
_IMPORTS_AGENT = re.compile(r"^\s*(from|import) outstation\b", re.MULTILINE)
_PR_SET_CHILD_SUBREAPER = 36
# The process that asks may have ended.
_PATIENCE_S = 30.0
_MAX_REQUEST_BYTES, _MAX_DESCRIPTORS = 1 << 17, 16
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def _read_status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _read_rights() -> list[str]:
    """Return users, groups and restrictions of this process, which a fork of another process does not share."""
    status = _read_status()
    return [status[name] for name in ("Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Seccomp")]


class ForkServer:
    """Handle of the process that forks; it starts at the first request, and ends with the one that asks."""

    def __init__(self) -> None:
        self.is_used = True
        self._environment = dict(os.environ)
        self._rights = _read_rights()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def can_fork(self, command: Sequence[Any], env: Mapping[str, str] | None) -> bool:
        """Return true if a fork runs `command` in the environment `env` as a new process would."""
        words = list(command)
        if not all(isinstance(word, str) for word in words) or words[0] != _PYTHON or _read_rights() != self._rights:
            return False
        given = os.environ if env is None else env
        if words[1:3] == ["-P", "-m"]:
            # Their environment is that of the sandbox.
            path = self._environment.get("PYTHONPATH")
            return words[3] in MODULES and given.get("PYTHONPATH", path) == path
        words = _drop_safe_path(words)
        known = words[1:3] in (["-m", "outstation"], ["-m", "scripts.faults.launch"]) or (
            # A fork has imported everything.
            words[1] == "-c" and _IMPORTS_AGENT.search(words[2]) is not None and "sys.modules" not in words[2]
        )
        read = {name for name in {*given, *self._environment} if name.startswith(_READ_AT_START)}
        return known and all(given.get(name) == self._environment.get(name) for name in read)

    def fork(
        self, command: Sequence[str], env: Mapping[str, str] | None, cwd: str | None, descriptors: Mapping[int, int],
        is_new_session: bool = False
    ) -> int:  # fmt: skip
        """Fork a process that runs `command`, and return its id; `descriptors` maps numbers of its own to ours."""
        request = {
            "command": list(command),
            "env": dict(os.environ if env is None else env),
            "cwd": cwd or os.getcwd(),
            "mask": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "parent": os.getpid(),
            "descriptors": list(descriptors),
            "umask": int(_read_status()["Umask"], 8),
            "group": os.getpgrp(),
            "nice": os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
            "limits": [resource.getrlimit(limit) for limit in _LIMITS],
            "is_new_session": is_new_session,
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

    def nest(self) -> None:
        """Have a fork of this process, which has one thread and has changed nothing yet, fork its processes."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._rights = _read_rights()
        if os.fork():
            theirs.close()
            return
        # A signal to the group of the process that asks does not end its fork server.
        os.setpgid(0, 0)
        self._socket.detach()
        null = os.open(os.devnull, os.O_RDWR)
        _place([0, 1, 2, 3], [null, null, null, theirs.detach()])
        with contextlib.suppress(BaseException):
            _serve(socket.socket(fileno=3))
        os._exit(0)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.fork_server", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**self._environment, "OPENBLAS_NUM_THREADS": "1"},
            )


server = ForkServer()


def install() -> None:
    """Have `subprocess` fork the processes of the program while `server.is_used`."""
    execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_child(popen: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any,
                      env: Any, startupinfo: Any, creationflags: Any, shell: Any, *others: Any) -> None:  # fmt: skip
        pipes, (_, gid, gids, uid, umask, is_new_session, group) = others[:6], others[6:]
        has_own_rights = (preexec_fn, gid, gids, uid, umask, group) == (None, None, None, None, -1, -1)
        is_plain = has_own_rights and close_fds and not shell and not isinstance(args, (str, bytes))
        if not (server.is_used and is_plain and server.can_fork(args, env)):
            execute(popen, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                    shell, *others)  # fmt: skip
            return
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        standard = {number: number if given == -1 else given for number, given in
                    enumerate((p2cread, c2pwrite, errwrite))}  # fmt: skip
        descriptors = {**standard, **{number: number for number in pass_fds}}
        popen.pid = server.fork(args, env, None if cwd is None else os.fspath(cwd), descriptors, is_new_session)
        popen._child_created = True
        popen._close_pipe_fds(*pipes)

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]


def main() -> None:
    for module in pkgutil.walk_packages(outstation.__path__, "outstation."):
        # Extras may be missing.
        with contextlib.suppress(ImportError, UsageError):
            if module.name not in _NOT_IMPORTED:
                importlib.import_module(module.name)
    gc.collect()
    # A fork copies each page that a collection writes to.
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))


def _serve(requests: socket.socket) -> None:
    """Fork a process for each request, until the process that asks has ended."""
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
    """Run the command as its process would, and end."""
    code = 1
    try:
        _wait_for_parent(request["parent"])
        _become(request, received)
        if not _STARTS.isdisjoint(request["command"]):
            server.nest()
            install()
        _run_command(request["command"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _wait_for_parent(pid: int) -> None:
    began_s = time.monotonic()
    while os.getppid() != pid:
        if time.monotonic() > began_s + _PATIENCE_S:
            os._exit(1)
        time.sleep(0.001)


def _become(request: Mapping[str, Any], received: Sequence[int]) -> None:
    """Take descriptors, environment, folder, limits and signals as a new process inherits them."""
    if request["is_new_session"]:
        os.setsid()
    elif os.getpgrp() != request["group"]:
        os.setpgid(0, request["group"])
    _place(request["descriptors"], received)
    # An interpreter decides at its start how it writes to a terminal.
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    if os.getpriority(os.PRIO_PROCESS, 0) != request["nice"]:
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    for limit, values in zip(_LIMITS, request["limits"], strict=True):
        if resource.getrlimit(limit) != tuple(values):
            resource.setrlimit(limit, values)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])


def _run_command(command: Sequence[str]) -> None:
    sys.orig_argv[:] = command
    command = _drop_safe_path(command)
    if command[1] == "-c":
        sys.argv[:] = ["-c", *command[3:]]
        sys.path[0] = ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(command[2], "<string>", "exec"), vars(sys.modules["__main__"]))
        return
    module = command.index("-m") + 1
    sys.argv[1:] = command[module + 1 :]
    sys.path[0] = os.getcwd()
    runpy.run_module(command[module], run_name="__main__", alter_sys=True)


def _drop_safe_path(command: Sequence[str]) -> list[str]:
    return [command[0], *command[2:]] if command[1:2] == ["-P"] else list(command)


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

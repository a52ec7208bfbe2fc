"""Ray cluster for tests: a head without processors and nodes of one worker, each a process of its own on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import ROOT

WORKER = "ray::MapWorker"
# Ray and its workers take seconds of CPU time to start, which is scarce on a busy machine.
WITHIN_S = 300.0


class Ray:
    """A running cluster; `env` is the environment of its drivers, which run on the head."""

    def __init__(self, folder: Path) -> None:
        """Start the head. `folder` needs a short path, because it holds sockets."""
        self._folder, self._port = folder, free_port()
        self.env = os.environ | {
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[int, psutil.Process] = {}
        self.head = self._start(
            "head", "--head", f"--port={self._port}", "--num-cpus=0", f"--temp-dir={folder}",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false",
        )  # fmt: skip

    def start_node(self, number: int, prefix: Sequence[str] = ()) -> None:
        """Start node 127.0.0.NUMBER with one worker; `prefix` is a command that runs it."""
        address = [f"--address=127.0.0.1:{self._port}", f"--node-ip-address=127.0.0.{number}"]
        self.nodes[number] = self._start(f"node-{number}", *address, "--num-cpus=1", prefix=prefix)

    def kill_node(self, number: int) -> None:
        """Kill all processes of a node, as a power cut does."""
        _kill(self.nodes.pop(number))

    def kill_head(self) -> None:
        _kill(self.head)

    def close(self) -> None:
        # Killed, because a clean shutdown takes time and nothing is needed any more.
        for process in (self.head, *self.nodes.values()):
            _kill(process)
        for started in self._started:
            started.wait()

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        """Start `outstation model …` as a process."""
        command = [sys.executable, "-m", "outstation", "model", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def begin_run(self, bundle: Path, data: Path, out: Path, *options: str) -> subprocess.Popen[str]:
        return self.begin("run", bundle, data, "-o", out, "--engine", "ray", "--json", *options)

    def run(self, bundle: Path, data: Path, out: Path, *options: str) -> tuple[int, Any]:
        """Run a command, and return (exit code, document)."""
        return ended(self.begin_run(bundle, data, out, *options))

    def command(self, *arguments: object) -> tuple[int, Any]:
        return ended(self.begin(*arguments))

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes of all nodes."""
        return [worker for node in self.nodes for worker in self.workers_of(node)]

    def workers_of(self, number: int) -> list[psutil.Process]:
        children = self.nodes[number].children(recursive=True)
        return [process for process in children if titled(process).startswith(WORKER)]

    def writers(self, folder: Path) -> dict[int, psutil.Process]:
        """Return, by node, the worker that writes a file of `folder`."""
        return {
            node: worker
            for node in self.nodes
            for worker in self.workers_of(node)
            if any(Path(path).parent == folder and path.endswith(".part") for path in opened(worker))
        }

    def _start(self, name: str, *options: str, prefix: Sequence[str] = ()) -> psutil.Process:
        command = [*prefix, str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += ["--num-gpus=0", "--object-store-memory=100000000", *options]
        path = self._folder / f"{name}-{len(self._started)}.log"
        with path.open("w") as log:
            started = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        self._started.append(started)
        wait_until(f"{name} of Ray", lambda: "Ray runtime started" in path.read_text(), timeout_s=WITHIN_S)
        return psutil.Process(started.pid)


def opened(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except psutil.Error:
        return []


def ended(process: subprocess.Popen[str], within_s: float = WITHIN_S) -> tuple[int, Any]:
    try:
        output, problem = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, problem = process.communicate()
        raise AssertionError(f"not done within {within_s:g} s: {output}{problem}") from None
    return process.returncode, json.loads(output) if output else problem


def titled(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(root: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def cluster(folder: Path, nodes: Sequence[int] = (2, 3)) -> Iterator[Ray]:
    """Yield a cluster of a head and `nodes`, and end all its processes."""
    with contextlib.closing(Ray(folder)) as ray:
        for number in nodes:
            ray.start_node(number)
        yield ray

"""Local Ray cluster for tests: two workers, no dashboard or usage reports, and an access token."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from agent.testing.broker import free_port
from tests.kit.stations import ROOT, wait_for

WORKER = "ray::MapWorker"
# Ray and its workers take seconds of CPU time to start, which is scarce on a busy machine.
WITHIN_S = 100.0


@dataclass(frozen=True)
class Ray:
    """A running head node; `env` is the environment of its drivers."""

    head: psutil.Process
    env: dict[str, str]

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        """Start `outstation model …` as a process."""
        command = [sys.executable, "-m", "agent", "model", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def begin_run(self, bundle: Path, data: Path, out: Path) -> subprocess.Popen[str]:
        return self.begin("run", bundle, data, "-o", out, "--engine", "ray", "--json")

    def run(self, bundle: Path, data: Path, out: Path) -> tuple[int, Any]:
        """Run a command, and return (exit code, document)."""
        return ended(self.begin_run(bundle, data, out))

    def command(self, *arguments: object) -> tuple[int, Any]:
        return ended(self.begin(*arguments))

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes."""
        return [process for process in self.head.children(recursive=True) if titled(process).startswith(WORKER)]

    def writer(self, out: Path) -> psutil.Process | None:
        """Return the worker that has OUT.part open."""
        part = f"{out}.part"
        for worker in self.workers():
            try:
                if any(file.path == part for file in worker.open_files()):
                    return worker
            except psutil.Error:
                continue
        return None


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


@contextmanager
def local(folder: Path) -> Iterator[Ray]:
    """Yield a local cluster, and end all its processes. `folder` needs a short path, because it holds sockets."""
    port, token = free_port(), secrets.token_hex(32)
    env = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"),
        *("--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000", f"--temp-dir={folder}"),
        *("--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"),
    ]
    with (folder / "head.log").open("w") as log:
        started = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    head = psutil.Process(started.pid)
    try:
        wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), "a head of Ray", WITHIN_S)
        yield Ray(head, env)
    finally:
        # Killed, because a clean shutdown takes time and nothing is needed any more.
        for process in [head, *head.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait()

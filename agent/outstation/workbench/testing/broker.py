"""A real Mosquitto broker on a free loopback port, in its own folder, ended by its process id."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

from outstation.workbench.testing.process import ManagedProcess, find_program

START_TIMEOUT_S = 60.0
# Linux gives outgoing connections ports from 32768 on: one of those could take a broker's port while it is down, and a
# client that tries again and again to reach it could even meet itself there.
PORT_RANGE = range(20_000, 32_000)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    # Not from the seed that a test may have set: tests beside each other would get the same ports.
    dice = random.SystemRandom()
    while True:
        port = dice.choice(PORT_RANGE)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def keep_user_root(conf: Path) -> Path:
    """Let a broker that root starts stay root: the user mosquitto cannot read a test's folder."""
    if os.geteuid() == 0:
        with conf.open("a", encoding="utf-8") as file:
            file.write("user root\n")
    return conf


class MosquittoBroker(ManagedProcess):
    """A broker that can be killed and started again on the same port.

    `extra_conf` is added to its config. `conf` runs a given config file instead, which listens on `port`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        persistence: bool = False,
        extra_conf: str = "",
        conf: Path | None = None,
        port: int | None = None,
    ) -> None:
        self._binary = find_program("mosquitto")
        self.folder = folder / "mosquitto"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.log = self.folder / "log"
        self._conf = conf or self.folder / "mosquitto.conf"
        if conf is None:
            lines = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", "set_tcp_nodelay true"]
            if persistence:
                data = self.folder / "data"
                data.mkdir(exist_ok=True)
                lines += ["persistence true", f"persistence_location {data}/"]
            self._conf.write_text("\n".join([*lines, extra_conf, ""]), encoding="utf-8")
            keep_user_root(self._conf)

    def start(self) -> MosquittoBroker:
        """Start the broker and wait until it accepts connections."""
        with self.log.open("ab") as log:
            command = [self._binary, "-c", str(self._conf)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"mosquitto did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Send SIGTERM: the broker saves its persistent state."""
        self._end(signal.SIGTERM)

    def __enter__(self) -> MosquittoBroker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

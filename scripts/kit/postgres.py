"""PostgreSQL server for tests: a separate cluster in its own folder on a free loopback port."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.process import ManagedProcess, MissingProgram

START_TIMEOUT_S = 60.0
# `initdb` and the server refuse to run as root.
USER = "nobody"


def find_binaries() -> Path | None:
    """Return the folder of the newest installed initdb and server."""
    on_path = shutil.which("initdb")
    places = [Path(on_path).resolve().parent] if on_path else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -int(path.parent.name.split(".")[0]))
    return next((folder for folder in places if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


class PostgresServer(ManagedProcess):
    """A PostgreSQL server with a database per caller; `conf` extends its settings."""

    def __init__(self, folder: Path, *, conf: str = "") -> None:
        binaries = find_binaries()
        if binaries is None or find_spec("psycopg") is None:
            raise MissingProgram("PostgreSQL or psycopg is not installed: scripts/setup system; scripts/setup")
        self._bin = binaries
        self.folder, self.port = folder, free_port()
        self._as_user = ["setpriv", f"--reuid={USER}", "--clear-groups"] if os.geteuid() == 0 else []
        if self._as_user:
            shutil.chown(folder, USER)
        self._data = folder / "data"
        self._databases = 0
        command = [str(self._bin / "initdb"), "-D", str(self._data), "-U", "fleet", "-A", "trust", "-E", "UTF8"]
        command += ["--locale=C.UTF-8", "--no-sync", "-N"]
        made = subprocess.run([*self._as_user, *command], capture_output=True, text=True, cwd="/")
        assert made.returncode == 0, made.stderr
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(f"\nlisten_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n{conf}\n")

    def start(self) -> PostgresServer:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user, str(self._bin / "postgres"), "-D", str(self._data)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/",
            )  # fmt: skip
        import psycopg

        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self._url("postgres")).close()
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"postgres did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server cleanly: all connections end and open data are written."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill the server, as a power cut would, except for the disk."""
        self._end(signal.SIGQUIT)

    def create_database(self) -> str:
        """Create an empty database and return its URL."""
        import psycopg

        self._databases += 1
        name = f"fleet_{os.getpid()}_{self._databases}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def _url(self, name: str) -> str:
        return f"postgresql://fleet@127.0.0.1:{self.port}/{name}"


@contextlib.contextmanager
def run_server(conf: str = "") -> Iterator[PostgresServer]:
    # Not in pytest's own folders, which only root may enter.
    with tempfile.TemporaryDirectory(prefix="pg") as made:
        folder = Path(made) / "cluster"
        Path(made).chmod(0o755)
        folder.mkdir()
        server = PostgresServer(folder, conf=conf)
        try:
            yield server.start()
        finally:
            server.kill()


# Commits need no durability, because no test cuts the power.
FAST_SETTINGS = "fsync = off\nfull_page_writes = off\nshared_buffers = 32MB\nmax_connections = 40\n"

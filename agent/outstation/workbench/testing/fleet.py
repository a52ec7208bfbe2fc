"""A fleet on this machine: a real broker, a collector and device daemons, each in a process that a test can kill."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import enrol_on_this_machine, init_fleet
from outstation.foundation.config.quantities import parse_duration
from outstation.ml.model.bundle import builtin
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from outstation.workbench.testing.patience import TIMEOUT_S, wait_until
from outstation.workbench.testing.process import OutstationProcess, run_outstation
from outstation.workbench.testing.reasons import describe_fleet, match_alert, require_device

FLEET = "acme"
_LOG_LINES = 30
RECORDINGS = builtin.recordings_dir() / "exercise.npz"
FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")


class DeviceProcess(OutstationProcess):
    """A device daemon with its own folder."""

    def __init__(self, home: Path, name: str) -> None:
        self.name, self.home, self.config = name, home, home / "outstation.toml"
        super().__init__(home / "log", "run", "-c", str(self.config))

    @property
    def data_dir(self) -> Path:
        return self.home / "data"

    def start_count(self) -> int:
        return self._count_in_log("running:")

    def session_count(self) -> int:
        """Return how often the daemon has connected to its broker."""
        return self._count_in_log("broker: connected to")

    def _count_in_log(self, text: str) -> int:
        return self.log.read_text(encoding="utf-8").count(text) if self.log.exists() else 0

    def start_and_wait(self, **environment: str) -> DeviceProcess:
        before = self.start_count()
        self.start(**environment)
        wait_until(f"{self.name} runs; see {self.log}", lambda: self.start_count() > before or not self.is_running)
        assert self.is_running, self.log.read_text(encoding="utf-8")
        return self

    def start_and_connect(self) -> DeviceProcess:
        """Start the daemon and wait for its session: a command sent before it would find no subscriber."""
        before = self.session_count()
        self.start_and_wait()
        self.wait_for_session(before)
        return self

    def wait_for_session(self, former: int) -> None:
        """Wait until `session_count` is above `former`."""
        wait_until(f"{self.name} connects; see {self.log}", lambda: self.session_count() > former)

    def append_config(self, text: str) -> DeviceProcess:
        """Append TOML to the config that enrolment wrote."""
        self.config.write_text(self.config.read_text(encoding="utf-8") + "\n" + text, encoding="utf-8")
        return self

    def add_replay_stream(
        self, rows: int, speed: float, *, seed: int = 0, stream: str = "watch", buffer: str = ""
    ) -> DeviceProcess:
        """Append a stream that replays a recording, with a commit every 200 ms."""
        source = f'kind = "replay", file = "{RECORDINGS}", seed = {seed}, rows = {rows}, speed = {speed}'
        return self.append_config(
            f'[buffer]\ncommit_every = "200 ms"\n{buffer}\n[streams.{stream}]\n'
            f"fields = [{', '.join(field_tables(FIELDS))}]\nsource = {{ {source} }}\n"
        )

    def add_task(
        self, name: str, *, stream: str = "watch", schedule: str = "every 500 ms", extra_toml: str = ""
    ) -> DeviceProcess:
        return self.append_config(
            f'[tasks.{name}]\nstream = "{stream}"\nbundle = "exercise"\nschedule = "{schedule}"\n{extra_toml}\n'
        )

    def status(self) -> Any:
        completed = run_outstation("status", "--json", "-c", str(self.config))
        assert completed.returncode == 0, completed.stderr
        return json.loads(completed.stdout)


def field_tables(names: Sequence[str]) -> list[str]:
    return [f'{{ name = "{name}" }}' for name in names]


def query_database(db: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run a query on a collector's database and return its rows."""
    with FleetStore(db, read_only=True) as store:
        return [tuple(row) for row in store.fetch_all(sql, *values)]


def last_result_row(db: Path, device: str, task: str = "exercise") -> int:
    sql = "SELECT max(CAST(json_extract(CAST(payload AS TEXT), '$.rows[1]') AS INTEGER)) FROM messages"
    [(row,)] = query_database(db, f"{sql} WHERE device = ? AND topic LIKE ?", device, f"%/results/{task}")
    return int(row or 0)


class LocalFleet:
    """Broker, collector and devices in `folder`. Leaving the context ends every process."""

    def __init__(self, folder: Path, *, mosquitto: MosquittoBroker | None = None, tls: bool = False) -> None:
        """`tls`: run the broker with the config, certificates and access rules that `fleet init` writes."""
        self.folder = folder
        self.home = folder / "fleet"
        port = free_port()
        if not tls:
            self.broker = mosquitto or MosquittoBroker(folder, port=port)
        url = f"mqtts://localhost:{port}" if tls else self.broker.url
        self.config: FleetConfig = init_fleet(self.home, FLEET, BrokerConfig(url=url))
        if tls:
            conf = keep_user_root(self.home / "broker" / "mosquitto.conf")
            self.broker = MosquittoBroker(folder, conf=conf, port=port)
        self.collector = OutstationProcess(folder / "collector.log", "fleet", "collect", "--dir", str(self.home))
        self.devices: list[DeviceProcess] = []

    def __enter__(self) -> LocalFleet:
        return self

    def __exit__(self, *_: object) -> None:
        for program in (*self.devices, self.collector):
            program.kill()
        self.broker.kill()

    def add_device(self, name: str) -> DeviceProcess:
        """Enrol a device and create its folder."""
        with self.open_store(write=True) as store:
            home = enrol_on_this_machine(self.home, self.config, store, name, self.folder / name)
        self.devices.append(DeviceProcess(home, name))
        return self.devices[-1]

    def open_store(self, *, write: bool = False) -> FleetStore:
        return FleetStore(Path(self.config.fleet.db), read_only=not write)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return query_database(Path(self.config.fleet.db), sql, *values)

    def last_result_row(self, device: str, task: str = "exercise") -> int:
        """Return the last row whose results the collector has."""
        return last_result_row(Path(self.config.fleet.db), device, task)

    def alerts(self, device: str = "") -> list[dict[str, Any]]:
        """Return all alerts that the collector has, raised and cleared, oldest first."""
        with self.open_store() as store:
            require_device(device, store.enrolled_devices())
            return store.alerts(device or None, closed=True)

    def wait_for(
        self, alert: str, *, device: str = "", within: str = f"{TIMEOUT_S:g} s", state: str = "raised"
    ) -> dict[str, Any]:
        """Wait until the collector has an alert of a kind or subject, and return it.

        Raises AssertionError with what the collector has instead, and the end of its log.
        """
        deadline = time.monotonic() + parse_duration(within)
        while not (matches := match_alert(self.alerts(device), alert, state)):
            if time.monotonic() > deadline:
                log = self.collector.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
                with self.open_store() as store:
                    seen = describe_fleet(store, {each.name: each.is_running for each in self.devices}, log)
                raise AssertionError(f"alert {alert!r} {state} did not come within {within}\n{seen}")
            time.sleep(0.1)
        return matches[0]

    def audit(self) -> tuple[int, Any]:
        """Run `fleet audit --json` and return its exit code and report."""
        done = run_outstation("fleet", "audit", "--json", "--dir", str(self.home))
        return done.returncode, json.loads(done.stdout)

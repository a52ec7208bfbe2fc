"""World: one device, one broker and one collector as supervised processes, with a sensor."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol

import msgspec

from outstation.device.store.store import Store
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from outstation.workbench.testing.fleet import DeviceProcess, LocalFleet, field_tables
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess
from scripts.faults.producer import FIELDS, Producer
from scripts.faults.proxy import Proxy
from scripts.kit import bundles

if TYPE_CHECKING:
    from scripts.faults.oracle import Verdict

DEVICE = "pi-01"
TASKS = ("often", "in-tens")
_RESTART_S = 0.3
# The first start probes each task's bundle before it accepts rows: two seconds, or a minute on a busy machine.
_FIRST_S = 150.0
# The folder that `fleet init` writes.
_GENERATED = Path("fleet/broker/mosquitto.conf")


class Setting(msgspec.Struct, frozen=True):
    """Requirements of a fault on its world.

    - `launcher`: the words between `python` and the arguments of `outstation`; `before`: those before `python`
    - `device_toml`, `buffer_toml`, `collector_toml`: additions to the device's config, its [buffer] and its [collector]
    - `tls`: use the config, certificates and access list of `fleet init`
    - `proxied`: device and collector reach the broker through `World.device_line` and `World.collector_line`
    - `forgetful`: the medium may drop confirmed data, including all trace of the newest readings
    - `prepare`: called after configuration and before the start; may mount or replace things, undone by `World.undo`
    - `missing`: returns the reason why this machine cannot run the fault, or None
    """

    launcher: Sequence[str] = ("-m", "outstation")
    before: Sequence[str] = ()
    device_toml: str = ""
    buffer_toml: str = ""
    collector_toml: str = ""
    broker_conf: str = ""
    broker_persistence: bool = False
    tls: bool = False
    proxied: bool = False
    forgetful: bool = False
    rate: float = 250.0
    prepare: Sequence[Callable[[World], object]] = ()
    missing: Callable[[], str | None] = lambda: None


class Companion(Protocol):
    """Activity beside the world's sensor, with its own promises to check."""

    def resume(self) -> None: ...

    def pause(self, patience_s: float) -> bool: ...

    def waiting(self) -> str:
        """Describe what is still to come; empty if nothing is."""
        ...

    def judge(self, verdict: Verdict) -> None: ...

    def close(self) -> None: ...


class World:
    """The processes of a world; a context manager that ends all of them."""

    def __init__(self, folder: Path, setting: Setting, rng: Random) -> None:
        self.folder, self.setting, self.rng = folder, setting, rng
        self.fleet = LocalFleet(folder, mosquitto=_broker(folder, setting))
        if setting.tls and os.geteuid() == 0:
            # Otherwise it switches to user mosquitto, which cannot read root's folders.
            with (folder / _GENERATED).open("a", encoding="utf-8") as conf:
                conf.write("user root\n")
        self.broker = self.fleet.broker
        self.collector: OutstationProcess = self.fleet.collector
        self.device: DeviceProcess = self.fleet.add_device(DEVICE)
        self.device.set_launcher(self.setting.launcher, self.setting.before)
        self._configure()
        self.device_line: Proxy
        self.collector_line: Proxy
        self.undo = contextlib.ExitStack()
        self._supervised: set[OutstationProcess] = set()
        self._guard = threading.RLock()
        self._closing = False
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.restarts = self.starts = 0
        self.producer: Producer
        self.companions: list[Companion] = []

    def __enter__(self) -> World:
        with self.undo:
            for prepare in self.setting.prepare:
                prepare(self)
            if self.setting.proxied:
                self.device_line = self._proxied(self.device.config)
                self.collector_line = self._proxied(self.fleet.home / "fleet.toml")
            self.undo.callback(self._end)
            self.broker.start()
            self.keep(self.collector)
            self.keep(self.device)
            self._supervisor.start()
            self.producer = Producer(self.device.data_dir / "intake.sock", self.rng, rate=self.setting.rate)
            self.undo.callback(self.producer.close)
            self.producer.resume()
            wait_until("the first rows acknowledged", lambda: self.producer.ledger.acknowledged, _FIRST_S)
            self.undo = self.undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def _end(self) -> None:
        self._closing = True
        with self._guard:
            self._supervised.clear()
            for program in (self.device, self.collector):
                program.kill()
        self.broker.kill()
        for companion in self.companions:
            companion.close()

    def resume(self) -> None:
        """Make the sensors send."""
        for sensor in self.sensors():
            sensor.resume()

    @contextlib.contextmanager
    def device_store(self) -> Iterator[Store]:
        """Open the device's store read-only for the block."""
        with Store.open_read_only(self.device.data_dir) as store:
            yield store

    def outbox_size(self) -> int:
        """Return the number of messages in the device's outbox."""
        with self.device_store() as store:
            return store.outbox_size()[0]

    def sensors(self) -> list[Producer | Companion]:
        """Return the sensor and all companions."""
        return [self.producer, *self.companions]

    def keep(self, program: OutstationProcess) -> None:
        """Run the process, and restart it whenever it ends."""
        with self._guard:
            self._supervised.add(program)
            if not program.is_running:
                self._start(program)

    def leave(self, program: OutstationProcess) -> None:
        """Suspend restarts until `keep`."""
        with self._guard:
            self._supervised.discard(program)

    def kill(self, program: OutstationProcess) -> None:
        """Send SIGKILL; the process stays down until `keep`."""
        with self._guard:
            self._supervised.discard(program)
            program.kill()

    def restart(self, program: OutstationProcess) -> None:
        """Send SIGKILL and restart at once."""
        self.kill(program)
        self.keep(program)

    def running(self) -> bool:
        """Return True if all supervised processes run."""
        with self._guard:
            return all(program.is_running for program in self._supervised)

    def _supervise(self) -> None:
        """Restart ended processes, as systemd does with Restart=always."""
        while not self._closing:
            time.sleep(_RESTART_S)
            with self._guard:
                for program in list(self._supervised):
                    if not program.is_running and not self._closing:
                        self.restarts += 1
                        self._start(program)

    def _start(self, program: OutstationProcess) -> None:
        self.starts += program is self.device
        program.start()

    def _proxied(self, config: Path) -> Proxy:
        proxy = Proxy(self.broker.port)
        self.undo.callback(proxy.close)
        text = config.read_text(encoding="utf-8")
        config.write_text(text.replace(self.broker.url, f"mqtt://127.0.0.1:{proxy.port}"), encoding="utf-8")
        return proxy

    def _configure(self) -> None:
        bundle = bundles.packed(self.folder / "bundle", bundles.FLOAT)
        setting = self.setting
        if setting.collector_toml:
            text = self.device.config.read_text(encoding="utf-8")
            text = text.replace("[collector]\n", f"[collector]\n{setting.collector_toml}\n")
            self.device.config.write_text(text, encoding="utf-8")
        names = ", ".join(field_tables(FIELDS))
        self.device.append_config(
            f'[publishers]\nkeys = ["{bundles.KEY.public.text}"]\n'
            f'[buffer]\ncommit_every = "30 ms"\n{setting.buffer_toml}\n'
            f"[streams.rig]\nfields = [{names}]\n{setting.device_toml}"
        )
        for task, schedule in zip(TASKS, ("every 200 ms", "when 10 rows"), strict=True):
            self.device.append_config(
                f'[tasks.{task}]\nstream = "rig"\nbundle = "{bundle}"\nschedule = "{schedule}"\nlearn_windows = 20\n'
            )


def _broker(folder: Path, setting: Setting) -> MosquittoBroker:
    if not setting.tls:
        return MosquittoBroker(folder, persistence=setting.broker_persistence, extra_conf=setting.broker_conf)
    broker = MosquittoBroker(folder, conf=folder / _GENERATED, port=free_port())
    broker.url = f"mqtts://127.0.0.1:{broker.port}"
    return broker

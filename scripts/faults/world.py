"""One device, one broker and one collector, each a process, kept running as systemd would, with a sensor that sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from scripts.faults.producer import FIELDS, Producer
from tests import bundles
from tests.brokers import Mosquitto
from tests.system import Device, Fleet, Program, eventually

DEVICE = "pi-01"
TASKS = ("often", "in-tens")
_RESTART_S = 0.3


@dataclass(frozen=True)
class Setting:
    """What a fault needs of its world.

    `launcher` are the words between `python` and the arguments of `outstation`, `before` those before `python`.
    `device_toml`, `buffer_toml` go into the device's config (`buffer_toml` into [buffer]), `collector_toml` into
    [collector]. `prepare` is called when all is configured and nothing started, and may mount, proxy or replace things;
    what it returns is called in the end.
    """

    launcher: Sequence[str] = ("-m", "agent")
    before: Sequence[str] = ()
    device_toml: str = ""
    buffer_toml: str = ""
    collector_toml: str = ""
    broker_conf: str = ""
    broker_persistence: bool = False
    rate: float = 250.0
    prepare: Callable[[World], Callable[[], None]] | None = None


class World:
    """Use as a context: leaving it ends every process."""

    def __init__(self, folder: Path, setting: Setting, rng: Random) -> None:
        self.folder, self.setting, self.rng = folder, setting, rng
        broker = Mosquitto(folder, persistence=setting.broker_persistence, extra_conf=setting.broker_conf)
        self.fleet = Fleet(folder, mosquitto=broker)
        self.broker = self.fleet.broker
        self.collector: Program = self.fleet.collector
        self.device: Device = self.fleet.device(DEVICE)
        self.device.launch(self.setting.launcher, self.setting.before)
        self._configure()
        self._undo: Callable[[], None] = lambda: None
        self._kept: set[Program] = set()
        self._guard = threading.RLock()
        self._closing = False
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self.restarts = 0
        self.producer: Producer

    def __enter__(self) -> World:
        if self.setting.prepare is not None:
            self._undo = self.setting.prepare(self)
        self.broker.start()
        self.keep(self.collector)
        self.keep(self.device)
        self._supervisor.start()
        self.producer = Producer(self.device.data / "intake.sock", self.rng, rate=self.setting.rate)
        self.producer.resume()
        eventually("the first rows acknowledged", lambda: self.producer.ledger.acknowledged)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        with self._guard:
            self._kept.clear()
            for program in (self.device, self.collector):
                program.kill()
        self.broker.kill()
        self.producer.close()
        self._undo()

    def keep(self, program: Program) -> None:
        """Run it, and start it again whenever it ends."""
        with self._guard:
            self._kept.add(program)
            if not program.running:
                program.start()

    def leave(self, program: Program) -> None:
        """Do not start it again, until `keep`."""
        with self._guard:
            self._kept.discard(program)

    def kill(self, program: Program) -> None:
        """SIGKILL; it stays down until `keep`."""
        with self._guard:
            self._kept.discard(program)
            program.kill()

    def restart(self, program: Program) -> None:
        """SIGKILL, and at once up again."""
        self.kill(program)
        self.keep(program)

    def running(self) -> bool:
        """Whether everything that should be up is."""
        with self._guard:
            return all(program.running for program in self._kept)

    def _supervise(self) -> None:
        """What systemd does with Restart=always."""
        while not self._closing:
            time.sleep(_RESTART_S)
            with self._guard:
                for program in list(self._kept):
                    if not program.running and not self._closing:
                        self.restarts += 1
                        program.start()

    def _configure(self) -> None:
        bundle = bundles.packed(self.folder / "bundle", bundles.FLOAT)
        setting = self.setting
        if setting.collector_toml:
            text = self.device.config.read_text(encoding="utf-8")
            text = text.replace("[collector]\n", f"[collector]\n{setting.collector_toml}\n")
            self.device.config.write_text(text, encoding="utf-8")
        names = ", ".join(f'{{ name = "{name}" }}' for name in FIELDS)
        self.device.configure(
            f'[publishers]\nkeys = ["{bundles.KEY.public.text}"]\n'
            f'[buffer]\ncommit_every = "30 ms"\n{setting.buffer_toml}\n'
            f"[streams.rig]\nfields = [{names}]\n{setting.device_toml}"
        )
        for task, schedule in zip(TASKS, ("every 200 ms", "when 10 rows"), strict=True):
            self.device.configure(
                f'[tasks.{task}]\nstream = "rig"\nbundle = "{bundle}"\nschedule = "{schedule}"\nlearn = 20\n'
            )

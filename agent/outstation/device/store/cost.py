"""Cost accounting: processor time, bytes sent, bytes written to flash, and energy.

Counters in the store, named `cost.…`. Each task's counters are written with its batches, those of the process and the
machine once a minute. Work that a crash interrupts is not
counted.

Sources: proc(5) for `write_bytes`; Linux Documentation/power/powercap for energy.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import msgspec

from outstation.device.store.transaction import Transaction
from outstation.foundation.clock import ClockReading

PREFIX = "cost."
_PROCESS_PREFIX, _TASK_PREFIX = f"{PREFIX}process.", f"{PREFIX}task."
# Bytes of a message beyond payload, signature and topic: CloudEvents properties and the packet header.
_ENVELOPE_BYTES = 330


def count_batch(tx: Transaction, task: str, windows: int, rows: int, cpu_us: int) -> None:
    """Count a committed batch of a task."""
    for name, n in {"batches": 1, "windows": windows, "rows": rows, "cpu_us": cpu_us}.items():
        tx.increment_counter(f"{_TASK_PREFIX}{task}.{name}", n)


def message_counter(task: str, kind: str) -> str:
    return f"{_TASK_PREFIX}{task}.{kind}.messages"


def count_message(tx: Transaction, task: str | None, kind: str, size: int) -> None:
    """Count a message of `size` bytes of payload, signature and topic."""
    if task is not None:
        tx.increment_counter(message_counter(task, kind), 1)
        tx.increment_counter(f"{_TASK_PREFIX}{task}.{kind}.bytes", size + _ENVELOPE_BYTES)
    else:
        tx.increment_counter(f"{_PROCESS_PREFIX}sent", size + _ENVELOPE_BYTES)


class MeterReading(msgspec.Struct, frozen=True):
    """Current counters of the process and the machine; None: it cannot be measured."""

    boot_s: float
    written_bytes: int
    cpu_s: float | None = None
    busy_s: float | None = None
    energy_uj: int | None = None


class ProcessMeter:
    """Cost counters of the whole agent; `root` is the sysfs mount."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self._root = root
        self._last: MeterReading | None = None

    def read(self, now: ClockReading) -> MeterReading:
        """Return the current counters of this process and machine."""
        # Imported here, 10 ms: `outstation batch` does not need it.
        import psutil

        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        cpu_s = time.process_time() + children.ru_utime + children.ru_stime
        return MeterReading(now.boot_s, read_io("write_bytes"), cpu_s, busy_s, self._read_energy_uj())

    def tick(self, tx: Transaction, now: ClockReading) -> None:
        """Count what was spent since the last call."""
        this, last = self.read(now), self._last
        self._last = this
        if last is None or this.boot_s <= last.boot_s:
            return
        spent = {"ms": round((this.boot_s - last.boot_s) * 1e3), "written": this.written_bytes - last.written_bytes}
        for name, after, before in (("cpu_us", this.cpu_s, last.cpu_s), ("busy_us", this.busy_s, last.busy_s)):
            if after is not None and before is not None:
                spent[name] = round((after - before) * 1e6)
        if this.energy_uj is not None and last.energy_uj is not None and this.energy_uj >= last.energy_uj:
            # A counter that wrapped gives no energy for this minute.
            spent["energy_uj"] = this.energy_uj - last.energy_uj
            spent["energy_ms"] = spent["ms"]
        for name, n in spent.items():
            tx.increment_counter(f"{_PROCESS_PREFIX}{name}", max(0, n))

    def _read_energy_uj(self) -> int | None:
        """Return the energy of all processor packages; None if the kernel does not count it or denies access."""
        packages = []
        for package in sorted(self._root.glob("class/powercap/intel-rapl:?")):
            try:
                packages.append(int((package / "energy_uj").read_text(encoding="utf-8")))
            except (OSError, ValueError):
                return None
        return sum(packages) if packages else None


def read_io(name: str) -> int:
    """Return a counter of this process by its name in proc(5): `write_bytes`, to a medium; `wchar`, by system calls."""
    try:
        lines = Path(f"/proc/{os.getpid()}/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


class TaskCost(msgspec.Struct, frozen=True):
    """Counted cost of one task; bytes and messages by kind."""

    batches: int
    windows: int
    rows: int
    cpu_us: int
    messages_by_kind: dict[str, int]
    bytes_by_kind: dict[str, int]

    @property
    def sent_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())


class ProcessCost(msgspec.Struct, frozen=True):
    """Counted cost of the process within `seconds`; `energy_j` is of the whole machine. None: not measured."""

    seconds: float
    cpu_s: float | None
    written_bytes: int
    busy_s: float
    sent_bytes: int
    energy_j: float | None

    @property
    def own_energy_j(self) -> float | None:
        """Energy in proportion to the agent's share of the machine's busy time (J)."""
        if self.energy_j is None or self.cpu_s is None or self.busy_s <= 0:
            return None
        return self.energy_j * min(1.0, self.cpu_s / self.busy_s)


def read_task_cost(counters: dict[str, int], task: str) -> TaskCost:
    head = f"{_TASK_PREFIX}{task}."
    own = {name.removeprefix(head): n for name, n in counters.items() if name.startswith(head)}
    return TaskCost(
        batches=own.get("batches", 0),
        windows=own.get("windows", 0),
        rows=own.get("rows", 0),
        cpu_us=own.get("cpu_us", 0),
        messages_by_kind={name.removesuffix(".messages"): n for name, n in own.items() if name.endswith(".messages")},
        bytes_by_kind={name.removesuffix(".bytes"): n for name, n in own.items() if name.endswith(".bytes")},
    )


def read_process_cost(counters: dict[str, int]) -> ProcessCost:
    own = {name.removeprefix(_PROCESS_PREFIX): n for name, n in counters.items() if name.startswith(_PROCESS_PREFIX)}
    energy = own["energy_uj"] / 1e6 if own.get("energy_ms") else None
    if energy is not None and own["energy_ms"] < own["ms"]:
        # It was readable for part of the time only.
        energy *= own["ms"] / own["energy_ms"]
    cpu_s = own["cpu_us"] / 1e6 if "cpu_us" in own else None
    seconds, busy_s = own.get("ms", 0) / 1e3, own.get("busy_us", 0) / 1e6
    return ProcessCost(seconds, cpu_s, own.get("written", 0), busy_s, own.get("sent", 0), energy)

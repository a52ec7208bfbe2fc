"""What a device's work costs, counted while it works: processor time, bytes on the air, on flash, and energy.

Counters in the store, named `cost.…`: of each task in the transactions of its batches (what the commit itself takes
comes with the next one), of the process and the machine once a minute. What a crash cuts off is not counted.

Sources: proc(5) for `write_bytes`; Linux Documentation/power/powercap for energy.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import msgspec

from agent.clock import ClockReading
from agent.device.store.transaction import Transaction

PREFIX = "cost."
_PROCESS_PREFIX, _TASK_PREFIX = f"{PREFIX}process.", f"{PREFIX}task."
# Beside payload, signature and topic: CloudEvents properties and the packet's own.
_ENVELOPE_BYTES = 330


class CostMeter:
    """Counts the batches of one task."""

    def __init__(self, task: str) -> None:
        self._task, self._uncounted_batches = task, list[tuple[int, int, int]]()

    def record_batch(self, windows: int, rows: int, cpu_us: int) -> None:
        """A batch that was committed."""
        self._uncounted_batches.append((windows, rows, cpu_us))

    def write_counters(self, tx: Transaction) -> None:
        """Of earlier batches. Those of a transaction that fails are counted by the next."""
        for windows, rows, cpu_us in self._uncounted_batches:
            for name, n in {"batches": 1, "windows": windows, "rows": rows, "cpu_us": cpu_us}.items():
                tx.increment_counter(f"{_TASK_PREFIX}{self._task}.{name}", n)

    def confirm_written(self) -> None:
        """What `keep` counted is committed."""
        self._uncounted_batches.clear()


def count_message(tx: Transaction, task: str | None, kind: str, size: int) -> None:
    """A message of `size` bytes of payload, signature and topic was written."""
    if task is not None:
        tx.increment_counter(f"{_TASK_PREFIX}{task}.{kind}.messages", 1)
        tx.increment_counter(f"{_TASK_PREFIX}{task}.{kind}.bytes", size + _ENVELOPE_BYTES)
    else:
        tx.increment_counter(f"{_PROCESS_PREFIX}sent", size + _ENVELOPE_BYTES)


class _Counters(msgspec.Struct, frozen=True):
    """Counters of the process and of the machine, as they stand; `energy_uj` None where it cannot be read."""

    boot_s: float
    cpu_s: float
    written_bytes: int
    busy_s: float
    energy_uj: int | None


class ProcessMeter:
    """Of the whole agent; `root` is where sysfs is."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self._root = root
        self._last: _Counters | None = None

    def tick(self, tx: Transaction, now: ClockReading) -> None:
        """What was spent since the last call."""
        this, last = self._read_counters(now), self._last
        self._last = this
        if last is None or this.boot_s <= last.boot_s:
            return
        spent = {
            "ms": round((this.boot_s - last.boot_s) * 1e3),
            "cpu_us": round((this.cpu_s - last.cpu_s) * 1e6),
            "written": this.written_bytes - last.written_bytes,
            "busy_us": round((this.busy_s - last.busy_s) * 1e6),
        }
        if this.energy_uj is not None and last.energy_uj is not None and this.energy_uj >= last.energy_uj:
            # A counter that wrapped says nothing of this minute.
            spent["energy_uj"] = this.energy_uj - last.energy_uj
            spent["energy_ms"] = spent["ms"]
        for name, n in spent.items():
            tx.increment_counter(f"{_PROCESS_PREFIX}{name}", max(0, n))

    def _read_counters(self, now: ClockReading) -> _Counters:
        # Costs 10 ms: of no use to those who only run batches.
        import psutil

        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        cpu_s = time.process_time() + children.ru_utime + children.ru_stime
        return _Counters(now.boot_s, cpu_s, _read_written_bytes(), busy_s, self._read_energy_uj())

    def _read_energy_uj(self) -> int | None:
        """Of all processor packages, where the kernel counts it and we may read it."""
        found = []
        for package in sorted(self._root.glob("class/powercap/intel-rapl:?")):
            try:
                found.append(int((package / "energy_uj").read_text(encoding="ascii")))
            except (OSError, ValueError):
                return None
        return sum(found) if found else None


def _read_written_bytes() -> int:
    """Bytes this process had the kernel write to a medium."""
    try:
        lines = Path(f"/proc/{os.getpid()}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), 0)


class TaskCost(msgspec.Struct, frozen=True):
    """What is counted of one task; bytes and messages by kind."""

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
    """What is counted of the process: seconds it was watched for, and in them. `energy_j`: the machine's, or None."""

    seconds: float
    cpu_s: float
    written_bytes: int
    busy_s: float
    sent_bytes: int
    energy_j: float | None

    @property
    def own_energy_j(self) -> float | None:
        """The part of the machine's energy that the agent's share of its busy time comes to."""
        if self.energy_j is None or self.busy_s <= 0:
            return None
        return self.energy_j * min(1.0, self.cpu_s / self.busy_s)


def read_task_cost(counters: dict[str, int], task: str) -> TaskCost:
    """From the store's counters."""
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
        # It could be read for a part of the time only.
        energy *= own["ms"] / own["energy_ms"]
    seconds, cpu_s, busy_s = own.get("ms", 0) / 1e3, own.get("cpu_us", 0) / 1e6, own.get("busy_us", 0) / 1e6
    return ProcessCost(seconds, cpu_s, own.get("written", 0), busy_s, own.get("sent", 0), energy)

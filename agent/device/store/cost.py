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

from agent.clock import Now
from agent.device.store.transaction import Transaction

PREFIX = "cost."
_PROCESS, _TASKS = f"{PREFIX}process.", f"{PREFIX}task."
# Beside payload, signature and topic: CloudEvents properties and the packet's own.
_ENVELOPE = 330


class Meter:
    """Of one task. Sums of squares and products tell what a batch costs by itself, and what each window adds."""

    def __init__(self, task: str) -> None:
        self._task, self._waiting = task, list[tuple[int, int, int, int]]()

    def ran(self, windows: int, rows: int, listed: int, cpu_us: int) -> None:
        """A batch that was committed."""
        self._waiting.append((windows, rows, listed, cpu_us))

    def keep(self, tx: Transaction) -> None:
        """Of earlier batches. Those of a transaction that fails are counted by the next."""
        for windows, rows, listed, cpu_us in self._waiting:
            parts = {
                "batches": 1,
                "windows": windows,
                "rows": rows,
                "listed": listed,
                "cpu_us": cpu_us,
                "windows2": windows * windows,
                "windows_cpu": windows * cpu_us,
            }
            for name, n in parts.items():
                tx.count(f"{_TASKS}{self._task}.{name}", n)

    def kept(self) -> None:
        """What `keep` counted is committed."""
        self._waiting.clear()


def sent(tx: Transaction, task: str | None, kind: str, size: int) -> None:
    """A message of `size` bytes of payload, signature and topic was written."""
    if task is not None:
        tx.count(f"{_TASKS}{task}.{kind}.messages", 1)
        tx.count(f"{_TASKS}{task}.{kind}.bytes", size + _ENVELOPE)
    else:
        tx.count(f"{_PROCESS}sent", size + _ENVELOPE)


class _Read(msgspec.Struct, frozen=True):
    """Counters of the process and of the machine, as they stand; `energy_uj` None where it cannot be read."""

    boot_s: float
    cpu_s: float
    written: int
    busy_s: float
    energy_uj: int | None


class Process:
    """Of the whole agent; `root` is where sysfs is."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self._root = root
        self._last: _Read | None = None

    def turn(self, tx: Transaction, now: Now) -> None:
        """What was spent since the last call."""
        this, last = self._read(now), self._last
        self._last = this
        if last is None or this.boot_s <= last.boot_s:
            return
        spent = {
            "ms": round((this.boot_s - last.boot_s) * 1e3),
            "cpu_us": round((this.cpu_s - last.cpu_s) * 1e6),
            "written": this.written - last.written,
            "busy_us": round((this.busy_s - last.busy_s) * 1e6),
        }
        if this.energy_uj is not None and last.energy_uj is not None and this.energy_uj >= last.energy_uj:
            # A counter that wrapped says nothing of this minute.
            spent["energy_uj"] = this.energy_uj - last.energy_uj
            spent["energy_ms"] = spent["ms"]
        for name, n in spent.items():
            tx.count(f"{_PROCESS}{name}", max(0, n))

    def _read(self, now: Now) -> _Read:
        # Costs 10 ms: of no use to those who only run batches.
        import psutil

        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        cpu_s = time.process_time() + children.ru_utime + children.ru_stime
        return _Read(now.boot_s, cpu_s, _written(), busy_s, self._energy_uj())

    def _energy_uj(self) -> int | None:
        """Of all processor packages, where the kernel counts it and we may read it."""
        found = []
        for package in sorted(self._root.glob("class/powercap/intel-rapl:?")):
            try:
                found.append(int((package / "energy_uj").read_text(encoding="ascii")))
            except (OSError, ValueError):
                return None
        return sum(found) if found else None


def _written() -> int:
    """Bytes this process had the kernel write to a medium."""
    try:
        lines = Path(f"/proc/{os.getpid()}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), 0)


class Task(msgspec.Struct, frozen=True):
    """What is counted of one task; bytes and messages by kind."""

    batches: int
    windows: int
    rows: int
    listed: int
    cpu_us: int
    windows2: int
    windows_cpu: int
    messages: dict[str, int]
    bytes: dict[str, int]

    @property
    def air(self) -> int:
        return sum(self.bytes.values())

    @property
    def batch_us(self) -> tuple[float, float]:
        """Processor time of a batch by itself, and of each window: by least squares, where batches differ in size."""
        mean = self.windows / max(1, self.batches)
        spread = self.windows2 - self.batches * mean**2
        if spread <= 0.01 * self.windows2:
            return 0.0, self.cpu_us / max(1, self.windows)
        slope = (self.windows_cpu - mean * self.cpu_us) / spread
        slope = min(max(slope, 0.0), self.cpu_us / max(1, self.windows))
        return max(0.0, self.cpu_us / self.batches - slope * mean), slope


class Spent(msgspec.Struct, frozen=True):
    """What is counted of the process: seconds it was watched for, and in them. `energy_j`: the machine's, or None."""

    seconds: float
    cpu_s: float
    written: int
    busy_s: float
    sent: int
    energy_j: float | None

    @property
    def own_energy_j(self) -> float | None:
        """The part of the machine's energy that the agent's share of its busy time comes to."""
        if self.energy_j is None or self.busy_s <= 0:
            return None
        return self.energy_j * min(1.0, self.cpu_s / self.busy_s)


def of_task(counters: dict[str, int], task: str) -> Task:
    """From the store's counters."""
    head = f"{_TASKS}{task}."
    own = {name.removeprefix(head): n for name, n in counters.items() if name.startswith(head)}
    return Task(
        batches=own.get("batches", 0),
        windows=own.get("windows", 0),
        rows=own.get("rows", 0),
        listed=own.get("listed", 0),
        cpu_us=own.get("cpu_us", 0),
        windows2=own.get("windows2", 0),
        windows_cpu=own.get("windows_cpu", 0),
        messages={name.removesuffix(".messages"): n for name, n in own.items() if name.endswith(".messages")},
        bytes={name.removesuffix(".bytes"): n for name, n in own.items() if name.endswith(".bytes")},
    )


def of_process(counters: dict[str, int]) -> Spent:
    own = {name.removeprefix(_PROCESS): n for name, n in counters.items() if name.startswith(_PROCESS)}
    energy = own["energy_uj"] / 1e6 if own.get("energy_ms") else None
    if energy is not None and own["energy_ms"] < own["ms"]:
        # It could be read for a part of the time only.
        energy *= own["ms"] / own["energy_ms"]
    seconds, cpu_s, busy_s = own.get("ms", 0) / 1e3, own.get("cpu_us", 0) / 1e6, own.get("busy_us", 0) / 1e6
    return Spent(seconds, cpu_s, own.get("written", 0), busy_s, own.get("sent", 0), energy)

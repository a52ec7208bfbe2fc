"""Processor time and memory of a process, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int, *, children: bool = False) -> float:
    """Return the processor time of a process in seconds; with `children` also that of the children it waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if children else 13])) / _TICKS_PER_S


def running_s(pid: int) -> float:
    """Return the processor time of a process in seconds, to the nanosecond; of its threads that run by now."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9


def memory_kb(pid: int, field: str, file: str = "status") -> int:
    """Return a field of `/proc/PID/FILE` in kB, such as VmHWM."""
    lines = Path(f"/proc/{pid}/{file}").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def pss_mb(pid: int) -> float:
    """Return the proportional set size of a process and its children in MiB.

    It counts private memory and the share of common pages.
    """
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return memory_kb(pid, "Pss", "smaps_rollup") / 1024 + sum(pss_mb(int(child)) for child in children)

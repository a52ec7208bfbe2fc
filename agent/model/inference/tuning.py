"""How a model is run on this machine: rows at once and threads, as `trial` chose them, to be remembered."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

# So long a trial takes at most.
MAX_TUNING_S = 2.0


class Tuning(msgspec.Struct, frozen=True):
    """What was chosen for one model (its SHA-256), of which one output is used, on one runtime and machine.

    `rows_per_s` is what the trial measured; `unequal` are the batches whose answers have other bits than single rows'.
    `proved`: which bundle passed its checks with it, and which agent checked.
    """

    model: str
    runtime: str
    machine: str
    batch: int
    threads: int
    rows_per_s: float
    inexact_batches: list[int] = []
    output: str | int | None = None
    verified_for: str = ""

    def is_same_target(self, other: Tuning) -> bool:
        """Whether both are of the same model and output, on the same runtime and machine."""
        mine, its = ((one.model, one.output, one.runtime, one.machine) for one in (self, other))
        return mine == its

    def __str__(self) -> str:
        rows = "one row at a time" if self.batch == 1 else f"batches of {self.batch}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{rows} on {threads}, {self.rows_per_s:,.0f} rows/s"


def find_known(known: Sequence[Tuning], content: bytes, runtime: str, output: str | int | None = None) -> Tuning | None:
    """The choice that was made for this model and `output` on this runtime and machine, where one is `known`."""
    wanted = (model_digest(content), output, runtime, describe_machine())
    return next((one for one in known if (one.model, one.output, one.runtime, one.machine) == wanted), None)


def model_digest(content: bytes) -> str:
    """What `Choice.model` calls a model."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def describe_machine() -> str:
    """The processor, and how many of its cores are ours."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # A Raspberry Pi has no "model name", and says at the end what it is.
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware"))]
    return f"{platform.machine()}, {named[-1] if named else 'unnamed'}, {count_cores()} cores"


def count_cores() -> int:
    return len(os.sched_getaffinity(0))

"""Tuning: batch size and threads of a model on this machine, as `autotune` measured them."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from outstation.ml.model.bundle.tensor_selection import ONE_TENSOR, TensorSelection

# Without a tuning: dense models have most of their gain at this size, and convolutions gain nothing beyond it.
DEFAULT_BATCH = 32
# Time limit of a measurement.
MAX_TUNING_S = 2.0


class Tuning(msgspec.Struct, frozen=True):
    """Tuning of one model (its SHA-256) and its tensors, on one runtime and machine.

    `inexact_batches` are batch sizes whose outputs differ in bits from those of single rows. `verified_for` is the
    bundle that passed its probe with this tuning, and the agent's version.
    """

    model: str
    runtime: str
    machine: str
    batch: int
    threads: int
    rows_per_s: float
    inexact_batches: list[int] = []
    tensors: TensorSelection = ONE_TENSOR
    verified_for: str = ""

    @property
    def target(self) -> tuple[str, TensorSelection, str, str]:
        """Model, tensors, runtime and machine that it is for."""
        return self.model, self.tensors, self.runtime, self.machine

    def __str__(self) -> str:
        rows = "one row at a time" if self.batch == 1 else f"batches of {self.batch}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{rows} on {threads}, {self.rows_per_s:,.0f} rows/s"


def find_known(
    known: Sequence[Tuning], content: bytes, runtime: str, tensors: TensorSelection = ONE_TENSOR
) -> Tuning | None:
    """Return the known tuning for these `tensors` of the model on this runtime and machine, if there is one."""
    target = (model_digest(content), tensors, runtime, describe_machine())
    return next((tuning for tuning in known if tuning.target == target), None)


def model_digest(content: bytes) -> str:
    """Return the digest that `Tuning.model` holds."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@functools.cache
def describe_machine() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # A Raspberry Pi has no "model name"; its last lines name the board.
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware"))]
    return f"{platform.machine()}, {named[-1] if named else 'unnamed'}, {count_cores()} cores"


def count_cores() -> int:
    return len(os.sched_getaffinity(0))

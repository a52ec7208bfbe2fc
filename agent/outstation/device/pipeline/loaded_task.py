"""Loaded task: a task's plan, and the parts of its batches with their states in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from outstation.device.batch_parts.batch_part import BatchPart
from outstation.device.batch_parts.batch_size import BatchSize
from outstation.device.batch_parts.crash_part import CrashPart
from outstation.device.batch_parts.drift_part import DriftPart
from outstation.device.batch_parts.result_part import ResultPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.batch_parts.window_part import WindowPart
from outstation.device.store.message_log import MessageLog
from outstation.device.store.row_batch import RowBatch
from outstation.foundation.arrays import Float32s
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import StartedWindows

if TYPE_CHECKING:
    from outstation.device.batch_parts.joined_streams import JoinedPart
    from outstation.device.samples.selection import SampledTask


class StartedBatch(msgspec.Struct, frozen=True, eq=False):
    """Batch that was read and given to the model: `features` (n, F) of its rows in physical units."""

    rows: RowBatch
    cut: WindowCut
    features: Float32s
    run: StartedWindows


class Lookahead(msgspec.Struct):
    """Next batch of a backlog, which the model computes while one is committed: not while a hot machine rests."""

    is_allowed: bool = True
    started: StartedBatch | None = None


class LoadedTask(TaskPlan, frozen=True, eq=False, kw_only=True):
    """A plan with the `parts` of its batches, in the order of their messages; some of them are known by name.

    `samples`: which of its readings may be sent; None without the owner's consent.
    """

    parts: list[BatchPart]
    size: BatchSize
    crash: CrashPart
    results: ResultPart
    drift: DriftPart | None
    joined: JoinedPart | None
    samples: SampledTask | None
    lookahead: Lookahead = msgspec.field(default_factory=Lookahead)

    def raise_least_count(self, message_log: MessageLog) -> None:
        """Have messages about this task obey its bundle's least count, where that is larger than the device's."""
        message_log.bundle_min_counts[self.name] = self.bundle.manifest.drift.min_count or 1

    def attach(self, part: BatchPart) -> None:
        """Let `part` take part in the next batches; it is asked first."""
        if part not in self.parts:
            self.parts.insert(0, part)

    def detach(self, part: BatchPart) -> None:
        if part in self.parts:
            self.parts.remove(part)

    def without_drift(self) -> LoadedTask:
        """Return the task with the same parts, but those of drift detection, and a new reader of its joined streams."""
        parts = [part for part in self.parts if not isinstance(part, DriftPart | WindowPart)]
        joined = None if self.joined is None else self.joined.with_new_reader()
        if self.joined is not None:
            parts.remove(self.joined)
        return msgspec.structs.replace(
            self, parts=parts if joined is None else [joined, *parts], joined=joined, drift=None, lookahead=Lookahead()
        )

"""Assembly of a task: its plan, and the parts of its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import msgspec

from outstation.device.batch_parts.batch_size import BatchSize
from outstation.device.batch_parts.cost_part import CostPart
from outstation.device.batch_parts.crash_part import CrashPart
from outstation.device.batch_parts.deadline import Deadline
from outstation.device.batch_parts.drift_part import DriftPart
from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.batch_parts.label_part import LabelPart
from outstation.device.batch_parts.result_part import ResultPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.batch_parts.window_part import WindowPart
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.rules.compiler import CompiledRule
from outstation.device.rules.rule_part import RulePart

if TYPE_CHECKING:
    from outstation.device.batch_parts.batch_part import BatchPart
    from outstation.device.batch_parts.joined_streams import JoinedPart, JoinedStream
    from outstation.device.samples.selection import SampledTask

_NO_STREAMS: Mapping[str, JoinedStream] = {}


def assemble_task(
    plan: TaskPlan,
    restored: RestoredDrift | None = None,
    *,
    rules: Sequence[CompiledRule] = (),
    samples: SampledTask | None = None,
    joined_streams: Mapping[str, JoinedStream] = _NO_STREAMS,
    crash_guard: Callable[[], AbstractContextManager[object]] = nullcontext,
    is_crash_suspect: bool = False,
) -> LoadedTask:
    """Assemble a task; without `restored` it has no drift detection.

    The parts' order is that of their messages, and a part finds in the batch the facts of those before it.
    """
    drift = None if restored is None else DriftPart(plan, restored)
    joined = _join(plan, joined_streams) if plan.inference.manifest.joined else None
    results, crash = ResultPart(plan), CrashPart(plan, crash_guard, is_suspect=is_crash_suspect)
    deadline = Deadline(plan.name, plan.config.deadline)
    size = BatchSize(plan, deadline, drift, sum(rule.alerts_per_window for rule in rules))
    parts = [
        joined,
        drift,
        RulePart(plan, rules) if rules else None,
        results,
        WindowPart(plan, drift) if drift is not None else None,
        LabelPart(plan) if plan.keep_results else None,
        _sample(samples) if samples is not None else None,
        crash,
        size,
        CostPart(plan),
        deadline,
    ]
    return LoadedTask(
        **msgspec.structs.asdict(plan),
        parts=[part for part in parts if part is not None],
        size=size,
        crash=crash,
        results=results,
        drift=drift,
        joined=joined,
        samples=samples,
    )


def _join(plan: TaskPlan, streams: Mapping[str, JoinedStream]) -> JoinedPart:
    # Imported here, because few tasks join streams or send samples, and each start would load these.
    from outstation.device.batch_parts.joined_streams import JoinedPart

    return JoinedPart(plan, streams)


def _sample(samples: SampledTask) -> BatchPart:
    from outstation.device.samples.sample_part import SamplePart

    return SamplePart(samples)

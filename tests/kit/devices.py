"""Device of one stream and one task without a daemon: store, batches and messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.batch_parts import drift_state
from outstation.device.batch_parts.drift_part import DriftPart
from outstation.device.batch_parts.drift_state import RestoredDrift
from outstation.device.batch_parts.joined_streams import JoinedStream
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.bootstrap.assembly import assemble_task
from outstation.device.pipeline import batch
from outstation.device.pipeline.batch import BatchResult
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.recovery.open import open_store
from outstation.device.rules import compiler
from outstation.device.samples.selection import SampledTask
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.tuning import Tuning
from outstation.protocol.wire import jws
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.messages import ResultColumns, ResultsPayload
from outstation.protocol.wire.verification import VerifiedMessage, verify_message
from outstation.workbench.testing.messages import new_key
from scripts.kit.bundles import Recipe

DEVICE = new_key(1)
NOW = ClockReading(1_764_022_680_000_000, 100.0, "synced")
T0, STEP_US = 1_764_000_000_000_000, 10_000
Floats = NDArray[np.float32]
Publish = Literal["all", "changes", "summary"] | config.PublishBelow


@dataclass
class Device:
    """One stream, one task and one store; `restart` reopens `store`."""

    folder: Path
    recipe: Recipe
    active: LoadedBundle
    publish: Publish = "all"
    max_bytes: int = 120_000
    max_size: int = 2**30
    alerts: list[config.AlertRuleConfig] = field(default_factory=list)
    joined_streams: dict[str, JoinedStream] = field(default_factory=dict)
    tuning: Tuning | None = None
    store: Store = field(init=False)
    task: LoadedTask = field(init=False)
    author: MessageLog = field(init=False)
    fed: int = 0

    def __post_init__(self) -> None:
        self.stream = config.StreamConfig(
            fields=[config.FieldConfig(name=name) for name in ("extra", *self.recipe.fields)]
        )
        self.open()

    def open(self) -> None:
        self.store = open_store(self.folder, max_size=self.max_size)
        further = {source.name: source.config for source in self.joined_streams.values()}
        self.store.declare_streams({"watch": self.stream, **further})
        manifest = self.active.bundle.manifest
        restored = None
        if self.active.reference is not None:
            judge = DriftMonitor(
                MonitorSettings(
                    self.active.reference,
                    labels=manifest.output.labels,
                    window=manifest.drift.window,
                    learn_windows=20,
                    further=scores.monitored_outputs(manifest),
                )
            )
            restored = drift_state.restore(self.store, "tiny", judge)
        chosen = config.TaskConfig(stream="watch", bundle="tiny", publish=self.publish, alerts=self.alerts)
        self.task_config = chosen
        self.assemble(restored)
        self.author = MessageLog("acme", "pi-07", DEVICE, self.store.log_id, 1, self.max_bytes)

    def assemble(
        self,
        restored: RestoredDrift | None,
        bundle: Bundle | None = None,
        samples: SampledTask | None = None,
        name: str = "tiny",
    ) -> None:
        """Assemble the task, by default with the active bundle."""
        bundle, model = bundle or self.active.bundle, self.active.model
        plan = TaskPlan.from_bundle(name, self.task_config, self.stream, bundle, model, "sha256:c", tuning=self.tuning)
        rules = compiler.compile_rules("outstation.toml", name, self.alerts, self.active.bundle.manifest, model)
        self.task = assemble_task(plan, restored, rules=rules, samples=samples, joined_streams=self.joined_streams)

    @property
    def drift(self) -> DriftPart:
        """Drift detection of the task, which has one."""
        assert self.task.drift is not None
        return self.task.drift

    def restart(self) -> None:
        self.store.close()
        self.open()

    def feed(self, values: Floats, *, pause_s: float = 0.0) -> None:
        """Append one chunk of rows, `pause_s` after the last."""
        self.fed += int(pause_s * 1e6)
        t = T0 + self.fed + np.arange(len(values), dtype=np.int64) * STEP_US
        self.fed += len(values) * STEP_US
        columns = [np.arange(len(values), dtype="<f4"), *(np.ascontiguousarray(c) for c in values.T)]
        with self.store.transaction() as tx:
            tx.append("watch", Rows(t, tuple(columns)), "synced")

    def run(self, now: ClockReading = NOW) -> BatchResult | None:
        return batch.run(self.task, self.store, self.author, now)

    def run_all(self) -> list[BatchResult]:
        done = []
        while (result := self.run()) is not None:
            done.append(result)
        return done

    def messages(self) -> list[VerifiedMessage]:
        """Return the outbox messages, each verified, parsed and checked in its chain."""
        signer, opened = jws.Signer("pi-07", DEVICE.public), []
        for pending in self.store.unacknowledged_messages(0, 100_000):
            opened.append(verify_message(pending.topic, pending.payload, [pending.jws], lambda kid: signer))
        assert [m.body.prev for m in opened] == ["", *(digest(m.payload) for m in opened[:-1])][: len(opened)]  # type: ignore[union-attr]
        assert [m.body.seq for m in opened] == list(range(1, len(opened) + 1))  # type: ignore[union-attr]
        return opened

    def results(self) -> list[ResultsPayload]:
        return [m.body for m in self.messages() if isinstance(m.body, ResultsPayload)]


def tiles(results: Sequence[ResultsPayload]) -> tuple[int, int]:
    """Return the rows that messages cover, without gap or overlap."""
    for before, after in pairwise(results):
        assert after.rows[0] == before.rows[1] + 1
    return results[0].rows[0], results[-1].rows[1]


def expand_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a results message, read from JSON, with their runs expanded."""
    read = msgspec.convert(columns, ResultColumns)
    expanded = {"row": read.expand_rows(), "t": read.expand_times(), "label": read.expand_labels()}
    return columns | {name: values for name, values in expanded.items() if name in columns}


def columns(results: Sequence[ResultsPayload]) -> dict[str, list[Any]]:
    """Return all results in sequence, across messages."""
    joined: dict[str, list[Any]] = {}
    for message in results:
        for name, values in expand_columns(msgspec.to_builtins(message.columns)).items():
            joined.setdefault(name, []).extend(values or [])
    return joined

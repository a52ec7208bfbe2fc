"""Deployments: the bundle of each task by the newest `health` message, with start and actor of its activation."""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.evidence.format.contents import WRITE_LIMITS, BundleUsage, MessageRef, ModelRef, RunningTask
from outstation.evidence.gather.decisions import name_activator
from outstation.foundation import decoders
from outstation.protocol.wire.messages import AuditPayload, HealthPayload


class _Activation(msgspec.Struct, frozen=True):
    digest: str
    time: str
    decided_by: str
    message: MessageRef


class _UsageCounts(msgspec.Struct):
    model: ModelRef
    first: str
    last: str
    activations: int = 0
    devices: int = 0
    last_device: str = ""


class ActivationCollector(msgspec.Struct):
    """Newest activation of each (device, task), and the usage of each bundle.

    Messages arrive ordered by device, log and seq.
    """

    newest_logs: dict[str, str]
    omitted: int = 0
    _usage: dict[str, _UsageCounts] = msgspec.field(default_factory=dict)
    _latest: dict[tuple[str, str], _Activation] = msgspec.field(default_factory=dict)

    def add(self, body: AuditPayload) -> None:
        task, to = body.evidence.get("task"), body.evidence.get("to")
        if body.event != "activated" or not isinstance(task, str) or not isinstance(to, dict):
            return
        self._record_usage(body, to)
        key, known = (body.device, task), self._latest.get((body.device, task))
        # Logs arrive in no order of time: the newest log counts, then the later message.
        if known is None and len(self._latest) >= WRITE_LIMITS.tasks:
            self.omitted += 1
        elif known is None or self.newest_logs.get(body.device) == body.log or known.time <= body.time:
            message = MessageRef(body.device, body.log, body.seq)
            self._latest[key] = _Activation(str(to.get("digest")), body.time, name_activator(body), message)

    def build_history(self, tasks_by_digest: dict[str, int]) -> list[BundleUsage]:
        """Return every bundle that ever ran, oldest first. `tasks_by_digest`: digest → tasks that run it now."""
        history = [
            BundleUsage(
                model=usage.model,
                first=usage.first,
                last=usage.last,
                activations=usage.activations,
                devices=usage.devices,
                running_tasks=tasks_by_digest.get(digest, 0),
            )
            for digest, usage in self._usage.items()
        ]
        return sorted(history, key=lambda usage: (usage.first, usage.model))

    def _record_usage(self, body: AuditPayload, to: dict[str, Any]) -> None:
        model = parse_model_ref(to)
        if model is None:
            return
        usage = self._usage.get(model.digest)
        if usage is None:
            if len(self._usage) >= WRITE_LIMITS.models:
                self.omitted += 1
                return
            usage = self._usage[model.digest] = _UsageCounts(model, body.time, body.time)
        usage.first, usage.last = min(usage.first, body.time), max(usage.last, body.time)
        usage.activations += 1
        # Messages of one device are adjacent.
        usage.devices += usage.last_device != body.device
        usage.last_device = body.device

    def build_running_tasks(self, health: HealthPayload, agent: str) -> list[RunningTask]:
        """Return an entry for each task of a device."""
        running = []
        for task, state in sorted(health.tasks.items()):
            model, activation = parse_model_ref(state.get("model")), self._latest.get((health.device, task))
            if activation is not None and (model is None or activation.digest != model.digest):
                activation = None
            rollout = state.get("rollout")
            entry = RunningTask(
                device=health.device,
                task=task,
                model=model,
                agent=agent,
                reported_at=health.time,
                since=activation.time if activation else None,
                decided_by=activation.decided_by if activation else "unknown",
                health=MessageRef(health.device, health.log, health.seq),
                activated=activation.message if activation else None,
                rollout=rollout if isinstance(rollout, dict) else None,
            )
            running.append(entry)
        return running


class _AgentVersion(msgspec.Struct):
    agent: str = ""


def parse_agent_version(payload: bytes) -> str:
    """Return the agent version in a `health` message, "" if it has none."""
    try:
        return decoders.from_json(payload, _AgentVersion).agent[:64]
    except msgspec.MsgspecError:
        return ""


def parse_model_ref(value: object) -> ModelRef | None:
    """Return a model reported in a message, None if it is absent or malformed."""
    try:
        return decoders.convert(value, ModelRef)
    except msgspec.ValidationError:
        return None

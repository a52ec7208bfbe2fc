"""What runs where: by the newest health message of each device, since when and by whom by its `activated` messages."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.fleet.evidence.format.contents import WRITE_LIMITS, BundleUsage, MessageRef, ModelRef, RunningTask
from agent.fleet.evidence.gather.decisions import name_activator
from agent.wire.messages import AuditPayload, HealthPayload

_UNKNOWN_ACTOR = "not told in what is stored"


class _Activation(msgspec.Struct, frozen=True):
    digest: str
    time: str
    who: str
    place: MessageRef


class _UsageCounts(msgspec.Struct):
    model: ModelRef
    first: str
    last: str
    activations: int = 0
    devices: int = 0
    last_device: str = ""


class ActivationCollector(msgspec.Struct):
    """The newest activation of each (device, task), and when each bundle ran; messages come by device, log and seq."""

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
        # Logs come in no order of time: the newest log counts, then the later message.
        if known is None and len(self._latest) >= WRITE_LIMITS.tasks:
            self.omitted += 1
        elif known is None or self.newest_logs.get(body.device) == body.log or known.time <= body.time:
            place = MessageRef(body.device, body.log, body.seq)
            self._latest[key] = _Activation(str(to.get("digest")), body.time, name_activator(body), place)

    def build_history(self, tasks_by_digest: dict[str, int]) -> list[BundleUsage]:
        """Of each bundle that ever ran, oldest first; `running`: for how many tasks one does now, by digest."""
        found = [
            BundleUsage(
                model=past.model,
                first=past.first,
                last=past.last,
                activations=past.activations,
                devices=past.devices,
                running=tasks_by_digest.get(digest, 0),
            )
            for digest, past in self._usage.items()
        ]
        return sorted(found, key=lambda ran: (ran.first, ran.model))

    def _record_usage(self, body: AuditPayload, to: dict[str, Any]) -> None:
        model = parse_model_ref(to)
        if model is None:
            return
        past = self._usage.get(model.digest)
        if past is None:
            if len(self._usage) >= WRITE_LIMITS.models:
                self.omitted += 1
                return
            past = self._usage[model.digest] = _UsageCounts(model, body.time, body.time)
        past.first, past.last = min(past.first, body.time), max(past.last, body.time)
        past.activations += 1
        # Messages of a device lie beside each other.
        past.devices += past.last_device != body.device
        past.last_device = body.device

    def build_running_tasks(self, health: HealthPayload, agent: str) -> list[RunningTask]:
        """Of each task of a device."""
        return [self._build_running_task(health, agent, task, told) for task, told in sorted(health.tasks.items())]

    def _build_running_task(
        self, health: HealthPayload, agent: str, task: str, task_health: dict[str, Any]
    ) -> RunningTask:
        model, change = parse_model_ref(task_health.get("model")), self._latest.get((health.device, task))
        fits = change is not None and model is not None and change.digest == model.digest
        rollout = task_health.get("rollout")
        return RunningTask(
            device=health.device,
            task=task,
            model=model,
            agent=agent,
            told=health.time,
            since=change.time if change and fits else None,
            who=change.who if change and fits else _UNKNOWN_ACTOR,
            health=MessageRef(health.device, health.log, health.seq),
            activated=change.place if change and fits else None,
            rollout=rollout if isinstance(rollout, dict) else None,
        )


class _AgentVersion(msgspec.Struct):
    agent: str = ""


def parse_agent_version(payload: bytes) -> str:
    """The agent's version in a health message; "" where it tells none."""
    try:
        return msgspec.json.decode(payload, type=_AgentVersion).agent[:64]
    except msgspec.MsgspecError:
        return ""


def parse_model_ref(value: object) -> ModelRef | None:
    """Of what a message says that it runs; None for nothing, or nothing that makes sense."""
    try:
        return msgspec.convert(value, ModelRef)
    except msgspec.ValidationError:
        return None

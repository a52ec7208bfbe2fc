"""What runs where: by the newest health message of each device, since when and by whom by its `activated` messages."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.fleet.evidence.contents import Model, Place, Ran, Running
from agent.fleet.evidence.gather.decisions import who_activated
from agent.fleet.evidence.limits import MOST
from agent.wire.messages import Audit, Health

_NOT_TOLD = "not told in what is stored"


class _Change(msgspec.Struct, frozen=True):
    digest: str
    time: str
    who: str
    place: Place


class _Past(msgspec.Struct):
    model: Model
    first: str
    last: str
    activations: int = 0
    devices: int = 0
    device: str = ""


class Activations(msgspec.Struct):
    """The newest activation of each (device, task), and when each bundle ran; messages come by device, log and seq."""

    newest: dict[str, str]
    left_out: int = 0
    _history: dict[str, _Past] = msgspec.field(default_factory=dict)
    _last: dict[tuple[str, str], _Change] = msgspec.field(default_factory=dict)

    def add(self, body: Audit) -> None:
        task, to = body.evidence.get("task"), body.evidence.get("to")
        if body.event != "activated" or not isinstance(task, str) or not isinstance(to, dict):
            return
        self._remember(body, to)
        key, known = (body.device, task), self._last.get((body.device, task))
        # Logs come in no order of time: the newest log counts, then the later message.
        if known is None and len(self._last) >= MOST.tasks:
            self.left_out += 1
        elif known is None or self.newest.get(body.device) == body.log or known.time <= body.time:
            place = Place(body.device, body.log, body.seq)
            self._last[key] = _Change(str(to.get("digest")), body.time, who_activated(body), place)

    def history(self, running: dict[str, int]) -> list[Ran]:
        """Of each bundle that ever ran, oldest first; `running`: for how many tasks one does now, by digest."""
        found = [
            Ran(
                model=past.model,
                first=past.first,
                last=past.last,
                activations=past.activations,
                devices=past.devices,
                running=running.get(digest, 0),
            )
            for digest, past in self._history.items()
        ]
        return sorted(found, key=lambda ran: (ran.first, ran.model))

    def _remember(self, body: Audit, to: dict[str, Any]) -> None:
        model = model_of(to)
        if model is None:
            return
        past = self._history.get(model.digest)
        if past is None:
            if len(self._history) >= MOST.models:
                self.left_out += 1
                return
            past = self._history[model.digest] = _Past(model, body.time, body.time)
        past.first, past.last = min(past.first, body.time), max(past.last, body.time)
        past.activations += 1
        # Messages of a device lie beside each other.
        past.devices += past.device != body.device
        past.device = body.device

    def running(self, health: Health, agent: str) -> list[Running]:
        """Of each task of a device."""
        return [self._of(health, agent, task, told) for task, told in sorted(health.tasks.items())]

    def _of(self, health: Health, agent: str, task: str, told: dict[str, Any]) -> Running:
        model, change = model_of(told.get("model")), self._last.get((health.device, task))
        fits = change is not None and model is not None and change.digest == model.digest
        rollout = told.get("rollout")
        return Running(
            device=health.device,
            task=task,
            model=model,
            agent=agent,
            told=health.time,
            since=change.time if change and fits else None,
            who=change.who if change and fits else _NOT_TOLD,
            health=Place(health.device, health.log, health.seq),
            activated=change.place if change and fits else None,
            rollout=rollout if isinstance(rollout, dict) else None,
        )


class _Agent(msgspec.Struct):
    agent: str = ""


def agent_version(payload: bytes) -> str:
    """The agent's version in a health message; "" where it tells none."""
    try:
        return msgspec.json.decode(payload, type=_Agent).agent[:64]
    except msgspec.MsgspecError:
        return ""


def model_of(told: object) -> Model | None:
    """Of what a message says that it runs; None for nothing, or nothing that makes sense."""
    try:
        return msgspec.convert(told, Model)
    except msgspec.ValidationError:
        return None

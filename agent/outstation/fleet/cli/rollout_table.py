"""Rollout status on the terminal, printed once or as a live table. Imported on use: it needs `rich`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from outstation.foundation.cli.output import echo
from outstation.foundation.text import list_names, printable

REFRESH_S = 2.0
_STATE_COLORS = {"running": "green", "paused": "yellow", "aborted": "bold red", "finished": "bold green"}
_RULE_COLORS = {"passed": "green", "undecided": "yellow", "failed": "bold red"}
_MAX_NAMED, _MAX_DECISIONS = 12, 5
Documents = list[dict[str, Any]]


def show(documents: Documents) -> None:
    if not documents:
        echo("No rollout was ever started: outstation fleet rollout start FILE")
        return
    Console(highlight=False, soft_wrap=True).print(_render(documents))


def watch(load: Callable[[], Documents]) -> None:
    """Show a live table until interrupted."""
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(_render(load()), refresh=True)
            time.sleep(REFRESH_S)


def _render(documents: Documents) -> Group:
    parts: list[RenderableType] = []
    for document in documents:
        phases = [f"{count} {phase}" for phase, count in document["phases"].items()] or ["none"]
        others = f"; {document['unselected']} not in this step" if document["unselected"] else ""
        parts += [_render_heading(document), _render_steps(document)]
        parts += [Text(f"  {document['selected']} devices: {', '.join(phases)}{others}")]
        parts += [*_render_rules(document), *_render_details(document), Text("")]
    return Group(*parts)


def _render_heading(document: dict[str, Any]) -> Text:
    bundle = f"{document['bundle']} {document['version']}"
    heading = f"{document['rollout']}  {document['task']}: {bundle} to {document['target']}  "
    text = Text(printable(heading), "bold")
    text.append(document["state"], _STATE_COLORS.get(document["state"], ""))
    if document["deadline"]:
        late = ", late" if document["late"] else ""
        text.append(f"  deadline {document['deadline']}{late}", "red" if document["late"] else "dim")
    return text


def _render_steps(document: dict[str, Any]) -> Text:
    text = Text("  ")
    current = document["step"]
    for number, step in enumerate(document["steps"], 1):
        label = step["strategy"] if step["strategy"] == "all" else f"{step['strategy']} {step['percent']:g} %"
        text.append(label, "bold reverse" if number == current else "" if number < current else "dim")
        is_last = number == len(document["steps"])
        text.append(f"   step {current} since {document['step_started']}" if is_last else " → ")
    return text


def _render_rules(document: dict[str, Any]) -> list[RenderableType]:
    if not document["rules"]:
        return []
    table = Table("rule", "value", "95 % interval", "limit", "blocks", "devices", "", box=box.SIMPLE_HEAD)
    for rule in document["rules"]:
        known = rule["value"] is not None
        numbers = (f"{rule['value']:.3f}", f"{rule['low']:.3f} … {rule['high']:.3f}") if known else ("", "")
        counts = (f"{rule['limit']:g}", str(rule["blocks"]), str(rule["devices"]))
        table.add_row(rule["rule"], *numbers, *counts, Text(rule["state"], _RULE_COLORS[rule["state"]]))
    return [table]


def _render_details(document: dict[str, Any]) -> list[Text]:
    lines = []
    if document["blockers"]:
        lines.append(Text(f"  blocked by: {'; '.join(document['blockers'])}", "yellow"))
    if document["not_reported"]:
        names = list_names(document["not_reported"], _MAX_NAMED)
        lines.append(Text(printable(f"  not reported: {names}"), "dim"))
    devices = {device["device"]: device for device in document["devices"]}
    for name in document["rejected"][:_MAX_NAMED]:
        device, style = devices[name], "red" if name in document["failed"] else "dim"
        lines.append(Text(printable(f"  {name}: {device['phase']} ({device['reason']}): {device['summary']}"), style))
    if len(document["rejected"]) > _MAX_NAMED:
        lines.append(Text(f"  and {len(document['rejected']) - _MAX_NAMED} more; --json lists all"))
    for report in document["implausible"][:_MAX_NAMED]:
        count = f"implausible messages: {report['messages']}"
        lines.append(Text(printable(f"  {report['device']}: {count}, the last: {report['reason']}"), "red"))
    newest = document["decisions"][-_MAX_DECISIONS:]
    return lines + [Text(printable(f"  {decision['time']}  {decision['summary']}")) for decision in newest]

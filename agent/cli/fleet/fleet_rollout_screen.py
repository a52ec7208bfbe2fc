"""Roll-outs on the terminal: as they stand, or as a live table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.text import printable

REFRESH_S = 2.0
_STATE_COLORS = {"running": "green", "paused": "yellow", "aborted": "bold red", "finished": "bold green"}
_RULE_COLORS = {"passed": "green", "undecided": "yellow", "failed": "bold red"}
_MAX_NAMED = 12
Documents = list[dict[str, Any]]


def show(documents: Documents) -> None:
    if not documents:
        click.echo("No roll-out was ever started: outstation fleet rollout start FILE")
        return
    Console(highlight=False, soft_wrap=True).print(_render(documents))


def watch(load: Callable[[], Documents]) -> None:
    """Until it is interrupted."""
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(_render(load()), refresh=True)
            time.sleep(REFRESH_S)


def _render(documents: Documents) -> Group:
    parts: list[RenderableType] = []
    for one in documents:
        parts += [
            _render_heading(one),
            *_render_steps(one),
            _render_phases(one),
            *_render_rules(one),
            *_render_details(one),
            Text(""),
        ]
    return Group(*parts)


def _render_heading(document: dict[str, Any]) -> Text:
    text = Text(
        printable(
            f"{document['rollout']}  {document['task']}: {document['bundle']} {document['version']} to {document['target']}  "
        ),
        "bold",
    )
    text.append(document["state"], _STATE_COLORS.get(document["state"], ""))
    if document["deadline"]:
        text.append(
            f"  deadline {document['deadline']}" + (", late" if document["late"] else ""),
            "red" if document["late"] else "dim",
        )
    return text


def _render_steps(document: dict[str, Any]) -> list[RenderableType]:
    text = Text("  ")
    for number, step in enumerate(document["steps"], 1):
        words = step["strategy"] if step["strategy"] == "all" else f"{step['strategy']} {step['percent']:g} %"
        text.append(words, "bold reverse" if number == document["step"] else "" if number < document["step"] else "dim")
        text.append(
            " → " if number < len(document["steps"]) else f"   step {document['step']} since {document['step_started']}"
        )
    return [text]


def _render_phases(document: dict[str, Any]) -> Text:
    said = [f"{count} {phase}" for phase, count in document["phases"].items()] or ["none"]
    beyond = f"; {document['unselected']} not in this step" if document["unselected"] else ""
    return Text(f"  {document['selected']} devices: {', '.join(said)}{beyond}")


def _render_rules(document: dict[str, Any]) -> list[RenderableType]:
    if not document["rules"]:
        return []
    table = Table("rule", "value", "95 % interval", "limit", "blocks", "devices", "", box=box.SIMPLE_HEAD)
    for found in document["rules"]:
        known = found["value"] is not None
        numbers = (f"{found['value']:.3f}", f"{found['low']:.3f} … {found['high']:.3f}") if known else ("", "")
        counts = (f"{found['limit']:g}", str(found["blocks"]), str(found["devices"]))
        table.add_row(found["rule"], *numbers, *counts, Text(found["state"], _RULE_COLORS[found["state"]]))
    return [table]


def _render_details(document: dict[str, Any]) -> list[RenderableType]:
    lines = []
    if document["blockers"]:
        lines.append(Text(f"  waits for: {'; '.join(document['blockers'])}", "yellow"))
    if document["not_reported"]:
        lines.append(Text(printable(f"  not reported: {_join_names(document['not_reported'])}"), "dim"))
    told = {device["device"]: device for device in document["devices"]}
    for name in document["rejected"][:_MAX_NAMED]:
        why, style = told[name], "red" if name in document["failed"] else "dim"
        lines.append(Text(printable(f"  {name}: {why['phase']} ({why['reason']}): {why['summary']}"), style))
    if len(document["rejected"]) > _MAX_NAMED:
        lines.append(Text(f"  and {len(document['refused']) - _MAX_NAMED} more; --json names all"))
    for strange in document["implausible"][:_MAX_NAMED]:
        count = f"implausible messages: {strange['messages']}"
        lines.append(Text(printable(f"  {strange['device']}: {count}, the last: {strange['reason']}"), "red"))
    lines += [Text(printable(f"  {one['time']}  {one['summary']}")) for one in document["decisions"][-5:]]
    return list(lines)


def _join_names(names: Sequence[str]) -> str:
    beyond = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + beyond

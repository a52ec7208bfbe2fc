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

LOOK_EVERY_S = 2.0
_STATES = {"running": "green", "paused": "yellow", "aborted": "bold red", "finished": "bold green"}
_FINDINGS = {"good": "green", "open": "yellow", "bad": "bold red"}
_MOST_NAMED = 12
Documents = list[dict[str, Any]]


def show(documents: Documents) -> None:
    if not documents:
        click.echo("No roll-out was ever started: outstation fleet rollout start FILE")
        return
    Console(highlight=False, soft_wrap=True).print(_all(documents))


def watch(look: Callable[[], Documents]) -> None:
    """Until it is interrupted."""
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(_all(look()), refresh=True)
            time.sleep(LOOK_EVERY_S)


def _all(documents: Documents) -> Group:
    parts: list[RenderableType] = []
    for one in documents:
        parts += [_head(one), *_steps(one), _phases(one), *_findings(one), *_lines(one), Text("")]
    return Group(*parts)


def _head(one: dict[str, Any]) -> Text:
    text = Text(
        printable(f"{one['rollout']}  {one['task']}: {one['bundle']} {one['version']} to {one['to']}  "), "bold"
    )
    text.append(one["state"], _STATES.get(one["state"], ""))
    if one["deadline"]:
        text.append(
            f"  deadline {one['deadline']}" + (", late" if one["late"] else ""), "red" if one["late"] else "dim"
        )
    return text


def _steps(one: dict[str, Any]) -> list[RenderableType]:
    text = Text("  ")
    for number, step in enumerate(one["steps"], 1):
        words = step["strategy"] if step["strategy"] == "all" else f"{step['strategy']} {step['percent']:g} %"
        text.append(words, "bold reverse" if number == one["step"] else "" if number < one["step"] else "dim")
        text.append(" → " if number < len(one["steps"]) else f"   step {one['step']} since {one['began']}")
    return [text]


def _phases(one: dict[str, Any]) -> Text:
    said = [f"{count} {phase}" for phase, count in one["phases"].items()] or ["none"]
    beyond = f"; {one['others']} not in this step" if one["others"] else ""
    return Text(f"  {one['chosen']} devices: {', '.join(said)}{beyond}")


def _findings(one: dict[str, Any]) -> list[RenderableType]:
    if not one["findings"]:
        return []
    table = Table("rule", "value", "95 % interval", "limit", "blocks", "devices", "", box=box.SIMPLE_HEAD)
    for found in one["findings"]:
        known = found["value"] is not None
        numbers = (f"{found['value']:.3f}", f"{found['low']:.3f} … {found['high']:.3f}") if known else ("", "")
        counts = (f"{found['limit']:g}", str(found["blocks"]), str(found["devices"]))
        table.add_row(found["rule"], *numbers, *counts, Text(found["state"], _FINDINGS[found["state"]]))
    return [table]


def _lines(one: dict[str, Any]) -> list[RenderableType]:
    lines = []
    if one["waits"]:
        lines.append(Text(f"  waits for: {'; '.join(one['waits'])}", "yellow"))
    if one["not_heard_of"]:
        lines.append(Text(printable(f"  not heard of: {_names(one['not_heard_of'])}"), "dim"))
    told = {device["device"]: device for device in one["devices"]}
    for name in one["refused"][:_MOST_NAMED]:
        why, style = told[name], "red" if name in one["failed"] else "dim"
        lines.append(Text(printable(f"  {name}: {why['phase']} ({why['reason']}): {why['summary']}"), style))
    if len(one["refused"]) > _MOST_NAMED:
        lines.append(Text(f"  and {len(one['refused']) - _MOST_NAMED} more; --json names all"))
    for strange in one["unbelievable"][:_MOST_NAMED]:
        count = f"messages that cannot be believed: {strange['messages']}"
        lines.append(Text(printable(f"  {strange['device']}: {count}, the last: {strange['why']}"), "red"))
    lines += [Text(printable(f"  {one['time']}  {one['summary']}")) for one in one["decisions"][-5:]]
    return list(lines)


def _names(names: Sequence[str]) -> str:
    beyond = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + beyond

"""The command line. Commands are thin, and loaded only when they are used."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from agent import __version__
from agent.errors import OutstationError, UsageError

_COMMANDS = {
    "demo": "agent.cli.demo:demo",
    "init": "agent.cli.init:init",
    "check": "agent.cli.check:check",
    "run": "agent.cli.run:run",
    "batch": "agent.cli.batch:batch",
    "ingest": "agent.cli.ingest:ingest",
    "label": "agent.cli.label:label",
    "status": "agent.cli.status:status",
    "cost": "agent.cli.cost:cost",
    "drift": "agent.cli.drift:drift",
    "model": "agent.cli.model:model",
    "reference": "agent.cli.reference:reference",
    "fleet": "agent.cli.fleet:fleet",
}


class _Lazy(click.Group):
    """Imports a command's module only to run it, or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="outstation")
def cli() -> None:
    """Buffer readings at the edge, run models over them in batches, report signed results.

    \b
    Try it:    outstation demo
    A device:  outstation init DIR; outstation check; outstation run
    A fleet:   outstation fleet init DIR; outstation fleet enrol DEVICE; outstation fleet collect
    """


def main(args: list[str] | None = None) -> Any:
    """Exit 0 done, 1 done and the answer is bad, 2 wrong use or config."""
    try:
        return cli.main(args, prog_name="outstation", standalone_mode=True)
    except UsageError as error:
        click.echo(f"outstation: {error}", err=True)
        sys.exit(2)
    except OutstationError as error:
        click.echo(f"outstation: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

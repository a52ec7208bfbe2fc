"""List of commands, and what is said about their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from outstation import __version__
from outstation.foundation.cli.direct import import_command
from outstation.foundation.entry_points import GUIDE, find_entry_points, load_entry_point, name_packages
from outstation.foundation.errors import OutstationError, StorageMoved, UsageError, explain
from outstation.foundation.text import is_unicode, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Module and summary of each command: the list of commands loads none of them.
_COMMANDS = {
    "demo": ("outstation.workbench.cli.demo:demo", "Run the whole system on this machine, with faults."),
    "init": ("outstation.device.cli.init:init", "Write a commented outstation.toml and a device key."),
    "request": (
        "outstation.device.cli.joining.request:request",
        "Make the device's keys and a request to join a fleet.",
    ),
    "join": (
        "outstation.device.cli.joining.join:join",
        "Join a fleet with the operator's answer; data and streams stay.",
    ),
    "check": ("outstation.device.cli.check:check", "Check config, keys, bundles, storage, clock and broker."),
    "doctor": (
        "outstation.device.cli.doctor.doctor:doctor",
        "Mend what is wrong; flash wear, power, an archive for support.",
    ),
    "run": ("outstation.device.cli.processing:run", "Run the daemon in the foreground."),
    "batch": ("outstation.device.cli.processing:batch", "Process the backlog of tasks once, and stop."),
    "ingest": ("outstation.device.cli.data.ingest:ingest", "Add readings from CSV, JSON Lines or Parquet."),
    "client": ("outstation.device.cli.data.client:client", "Print the Python client as one file for other programs."),
    "label": ("outstation.device.cli.labelling.label:label", "Add ground-truth labels to results."),
    "verdict": ("outstation.device.cli.labelling.verdict:verdict", "Confirm or correct a result."),
    "label-next": ("outstation.device.cli.labelling.verdict:label_next", "Show which results to label next."),
    "label-token": (
        "outstation.device.cli.labelling.verdict:label_token",
        "Show the token with which a program labels.",
    ),
    "status": ("outstation.device.cli.status:status", "Show backlog, tasks, bundles, outbox, clock and alerts."),
    "results": ("outstation.device.cli.data.results:results", "Show what the models said last, and follow it."),
    "tail": ("outstation.device.cli.data.tail:tail", "Show the newest readings of a stream, and follow them."),
    "db": (
        "outstation.device.cli.data.database:database_group",
        "Look into the store: tables, rows, SQL, readings as CSV.",
    ),
    "metrics": ("outstation.device.cli.metrics:metrics", "Show numbers of this device for Prometheus."),
    "privacy": (
        "outstation.device.cli.owner.privacy:privacy",
        "Show what leaves the device of each field, with an example.",
    ),
    "disclose": ("outstation.device.cli.owner.disclose:disclose", "Show an auditor the rows behind a signed message."),
    "head": ("outstation.device.cli.head:head", "Sign the end of the message log for an auditor."),
    "cost": ("outstation.device.cli.cost:cost", "Show processor time, flash writes, network bytes, energy."),
    "drift": ("outstation.device.cli.drift:drift", "Show drift of a task's readings from its site's reference."),
    "notify": ("outstation.device.cli.notify:notify", "Test the targets of notifications, and show what waits."),
    "model": ("outstation.workbench.cli.model.group:model", "Make, sign, check, evaluate and run bundles."),
    "reference": ("outstation.device.cli.reference:reference", "Show, relearn or accept the site reference of a task."),
    "fleet": ("outstation.fleet.cli.group:fleet", "Run the fleet's side: enrol, collect, watch, command, audit."),
}

# Commands of other packages: a shipped name comes first, so none can be replaced.
_ENTRY_POINTS = "outstation.commands"
# Groups whose commands may multiply large matrices.
_MULTIPLY_MATRICES = {"model", "fleet"}
# Set in the environment, an error that no command handles ends with its traceback.
_TRACEBACK_VARIABLE = "OUTSTATION_TRACEBACK"


class _LazyGroup(click.Group):
    """Imports a command's module only to run it, or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *_find_foreign()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return _load_foreign(cmd_name)
        command: click.Command = import_command(_COMMANDS[cmd_name][0])
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0] if args else "-"
        if word in _COMMANDS and word not in _MULTIPLY_MATRICES:
            # Threads of NumPy's BLAS spin for tens of milliseconds when they start, and are of no use here.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        if not word.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, word) is None:
            raise click.UsageError(f"no such command {word!r}{_suggest_command(word)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])
        if foreign := _find_foreign():
            with formatter.section("Commands of other packages"):
                formatter.write_dl([(name, f"From {name_packages(points)}.") for name, points in foreign.items()])


def _find_foreign() -> dict[str, list[EntryPoint]]:
    installed = find_entry_points(_ENTRY_POINTS)
    return {name: installed[name] for name in sorted(installed.keys() - _COMMANDS.keys())}


def _load_foreign(name: str) -> click.Command | None:
    """Import another package's command; None if none has it. Raises UsageError."""
    entry_points = _find_foreign().get(name)
    if entry_points is None:
        return None
    command = load_entry_point(name, entry_points)
    if not isinstance(command, click.Command):
        problem = f"{entry_points[0].value} is no click command; see {GUIDE}"
        raise UsageError(f"{name!r} of package {name_packages(entry_points)} cannot run: {problem}")
    return command


def _suggest_command(word: str) -> str:
    """Return a hint at the command that is meant, which may be one of a group, or ""."""
    import difflib

    if close := difflib.get_close_matches(word, [*_COMMANDS, *_find_foreign()], 1):
        return f"; did you mean {close[0]!r}?"
    for group in ("fleet", "model"):
        if close_below := import_command(_COMMANDS[group][0]).find_similar(click.Context(cli), word):
            return f"; did you mean `outstation {group} {close_below}`?"
    return ""


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="outstation")
def cli() -> None:
    """Buffer readings at the edge, run models over them in batches, report signed results.

    \b
    Try it:    outstation demo
    One Pi:    outstation init DIR --standalone; outstation check; outstation run
    A fleet:   outstation fleet init DIR; outstation fleet collect; outstation fleet invite DEVICE
    """


def report_error(error: Exception | KeyboardInterrupt, args: Sequence[str]) -> int:
    """Print one line about an error that ended a command, and return the exit code; with the variable, raise it."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, click.ClickException):
        code, text = error.exit_code, _describe_misuse(error)
    elif isinstance(error, click.Abort | KeyboardInterrupt):
        code, text = 1, "interrupted"
    elif os.environ.get(_TRACEBACK_VARIABLE):
        raise error
    else:
        code, text = _describe_error(error, args)
        text = "; ".join(text.splitlines())
    click.echo(f"outstation: {printable(text)}", err=True)
    return code


def _describe_misuse(error: click.ClickException) -> str:
    """Return one line about a wrong command, option or argument, with a hint or the command that shows the use."""
    text = error.format_message().rstrip(".")
    text = text[:1].lower() + text[1:]
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "outstation"
    for before, after in ((". Did you mean", "; did you mean"), (". (Did you mean", "; did you mean"), ("?)", "?")):
        text = text.replace(before, after)
    help_hint = "" if "did you mean" in text else f"; `{command} --help` shows its use"
    if isinstance(error, click.NoSuchOption) and context and isinstance(context.command, click.Group):
        help_hint = f"; options follow the command: `{command} COMMAND {error.option_name}`"
    where = command.removeprefix("outstation").strip()
    return f"{where}: {text}{help_hint}" if where else f"{text}{help_hint}"


def _describe_error(error: Exception, args: Sequence[str]) -> tuple[int, str]:
    """Return the exit code and one line about an error that no command has handled."""
    if isinstance(error, StorageMoved):
        # A service manager must not start again: see deploy/outstation.service.
        return 3, str(error)
    if isinstance(error, OutstationError):
        return (2 if isinstance(error, UsageError) else 1), str(error)
    if isinstance(error, UnicodeEncodeError) and (bad := [arg for arg in args if not is_unicode(arg)]):
        return 2, f"{bad[0]}: this argument holds bytes that are not UTF-8, which only the path of a file may"
    if isinstance(error, OSError) and error.strerror:
        if not isinstance(error.filename, str | bytes):
            return 1, f"the system refuses: {error.strerror}; free what is short, and try again"
        place = os.fsdecode(error.filename)
        return 1, f"{place}: {explain(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "outstation":
        package = error.name.partition(".")[0]
        from outstation.foundation.extras import find_extra, install_command

        extra = find_extra(package)
        command = install_command(extra) if extra else f"pip install {package}"
        return 1, f"this command needs the package {package!r}, which is not installed: {command}"
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(os.path.dirname(frame.filename))}/{os.path.basename(frame.filename)}:{frame.lineno}"
    foreign = _find_foreign().get(args[0]) if args else None
    package = name_packages(foreign) if foreign else "outstation"
    return 1, (
        f"internal error: {type(error).__name__}: {error} ({place}); this is a defect of {package}: report it with "
        f"the traceback, which {_TRACEBACK_VARIABLE}=1 shows"
    )

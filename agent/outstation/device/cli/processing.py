"""Commands `outstation run` and `outstation batch` as click shows and parses them."""

from __future__ import annotations

import click

from outstation.foundation.cli.options import config_option, config_options


@click.command(epilog="Example: outstation run -c /etc/outstation/outstation.toml")
@config_option
@click.option("-v", "--verbose", is_flag=True, help="Log debug messages.")
def run(config_file: str | None, verbose: bool) -> None:
    """Run the daemon in the foreground; SIGTERM or Ctrl-C stops it gracefully, SIGHUP reloads its config."""
    from outstation.device.cli import run as command

    command.run(config_file, verbose)


@click.command(epilog="Example: outstation batch exercise")
@click.argument("task", required=False)
@config_options
def batch(task: str | None, config_file: str | None, as_json: bool) -> None:
    """Process the backlog of TASK (or of all tasks) once, and stop. Messages stay in the outbox for `run` to send."""
    from outstation.device.cli import batch as command

    command.batch(task, config_file, as_json)

"""Spare model process: it imports the runtime while this process imports the modules of its command."""

from __future__ import annotations

import click

from agent import config
from agent.bootstrap.owner import become_owner
from agent.cli.output import config_option
from agent.errors import UsageError
from agent.model.sandbox import launch


def prepare(ctx: click.Context, args: list[str]) -> None:
    """Start the process of a command's first model, with the rights of the device's owner.

    None is started if the device has no task, or runs models in the daemon. Raises UsageError, but not for an invalid
    config: the command reports that.
    """
    try:
        conf = config.load(config.find(_read_options.make_context("", args, parent=ctx).params["config_file"]))
    except (UsageError, click.UsageError):
        return
    become_owner(conf.data_dir)
    if conf.tasks and conf.models.confinement != "off":
        launch.prepare_spare()
        ctx.call_on_close(launch.discard_spare)


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@config_option
def _read_options(config_file: str | None) -> None:
    """Read the option that names the config; other options stay for the command."""

"""Groups of commands whose list shows the whole first sentence of each command."""

from __future__ import annotations

import click


class SentenceGroup(click.Group):
    """A group that wraps summaries in its help; click cuts them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(limit=1000)) for name, command in commands if command is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

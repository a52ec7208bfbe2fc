"""Groups of commands: imported when they are used, listed under headings by whole sentences, forgiving of a typo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from outstation.foundation.cli.direct import import_command


class SentenceGroup(click.Group):
    """A group that wraps summaries in its help; click cuts them.

    `places` names `module:attribute` of commands that are imported when they are used. `headings` orders the list of
    commands. `short_forms` are further names of commands in groups below, which the list leaves out.
    """

    def __init__(
        self,
        *args: Any,
        places: Mapping[str, str] | None = None,
        headings: Mapping[str, Sequence[str]] | None = None,
        short_forms: Mapping[str, tuple[str, str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._places, self._headings, self._short_forms = places or {}, headings or {}, short_forms or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = sorted({*super().list_commands(ctx), *self._places})
        ordered = [name for listed in self._headings.values() for name in listed]
        return [*ordered, *(name for name in names if name not in ordered)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._places:
            command: click.Command = import_command(self._places[cmd_name])
            return command
        if cmd_name in self._short_forms:
            name, below = self._short_forms[cmd_name]
            group = self.get_command(ctx, name)
            assert isinstance(group, click.Group)
            return group.get_command(ctx, below)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        listed = {name for under in self._headings.values() for name in under}
        others = [name for name in names if name not in listed]
        for heading, under in [*self._headings.items(), *([("Commands", others)] if others else [])]:
            commands = [(name, self.get_command(ctx, name)) for name in under]
            rows = [(name, command.get_short_help_str(limit=1000)) for name, command in commands if command is not None]
            with formatter.section(heading):
                # One column for all headings.
                width = max(map(len, names)) - max(len(name) for name, _ in rows)
                formatter.write_dl(rows, col_spacing=2 + width)

    def find_similar(self, ctx: click.Context, word: str) -> str:
        """Return the words that call the command which `word` may mean, or ""."""
        import difflib

        words = {short: " ".join(path) for short, path in self._short_forms.items()}
        words |= {name: name for name in self.list_commands(ctx)}
        close = difflib.get_close_matches(word, words, 1)
        return words[close[0]] if close else ""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Commands that are imported when they are used are unknown to click.
        known = {*self.list_commands(ctx), *self._short_forms}
        if args[0] not in known and not args[0].startswith("-") and not ctx.resilient_parsing:
            close = self.find_similar(ctx, args[0])
            hint = f"; did you mean {close!r}?" if close else ""
            raise click.UsageError(f"no such command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

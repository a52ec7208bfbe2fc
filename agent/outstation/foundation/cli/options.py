"""Options that several commands have, and values that name a time: a time, or how long ago."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from outstation.foundation import clock
from outstation.foundation.config.quantities import parse_duration, parse_size
from outstation.foundation.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


class _Parsed(click.ParamType):  # type: ignore[type-arg]
    """A value with a unit or of a time, parsed from text by a function that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            raise UsageError(f"{param.opts[0] if param else self.name}: {error}") from None


def _parse_moment(text: str) -> str:
    try:
        return clock.to_rfc3339(clock.read().wall_us - int(float(parse_duration(text)) * 1e6))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f'{text!r}: use a duration ("24 h", "7 d") or time (2026-11-24T22:18:00Z)') from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return clock.to_rfc3339(int(moment.timestamp() * 1e6))


# Plain numbers: what takes them over may be encoded.
DURATION = _Parsed("time", lambda text: float(parse_duration(text)))
SIZE = _Parsed("size", lambda text: int(parse_size(text)))
# A time, or the time a duration ago, as RFC 3339.
MOMENT = _Parsed("time", _parse_moment)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
config_option = click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    help="Config file; default $OUTSTATION_CONFIG, ./outstation.toml, /etc/outstation/outstation.toml.",
)


def config_options(command: Command) -> Command:
    """Add `--config` and `--json`."""
    return config_option(json_option(command))


def _default_author() -> str:
    """Return the user's name, in the letters that names of authors have."""
    import getpass

    return re.sub(r"[^a-z0-9._-]", "-", getpass.getuser().lower()).lstrip("._-")[:64] or "operator"


by_option = click.option(
    "--by", metavar="NAME", default=_default_author, help="Name to record; default: your user name."
)
note_option = click.option("--note", metavar="TEXT", default="", help="Reason to record.")
plot_option = click.option("--plot", metavar="FILE", type=PATH, help="Write a plot, .svg or .png.")
dark_option = click.option("--dark", is_flag=True, help="With --plot: dark theme.")
require_clean_option = click.option(
    "--require-clean",
    is_flag=True,
    help="Exit code 1 if the check for poisoning has a finding, or too few labels to run.",
)

"""Progress on stderr after one second of work: a bar in a terminal; else a line now and then, if `has_lines`."""

from __future__ import annotations

import math
import sys
import time

import click

_DELAY_S, _REFRESH_S, _WIDTH = 1.0, 0.2, 28
# Without a terminal: seconds between lines.
_LINE_S = 10.0


class ProgressBar:
    """Use as `with ProgressBar("rows") as bar: bar(done, total, count)`."""

    def __init__(self, unit: str, *, has_lines: bool = False) -> None:
        self._unit, self._started_s = unit, time.monotonic()
        self._drawn = False
        self._terminal = sys.stderr.isatty()
        self._next_s = self._started_s + (_DELAY_S if self._terminal else _LINE_S if has_lines else math.inf)

    def __call__(self, done: int, total: int, count: int) -> None:
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + (_REFRESH_S if self._terminal else _LINE_S)
        share = min(1.0, done / max(1, total))
        seconds = now - self._started_s
        left = f", {_format_duration(seconds / share - seconds)} left" if share > 0 else ""
        text = f"{share:4.0%}  {count:,} {self._unit}, {count / seconds:,.0f}/s{left}"
        if self._terminal:
            full = int(share * _WIDTH)
            text, self._drawn = f"\r\x1b[K{'█' * full}{'░' * (_WIDTH - full)} {text}", True
        click.echo(text, nl=not self._terminal, err=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            click.echo("\r\x1b[K", nl=False, err=True)


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

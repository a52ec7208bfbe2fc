"""Progress bar on stderr, in a terminal only, after one second of work."""

from __future__ import annotations

import sys
import time

import click

_DELAY_S, _REFRESH_S, _WIDTH = 1.0, 0.2, 28


class ProgressBar:
    """Use as `with ProgressBar("rows") as bar: bar(done, total, count)`."""

    def __init__(self, unit: str) -> None:
        self._unit, self._started_s = unit, time.monotonic()
        self._last_drawn_s = self._started_s + _DELAY_S - _REFRESH_S
        self._drawn = False
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int, count: int) -> None:
        now = time.monotonic()
        if not self._terminal or now - self._last_drawn_s < _REFRESH_S:
            return
        self._last_drawn_s, self._drawn = now, True
        share = min(1.0, done / max(1, total))
        full = int(share * _WIDTH)
        seconds = now - self._started_s
        left = f", {_format_duration(seconds / share - seconds)} left" if share > 0 else ""
        text = (
            f"{'█' * full}{'░' * (_WIDTH - full)} {share:4.0%}  {count:,} {self._unit}, {count / seconds:,.0f}/s{left}"
        )
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            click.echo("\r\x1b[K", nl=False, err=True)


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

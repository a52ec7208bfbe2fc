"""A progress bar on stderr, once work took a second, and only in a terminal."""

from __future__ import annotations

import sys
import time

import click

_AFTER_S, _EVERY_S, _WIDTH = 1.0, 0.2, 28


class Bar:
    """Used as `with Bar("rows") as bar: bar(done, of, count)`."""

    def __init__(self, what: str) -> None:
        self._what, self._begun = what, time.monotonic()
        self._shown = self._begun + _AFTER_S - _EVERY_S
        self._drawn = False
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, of: int, count: int) -> None:
        now = time.monotonic()
        if not self._terminal or now - self._shown < _EVERY_S:
            return
        self._shown, self._drawn = now, True
        share = min(1.0, done / max(1, of))
        full = int(share * _WIDTH)
        seconds = now - self._begun
        left = f", {_spell(seconds / share - seconds)} left" if share > 0 else ""
        text = (
            f"{'█' * full}{'░' * (_WIDTH - full)} {share:4.0%}  {count:,} {self._what}, {count / seconds:,.0f}/s{left}"
        )
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            click.echo("\r\x1b[K", nl=False, err=True)


def _spell(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

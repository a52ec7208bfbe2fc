"""Transcript of one run: each party's attempts against real processes, what happened, and whether the promise held."""

from __future__ import annotations

import tempfile
import textwrap
import time
from pathlib import Path

import click
import msgspec

from outstation.foundation.text import printable
from scripts.attacks.attempts import ATTEMPTS, PARTIES, Attempt
from scripts.attacks.parties import Parties, meet

_WIDTH = 118


class Entry(msgspec.Struct, frozen=True):
    """An attempt with its outcome; `error` if it could not be carried out."""

    attempt: Attempt
    succeeded: bool
    happened: str
    error: bool = False

    @property
    def held(self) -> bool:
        return not self.error and self.succeeded == self.attempt.may

    @property
    def verdict(self) -> str:
        if not self.held:
            return "BROKEN"
        return "could" if self.attempt.may else "could not"


def run(folder: Path) -> list[Entry]:
    """Let each party make its attempts, and print them as they happen."""
    entries: list[Entry] = []
    with meet(folder) as parties:
        for attempt in ATTEMPTS:
            if not entries or entries[-1].attempt.party != attempt.party:
                click.echo(f"\n{attempt.party} ({PARTIES[attempt.party]})")
            entries.append(_act(parties, attempt))
            _print_entry(entries[-1])
    return entries


def _act(parties: Parties, attempt: Attempt) -> Entry:
    try:
        succeeded, happened = attempt.act(parties)
    except Exception as error:  # An attempt that cannot be carried out proves nothing, and must not hide the others.
        return Entry(attempt, False, f"{type(error).__name__}: {error}", error=True)
    return Entry(attempt, succeeded, happened)


def _print_entry(entry: Entry) -> None:
    happened = textwrap.wrap(printable(entry.happened)[:400], _WIDTH - 12) or [""]
    click.echo(f"  {entry.verdict:<10}{entry.attempt.action}")
    for line in happened:
        click.echo(f"            {line}")


def render_table() -> str:
    """Return the attempts as the table in docs/concepts/trust.md: each party with what it could and could not do."""
    lines = ["| party | holds | could | could not |", "|---|---|---|---|"]
    for party, holds in PARTIES.items():
        could, could_not = (
            "; ".join(attempt.action for attempt in ATTEMPTS if attempt.party == party and attempt.may is may)
            for may in (True, False)
        )
        lines.append(f"| {party} | {holds} | {could} | {could_not} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run and print the transcript; return 1 if a promise broke."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="transcript-") as folder:
        entries = run(Path(folder))
    broken = [entry for entry in entries if not entry.held]
    click.echo(f"\n{len(entries)} attempts, {len(broken)} broken promises, {time.monotonic() - started_s:.0f} s")
    return 1 if broken else 0

"""Command `outstation client`: the producer client as one file for another Python."""

from __future__ import annotations

from importlib import resources

import click

from outstation.foundation.cli.output import echo


@click.command(epilog="Example: outstation client > outstation_client.py")
def client() -> None:
    """Print the Python client as one file, for programs outside of this installation.

    It needs the standard library of Python 3.9 or newer only.
    """
    echo((resources.files("outstation.protocol") / "client.py").read_text(encoding="utf-8"), nl=False)

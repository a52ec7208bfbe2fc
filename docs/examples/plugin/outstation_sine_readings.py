"""Command `outstation sine`: a sine wave of the past as CSV, for `outstation ingest`."""

import math
import time

import click


@click.command()
@click.argument("fields", nargs=-1, required=True)
@click.option("--rows", default=600, show_default=True, help="Number of readings, one a second.")
@click.option("--period", default=60.0, show_default=True, help="Period of the wave in seconds.")
def sine(fields, rows, period):
    """Print a sine wave in FIELDS, which ends now."""
    click.echo(",".join(["t", *fields]))
    start = int(time.time()) - rows
    for t in range(start, start + rows):
        value = f"{math.sin(2 * math.pi * t / period):.6f}"
        click.echo(",".join([str(t), *[value] * len(fields)]))

"""Command `outstation metrics`: numbers of this device for Prometheus, read from the store beside the daemon."""

from __future__ import annotations

from pathlib import Path

import click

from outstation.device import prometheus_metrics as device_metrics
from outstation.device import status as documents
from outstation.device.bootstrap import device
from outstation.foundation import clock, durable_files
from outstation.foundation.cli.options import config_option
from outstation.foundation.cli.output import echo


@click.command(epilog="Example: outstation metrics --out /var/lib/prometheus/node-exporter/outstation.prom")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.prom",
    help="Replace this file as a whole, for node_exporter's textfile collector.",
)
@config_option
def metrics(out: Path | None, config_file: str | None) -> None:
    """Print backlog, storage, drift windows and open alerts of this device in Prometheus' text format.

    Run it from a timer each minute; docs/guides/prometheus.md has one.
    """
    _, conf = device.load_config(config_file)
    with device.open_store_read_only(conf) as store:
        document = documents.build_document(conf, store)
    text = device_metrics.render(document, clock.read().wall_us)
    if out is None:
        echo(text, nl=False)
    else:
        durable_files.write(out, text.encode())

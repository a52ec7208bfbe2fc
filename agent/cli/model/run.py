"""`outstation model run`: a bundle over files, without a daemon."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli import trust
from agent.cli.output import emit, json_option
from agent.cli.progress import ProgressBar
from agent.errors import BadBundle, UsageError
from agent.wire import keys

if TYPE_CHECKING:
    from agent.evaluation.predict.ray_cluster import RayCluster
    from agent.model.bundle.bundle import Bundle
    from agent.model.inference.inference import Inference

_path = click.Path(path_type=Path)
_MAX_REJECTS = 10

engine_option = click.option(
    "--engine",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="Where the model runs: in this process, or on a Ray cluster, a worker for each file.",
)
address_option = click.option(
    "--address", metavar="HOST:PORT", help="The cluster's head; RAY_ADDRESS, or this machine's, without."
)


@click.command("run", epilog="Example: outstation model run exercise readings.csv -o results.csv")
@click.argument("bundle", type=_path)
@click.argument("data", type=_path)
@click.option("-o", "--out", required=True, type=_path, help="File to write, .csv or .parquet; a folder for a folder.")
@click.option("--raw", is_flag=True, help="The model's outputs, too: raw_0, raw_1, …")
@engine_option
@address_option
@click.option("--key", "public", help="The publisher's public key, text or file: the bundle must be signed by it.")
@json_option
def run(
    bundle: Path, data: Path, out: Path, raw: bool, engine: str, address: str | None, public: str | None, as_json: bool
) -> None:
    """Answers of BUNDLE for each row or window of DATA: CSV, Parquet, a folder of them, or of images or WAV.

    BUNDLE is a folder, a .zip, or the name of one that ships. A run that was killed goes on where it was when it is
    started again with the same arguments. Rows that cannot be read are named; then the exit code is 1.
    """
    from agent.datasets import readers
    from agent.evaluation.predict import output
    from agent.evaluation.predict import run as running

    if not data.exists():
        raise UsageError(f"{data}: no such file")
    place = open_cluster(engine, address)
    found, loaded, said = load_bundle(bundle, public)
    # A folder of images or sounds is one stream: its answers are one file.
    many = data.is_dir() and not readers.is_media(loaded.manifest.input)
    if not many and out.suffix not in output.OUTPUT_SUFFIXES:
        raise UsageError(f"-o {out}: name a file that ends in {' or '.join(output.OUTPUT_SUFFIXES)}")
    work = running.BatchPredictor(found, loaded, raw=raw)
    begun = time.monotonic()
    with place as ray, ProgressBar("rows") as bar:
        if ray is None:
            total = running.predict_folder(work, data, out, bar) if many else work.predict_file(data, out, bar)
        else:
            from agent.evaluation.predict import ray_jobs

            total = (ray_jobs.predict_folder if many else ray_jobs.predict_file)(ray, work, found, data, out, bar)
    document = {
        "out": str(out),
        "bundle": {"name": found.manifest.name, "version": found.manifest.version, "digest": found.digest},
        "signature": said,
        "rows": total.rows,
        "results": total.results,
        "partly_missing": total.incomplete,
        "rejected": total.rejected_count,
        "rejects": [{"file": r.file, "line": r.line, "reason": r.reason} for r in total.rejected_rows],
        "seconds": round(time.monotonic() - begun, 3),
    }
    emit(document, as_json, lambda: _print(document))
    if total.rejected_count:
        sys.exit(1)


def open_cluster(engine: str, address: str | None) -> AbstractContextManager[RayCluster | None]:
    """What is entered for the time of the work; None where that is done here. Raises UsageError."""
    if engine == "here":
        if address is not None:
            raise UsageError(f"--address {address}: is for --engine ray")
        return nullcontext()
    from agent.evaluation.predict.ray_cluster import RayCluster

    return RayCluster(address)


def load_bundle(path: Path, public: str | None) -> tuple[Bundle, Inference, str]:
    """The bundle, or what ships by that name, proved in a child process and loaded; who signed it. Raises BadBundle."""
    from agent.model.bundle import builtin
    from agent.model.bundle import bundle as bundles
    from agent.model.inference import inference
    from agent.model.sandbox import probe

    path = builtin.resolve_path(path)
    trusted = [keys.load_public(public)] if public else None
    found = bundles.read(path, trusted)
    _, said = trust.check_signature(path, found, trusted)
    try:
        probe.probe(found).raise_for_failure()
        return found, inference.Inference(found.manifest, inference.load_model(found.manifest, found.model_bytes)), said
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None


def _print(document: dict[str, Any]) -> None:
    name = document["bundle"]
    click.echo(f"{name['name']} {name['version']}, signature: {document['signature']}")
    pace = document["rows"] / max(document["seconds"], 1e-3)
    click.echo(f"{document['out']}: {document['results']:,} results of {document['rows']:,} rows, {pace:,.0f} rows/s")
    if document["partly_missing"]:
        click.echo(f"{document['partly_missing']:,} results are of input that was partly missing")
    if not document["results"]:
        click.echo("no result: no row, or no whole window without a gap, is in the data")
    if document["rejected"]:
        click.echo(f"{document['rejected']:,} rows rejected:", err=True)
        for one in document["rejects"][:_MAX_REJECTS]:
            click.echo(f"  {one['file']} line {one['line']}: {one['reason']}", err=True)
        if document["rejected"] > _MAX_REJECTS:
            click.echo(f"  and {document['rejected'] - _MAX_REJECTS:,} more", err=True)

"""Command `outstation model run`: batch prediction over files, without a daemon."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.cli.progress import ProgressBar
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import BadBundle, UsageError
from outstation.protocol.wire import keys
from outstation.workbench.cli.model import trust

if TYPE_CHECKING:
    from outstation.ml.model.bundle.bundle import Bundle
    from outstation.ml.model.inference.inference import Inference
    from outstation.workbench.evaluation.predict.ray_cluster import RayCluster

_MAX_SHOWN = 10


def _parse_joined(_ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, file) in zip(texts, pairs, strict=True) if not (name and file)]:
        raise UsageError(f"--join {wrong[0]}: write NAME=FILE, the input's name and the file of its rows")
    return {name: Path(file) for name, _, file in pairs}


join_option = click.option(
    *("--join", "joined"), multiple=True, metavar="NAME=FILE", callback=_parse_joined,
    help="File with the rows of a further input; without it they are in DATA.",
)  # fmt: skip
engine_option = click.option(
    "--engine",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="Run in this process, or on a Ray cluster with a worker for each file.",
)
address_option = click.option(
    "--address", metavar="HOST:PORT", help="Head of the cluster; default RAY_ADDRESS, or this machine's cluster."
)


@click.command("run", epilog="Example: outstation model run exercise readings.csv -o results.csv")
@click.argument("bundle", type=PATH)
@click.argument("data", type=PATH)
@click.option("-o", "--out", required=True, type=PATH, help="Output file, .csv or .parquet; a folder if DATA is one.")
@click.option("--raw", is_flag=True, help="Add the model's outputs as columns raw_0, raw_1, …")
@join_option
@engine_option
@address_option
@click.option("--publisher", "public", help="Publisher's public key, text or file: the bundle must be signed by it.")
@json_option
def run(
    bundle: Path,
    data: Path,
    out: Path,
    raw: bool,
    joined: dict[str, Path],
    engine: str,
    address: str | None,
    public: str | None,
    as_json: bool,
) -> None:
    """Predict each row or window of DATA with BUNDLE.

    DATA is CSV, JSON Lines, Parquet, recordings (.npz), a folder of CSV and Parquet, or of images or WAV. BUNDLE is a
    folder, a .zip, or the name of a built-in bundle. A killed run resumes when it is started again with the same
    arguments. Rows that cannot be read are named; then the exit code is 1.
    """
    from outstation.ml.datasets import readers
    from outstation.workbench.evaluation.predict import output
    from outstation.workbench.evaluation.predict.run import BatchPredictor, predict_folder

    if not data.exists():
        raise UsageError(f"{data}: no such file")
    cluster_context = open_cluster(engine, address)
    loaded, inference, signature = load_bundle(bundle, public)
    # A folder of images or sounds is one stream, with one output file.
    many = data.is_dir() and not readers.is_media(inference.manifest.input)
    if not many and out.suffix not in output.OUTPUT_SUFFIXES:
        raise UsageError(f"-o {out}: name a file that ends in {' or '.join(output.OUTPUT_SUFFIXES)}")
    predictor = BatchPredictor(loaded, inference, raw=raw, joined=joined)
    started_s = time.monotonic()
    with cluster_context as cluster, ProgressBar("rows") as bar:
        if cluster is None:
            total = predict_folder(predictor, data, out, bar) if many else predictor.predict_file(data, out, bar)
        else:
            from outstation.workbench.evaluation.predict import ray_jobs

            predict = ray_jobs.predict_folder if many else ray_jobs.predict_file
            total = predict(cluster, predictor, loaded, data, out, bar)
    document = {
        "out": str(out),
        "bundle": {"name": loaded.manifest.name, "version": loaded.manifest.version, "digest": loaded.digest},
        "signature": signature,
        "rows": total.rows,
        "results": total.results,
        "partly_missing": total.incomplete,
        "rejected": total.rejected_count,
        "rejected_rows": [{"file": r.file, "line": r.line, "reason": r.reason} for r in total.rejected_rows],
        "seconds": round(time.monotonic() - started_s, 3),
    }
    emit(document, as_json, lambda: _print(document), passed=not total.rejected_count)


def open_cluster(engine: str, address: str | None) -> AbstractContextManager[RayCluster | None]:
    """Return a context of the cluster, or of None to run here. Raises UsageError."""
    if engine == "here":
        if address is not None:
            raise UsageError(f"--address {address}: is for --engine ray")
        return nullcontext()
    from outstation.workbench.evaluation.predict.ray_cluster import RayCluster

    return RayCluster(address)


def load_bundle(
    path: Path, public: str | None, output: str | None = None, *, or_builtin: bool = False
) -> tuple[Bundle, Inference, str]:
    """Return the bundle, its model in a confined process, and a description of its signature. Raises BadBundle.

    With `output`, it is a bundle of this further output alone; with `or_builtin` it may be one of the program, too.
    """
    from outstation.ml.model import activation
    from outstation.ml.model.bundle import builtin
    from outstation.ml.model.bundle import bundle as bundles

    path = builtin.resolve_path(path)
    trusted = [keys.load_public(public), *(builtin.publisher_keys() if or_builtin else [])] if public else None
    bundle = bundles.read(path, trusted)
    _, signature = trust.check_signature(path, bundle, trusted)
    view = bundle if output is None else _select_output(path, bundle, output)
    try:
        return view, activation.open_for_files(bundle, view), signature
    except BadBundle as problem:
        raise BadBundle(f"{path}: {problem}") from None


def _select_output(path: Path, bundle: Bundle, name: str) -> Bundle:
    from outstation.ml.model.inference import scores

    further = bundle.manifest.further
    if name not in further:
        raise UsageError(
            f"{path}: --output {name}: no such further output{did_you_mean(name, further, 'it has one output')}"
        )
    return msgspec.structs.replace(bundle, manifest=scores.further_manifest(bundle.manifest, name))


def _print(document: dict[str, Any]) -> None:
    bundle = document["bundle"]
    echo(f"{bundle['name']} {bundle['version']}, signature: {document['signature']}")
    rate = document["rows"] / max(document["seconds"], 1e-3)
    echo(f"{document['out']}: {document['results']:,} results of {document['rows']:,} rows, {rate:,.0f} rows/s")
    if document["partly_missing"]:
        echo(f"{document['partly_missing']:,} results have partly missing input")
    if not document["results"]:
        echo("no result: the data hold no row, or no whole window without a gap")
    if document["rejected"]:
        echo(f"{document['rejected']:,} {'row' if document['rejected'] == 1 else 'rows'} rejected:", err=True)
        for row in document["rejected_rows"][:_MAX_SHOWN]:
            echo(f"  {row['file']} line {row['line']}: {row['reason']}", err=True)
        if document["rejected"] > _MAX_SHOWN:
            echo(f"  and {document['rejected'] - _MAX_SHOWN:,} more", err=True)

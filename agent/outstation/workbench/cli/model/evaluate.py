"""Command `outstation model evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from click.core import ParameterSource

from outstation.foundation.cli.options import PATH, json_option
from outstation.foundation.cli.output import echo, emit, require_writable, write_output
from outstation.foundation.errors import UsageError
from outstation.foundation.text import printable
from outstation.workbench.cli.model.run import address_option, engine_option, join_option, load_bundle, open_cluster

if TYPE_CHECKING:
    from outstation.ml.model.bundle.bundle import Bundle
    from outstation.ml.model.inference.inference import Inference
    from outstation.workbench.evaluation.cards import CardTexts
    from outstation.workbench.evaluation.context import EvaluationRequest
    from outstation.workbench.evaluation.document import Evaluation
    from outstation.workbench.evaluation.gate import Gate
    from outstation.workbench.evaluation.predict.ray_cluster import RayCluster

    LoadedModel = tuple[Bundle, Inference, str]


@click.command(
    epilog="Example: outstation model evaluate exercise held-out.csv --group subject --slice side --html report.html"
)
@click.argument("bundle", type=PATH)
@click.argument("data", type=PATH)
@click.option("--output", metavar="NAME", help="Evaluate this further output, not the main one.")
@click.option("--label", metavar="COL", help="Column of labels; by default label, or label_NAME with --output.")
@click.option("--group", metavar="COL", help="Column of people or machines: intervals resample whole groups.")
@click.option("--split", metavar="COL", help="Column of splits: rows that say train are not evaluated.")
@click.option(
    "--slice", "slices", multiple=True, metavar="COL", help="Measure each value, or quarter, of a column by itself."
)
@click.option("--train", type=PATH, metavar="DATA", help="Training data, to look for leakage.")
@click.option("--float", "float_model", type=PATH, metavar="MODEL", help="Float .tflite to compare with.")
@click.option("--ablate", is_flag=True, help="Measure the importance of each field.")
@click.option("--robustness", is_flag=True, help="Inject noise, gain, missing, stuck, swapped and saturated fields.")
@click.option("--adversarial", is_flag=True, help="Search changes within the sensors' limits that flip answers.")
@click.option(
    "--max-invocations",
    type=click.IntRange(1000, 100_000_000),
    default=60_000,
    show_default=True,
    help="Most invocations of the model for --adversarial.",
)
@click.option("--no-latency", "latency", flag_value=False, default=True, help="Do not measure latency.")
@click.option("--seed", type=click.IntRange(0, 2**20), default=0, show_default=True, help="Seed of all random draws.")
@join_option
@engine_option
@address_option
@click.option("--publisher", "public", help="Publisher's public key, text or file: the bundle must be signed by it.")
@click.option("--html", type=PATH, metavar="FILE", help="Write the report, one HTML file.")
@click.option("--card", "folder", type=PATH, metavar="DIR", help="Write MODEL_CARD and DATA_CARD, as .md and .html.")
@click.option(
    "--require",
    "required",
    multiple=True,
    metavar="EXPR|FILE",
    help='Requirement, such as "accuracy.low >= 0.9", or a TOML file of them; exit code 1 if one is not met.',
)
@click.option("--against", type=PATH, metavar="BUNDLE", help="Compare with another bundle by the rules of a roll-out.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write the requirements' results as JUnit XML.")
@click.option("--privacy", is_flag=True, help="Leave out numbers of few windows, and names of files and rows.")
@click.option("--about", type=PATH, metavar="TOML", help="Author's texts for the cards, in [card] and [data].")
@json_option
def evaluate(
    bundle: Path,
    data: Path,
    output: str | None,
    label: str | None,
    engine: str,
    address: str | None,
    public: str | None,
    html: Path | None,
    folder: Path | None,
    about: Path | None,
    required: tuple[str, ...],
    against: Path | None,
    junit: Path | None,
    privacy: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Evaluate BUNDLE on DATA that it has not seen: CSV, JSON Lines, Parquet, recordings (.npz), or a folder of them.

    BUNDLE is a folder, a .zip, or the name of a built-in bundle. Every metric has a 95 % interval. DATA has the
    bundle's fields as columns, and the label of each row; a window has that of its last row.

    A requirement names a quantity: a metric, class(LABEL).recall, slice(COL=VALUE).METRIC, float.difference,
    fault(NAME, STRENGTH).METRIC, adversarial(ATTACK, STRENGTH).flipped, adversarial(FIELD).median_sd,
    latency(BATCH).p95_ms, model.bytes or warnings. A * stands for any text, and .low and .high for the ends of the
    95 % interval. Exit code 1 if one is not met, or if a rule of --against does not pass.
    """
    from outstation.workbench.evaluation import cards, gate
    from outstation.workbench.evaluation.context import EvaluationRequest

    label = label or ("label" if output is None else f"label_{output}")
    request = EvaluationRequest(data=data, label=label, output=output or "", **settings)
    _check_request(request, engine)
    chosen_gate = gate.read_gate(required)
    if about is not None and folder is None:
        raise UsageError("--about is for the cards; name their folder with --card")
    if junit is not None and not (chosen_gate.requirements or against):
        raise UsageError("--junit writes results of requirements, and there is none; give --require or --against")
    gates = [Path(text) for text in required if text.endswith(".toml")]
    inputs = [*_list_inputs(request, [*filter(None, (bundle, against))], [*filter(None, [about]), *gates])]
    _check_outputs(html, folder, junit, inputs)
    texts = cards.read_texts(about) if about else cards.CardTexts()
    cluster = open_cluster(engine, address)
    loaded = load_bundle(bundle, public, output)
    gate.check_names(chosen_gate, loaded[0].manifest, request)
    if privacy:
        request = _with_min_count(request, loaded[0])
    # Before the evaluation, which may take minutes.
    other = load_bundle(against, public, output, or_builtin=True) if against is not None else None
    result = _evaluate(loaded, request, cluster)
    if against is not None and other is not None:
        result = _compare(result, loaded, other, request, chosen_gate, against)
    _show_step("")
    result = msgspec.structs.replace(result, requirements=gate.check(chosen_gate, result))
    _emit(result, _write_files(result, texts, html, folder, junit), as_json)


def _check_request(request: EvaluationRequest, engine: str) -> None:
    """Raise UsageError for options that do not fit together, and for a file that does not exist."""
    if request.output and engine == "ray":
        raise UsageError("--output is evaluated on this machine; remove --engine ray")
    source = click.get_current_context().get_parameter_source("max_invocations")
    if source is ParameterSource.COMMANDLINE and not request.adversarial:
        raise UsageError("--max-invocations limits --adversarial; add that option or remove this one")
    for path in (request.data, request.train, request.float_model):
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file")


def _check_outputs(html: Path | None, folder: Path | None, junit: Path | None, inputs: Sequence[Path]) -> None:
    """Raise UsageError for a file of the results that is named twice, cannot be written, or is one of `inputs`."""
    from outstation.workbench.evaluation import cards

    if html is not None and html == junit:
        raise UsageError(f"{html}: --html and --junit would write the same file; name two")
    for path in (*filter(None, (html, junit)), *(folder / name for name in cards.FILES if folder is not None)):
        require_writable(path, inputs)


def _list_inputs(request: EvaluationRequest, bundles: Sequence[Path], files: Sequence[Path]) -> Iterator[Path]:
    """Yield all files that the command reads: also those in folders of a bundle or of data."""
    from outstation.ml.datasets import readers

    yield from filter(None, (*files, request.float_model))
    for path in bundles:
        yield from path.iterdir() if path.is_dir() else [path]
    for path in filter(None, (request.data, request.train, *request.joined.values())):
        yield path
        if path.is_dir():
            yield from (file for file in path.iterdir() if file.suffix in readers.SUFFIXES)


def _write_files(
    result: Evaluation, texts: CardTexts, html: Path | None, folder: Path | None, junit: Path | None
) -> list[Path]:
    """Write the report, the cards and the results of requirements, and return their files. Raises UsageError."""
    from outstation.workbench.evaluation import cards, evaluation_report, gate

    texts_by_file = {html: evaluation_report.render_html(result)} if html else {}
    if folder is not None:
        for name, card in cards.build_cards(result, texts).items():
            texts_by_file |= {folder / f"{name}.md": card.to_markdown(), folder / f"{name}.html": card.to_html()}
    if junit is not None:
        texts_by_file[junit] = gate.to_junit(result.requirements, result.model.name)
    return [write_output(path, text.encode()) for path, text in texts_by_file.items()]


def _emit(result: Evaluation, files: Sequence[Path], as_json: bool) -> None:
    """Print the result and the names of written files; exit with code 1 unless each requirement is met."""
    from outstation.workbench.cli.model import evaluation_tables

    def print_human() -> None:
        evaluation_tables.print_evaluation(result)
        for path in files:
            echo(f"written: {path}")

    emit(result, as_json, print_human, passed=all(each.state == "passed" for each in result.requirements))


def _with_min_count(request: EvaluationRequest, bundle: Bundle) -> EvaluationRequest:
    from outstation.workbench.evaluation import small_cells

    least = bundle.manifest.drift.min_count
    return msgspec.structs.replace(request, min_count=small_cells.MIN_COUNT if least is msgspec.UNSET else least)


def _evaluate(
    loaded: LoadedModel, request: EvaluationRequest, cluster_context: AbstractContextManager[RayCluster | None]
) -> Evaluation:
    from outstation.ml.datasets.blocks import MissingColumns
    from outstation.workbench.evaluation import evaluate as evaluation

    try:
        with cluster_context as cluster:
            if cluster is None:
                return evaluation.evaluate(*loaded, request, _show_step)
            from outstation.workbench.evaluation.predict import ray_jobs

            predict = ray_jobs.make_predictor(cluster, loaded[0])
            return evaluation.evaluate(*loaded, request, _show_step, predict)
    except MissingColumns as problem:
        hint = ", or name the column of labels with --label COL" if request.label in problem.names else ""
        raise UsageError(f"{problem}{hint}") from None


def _compare(
    result: Evaluation, loaded: LoadedModel, other: LoadedModel, request: EvaluationRequest, chosen: Gate, name: Path
) -> Evaluation:
    from outstation.workbench.evaluation import against

    _show_step(f"comparing with {name}")
    return msgspec.structs.replace(result, against=against.compare(loaded[:2], other[:2], request, chosen.limits))


def _show_step(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{printable(text)}{' …' if text else ''}", nl=False, err=True)

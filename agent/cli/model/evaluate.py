"""Command `outstation model evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.cli.model.run import address_option, engine_option, load_bundle, open_cluster
from agent.cli.output import emit, json_option
from agent.errors import UsageError

if TYPE_CHECKING:
    from agent.evaluation.cards import CardTexts
    from agent.evaluation.document import Evaluation

_path = click.Path(path_type=Path)


@click.command(
    epilog="Example: outstation model evaluate exercise held-out.csv --group subject --slice side --html report.html"
)
@click.argument("bundle", type=_path)
@click.argument("data", type=_path)
@click.option("--label", default="label", show_default=True, metavar="COL", help="Column of labels.")
@click.option("--group", metavar="COL", help="Column of people or machines: intervals resample whole groups.")
@click.option("--split", metavar="COL", help="Column of splits: rows that say train are not evaluated.")
@click.option(
    "--slice", "sliced", multiple=True, metavar="COL", help="Measure each value, or quarter, of a column by itself."
)
@click.option("--train", type=_path, metavar="DATA", help="Training data, to look for leakage.")
@click.option("--float", "float_model", type=_path, metavar="MODEL", help="Float .tflite to compare with.")
@click.option("--ablate", is_flag=True, help="Measure the importance of each field.")
@click.option("--robustness", is_flag=True, help="Inject noise, gain, missing, stuck, swapped and saturated fields.")
@click.option("--no-latency", is_flag=True, help="Do not measure latency.")
@click.option("--seed", type=click.IntRange(0, 2**20), default=0, show_default=True, help="Seed of all random draws.")
@engine_option
@address_option
@click.option("--key", "public", help="Publisher's public key, text or file: the bundle must be signed by it.")
@click.option("--html", type=_path, metavar="FILE", help="Write the report, one HTML file.")
@click.option("--card", "cards", type=_path, metavar="DIR", help="Write MODEL_CARD and DATA_CARD, as .md and .html.")
@click.option("--about", type=_path, metavar="TOML", help="Author's texts for the cards, in [card] and [data].")
@json_option
def evaluate(
    bundle: Path,
    data: Path,
    label: str,
    group: str | None,
    split: str | None,
    sliced: tuple[str, ...],
    train: Path | None,
    float_model: Path | None,
    ablate: bool,
    robustness: bool,
    no_latency: bool,
    seed: int,
    engine: str,
    address: str | None,
    public: str | None,
    html: Path | None,
    cards: Path | None,
    about: Path | None,
    as_json: bool,
) -> None:
    """Evaluate BUNDLE on DATA that it has not seen: CSV, JSON Lines, Parquet, recordings (.npz), or a folder of them.

    BUNDLE is a folder, a .zip, or the name of a built-in bundle. Every metric has a 95 % interval. DATA has the
    bundle's fields as columns, and the label of each row; a window has that of its last row.
    """
    from agent.cli.model import evaluation_tables
    from agent.evaluation import evaluate as evaluation

    request = evaluation.EvaluationRequest(
        data=data,
        label=label,
        group=group,
        split=split,
        slices=tuple(dict.fromkeys(sliced)),
        train=train,
        float_model=float_model,
        ablate=ablate,
        robustness=robustness,
        latency=not no_latency,
        seed=seed,
    )
    _require_existing(data, train, float_model)
    texts, cluster_context = _load_texts(about, cards), open_cluster(engine, address)
    loaded, inference, signature = load_bundle(bundle, public)
    with cluster_context as cluster:
        if cluster is None:
            result = evaluation.evaluate(loaded, inference, signature, request, _show_step)
        else:
            from agent.evaluation.predict import ray_jobs

            predict = ray_jobs.make_predictor(cluster, loaded)
            result = evaluation.evaluate(loaded, inference, signature, request, _show_step, predict)
    _show_step("")
    written = _write_reports(result, html, cards, texts)
    emit(result, as_json, lambda: evaluation_tables.print_evaluation(result))
    if not as_json:
        for path in written:
            click.echo(f"written: {path}")


def _require_existing(*paths: Path | None) -> None:
    """Raise UsageError, before the model is loaded."""
    for path in paths:
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file")


def _show_step(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}{' …' if text else ''}", nl=False, err=True)


def _load_texts(about: Path | None, cards_folder: Path | None) -> CardTexts:
    from agent.evaluation import cards

    if about is not None and cards_folder is None:
        raise UsageError("--about is for the cards; name their folder with --card")
    return cards.read_texts(about) if about else cards.CardTexts()


def _write_reports(evaluation: Evaluation, html: Path | None, folder: Path | None, texts: CardTexts) -> list[Path]:
    from agent.evaluation import cards, report

    written = [write_text(html, report.render_html(evaluation))] if html else []
    if folder is not None:
        for name, card in cards.build_cards(evaluation, texts).items():
            written += [
                write_text(folder / f"{name}.md", card.to_markdown()),
                write_text(folder / f"{name}.html", card.to_html()),
            ]
    return written


def write_text(path: Path, text: str) -> Path:
    """Raise UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return path

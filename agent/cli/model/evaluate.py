"""`outstation model evaluate`: how good a bundle is, before it is released."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.cli.model.run import address_option, engine_option, load_bundle, open_cluster
from agent.cli.output import emit, json_option
from agent.errors import UsageError

if TYPE_CHECKING:
    from agent.evaluation.author import CardTexts
    from agent.evaluation.document import Evaluation

_path = click.Path(path_type=Path)


@click.command(
    epilog="Example: outstation model evaluate exercise held-out.csv --group subject --slice side --html report.html"
)
@click.argument("bundle", type=_path)
@click.argument("data", type=_path)
@click.option("--label", default="label", show_default=True, metavar="COL", help="What is true of a row.")
@click.option("--group", metavar="COL", help="Rows of one person or machine: intervals are drawn over these.")
@click.option("--split", metavar="COL", help="Rows that say train are compared with, not evaluated.")
@click.option("--slice", "sliced", multiple=True, metavar="COL", help="Look at each value, or quarter, by itself.")
@click.option("--train", type=_path, metavar="DATA", help="What the model learned from: does the test hold any of it?")
@click.option("--float", "float_model", type=_path, metavar="MODEL", help="The float .tflite beside it.")
@click.option("--ablate", is_flag=True, help="What each field is worth.")
@click.option("--robustness", is_flag=True, help="What noise, gain, missing, stuck, swapped and saturated fields do.")
@click.option("--no-latency", is_flag=True, help="Do not measure how long answers take here.")
@click.option("--seed", type=click.IntRange(0, 2**20), default=0, show_default=True, help="Of everything drawn.")
@engine_option
@address_option
@click.option("--key", "public", help="The publisher's public key, text or file: the bundle must be signed by it.")
@click.option("--html", type=_path, metavar="FILE", help="Write the report for people, one file.")
@click.option("--card", "cards", type=_path, metavar="DIR", help="Write MODEL_CARD and DATA_CARD, as .md and .html.")
@click.option("--about", type=_path, metavar="TOML", help="For the cards: what only the author knows, in [card].")
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
    """How good BUNDLE is on DATA, which it has not seen: CSV, Parquet, recordings (.npz), or a folder of them.

    BUNDLE is a folder, a .zip, or the name of one that ships. Every figure comes with a 95 % interval. DATA has the
    bundle's fields as columns, and the label of each row, or of each window's last one.
    """
    from agent.cli.model import evaluation_tables
    from agent.evaluation import evaluate as judge

    request = judge.EvaluationRequest(
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
    author, place = _load_author(about, cards), open_cluster(engine, address)
    found, inference, said = load_bundle(bundle, public)
    with place as ray:
        if ray is None:
            result = judge.evaluate(found, inference, said, request, _show_step)
        else:
            from agent.evaluation.predict import ray_jobs

            result = judge.evaluate(found, inference, said, request, _show_step, ray_jobs.make_predictor(ray, found))
    _show_step("")
    written = _write_reports(result, html, cards, author)
    emit(result, as_json, lambda: evaluation_tables.print_evaluation(result))
    if not as_json:
        for path in written:
            click.echo(f"written: {path}")


def _require_existing(*paths: Path | None) -> None:
    """Raises UsageError, before the model is tried."""
    for path in paths:
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file")


def _show_step(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}{' …' if text else ''}", nl=False, err=True)


def _load_author(about: Path | None, cards: Path | None) -> CardTexts:
    from agent.evaluation import author

    if about is not None and cards is None:
        raise UsageError("--about is for the cards; name their folder with --card")
    return author.read(about) if about else author.CardTexts()


def _write_reports(evaluation: Evaluation, html: Path | None, folder: Path | None, author: CardTexts) -> list[Path]:
    from agent.evaluation import cards, report

    written = [write_text(html, report.render_html(evaluation))] if html else []
    if folder is not None:
        for name, card in cards.build_cards(evaluation, author).items():
            written += [
                write_text(folder / f"{name}.md", card.to_markdown()),
                write_text(folder / f"{name}.html", card.to_html()),
            ]
    return written


def write_text(path: Path, text: str) -> Path:
    """Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return path

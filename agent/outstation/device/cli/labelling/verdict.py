"""Commands `outstation verdict`, `label-next` and `label-token`: feedback of people on the results of one device."""

from __future__ import annotations

import click

from outstation.device import label_requests
from outstation.device.bootstrap import device
from outstation.device.bundles import history
from outstation.device.cli.labelling.label import submit
from outstation.device.config import Config
from outstation.device.machine import secret_file
from outstation.device.store import predictions
from outstation.foundation import clock
from outstation.foundation.cli.options import by_option, config_options
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.errors import UsageError
from outstation.ml.model.bundle import bundle
from outstation.ml.performance.labels import VERDICT, Label, LabelSchema


@click.command(epilog="Example: outstation verdict exercise 1200 PEN")
@click.argument("task")
@click.argument("row", type=click.IntRange(min=1))
@click.argument("label", required=False)
@by_option
@config_options
def verdict(task: str, row: int, label: str | None, by: str, config_file: str | None, as_json: bool) -> None:
    """Correct the result of TASK at ROW to LABEL; without LABEL, confirm it.

    A verdict is a label by a person who saw the answer: it is counted, and left out of the metrics of ground truth.
    """
    _, conf = device.load_config(config_file, task)
    predicted = _find_answer(conf, task, row)
    if label is None and predicted is None:
        raise UsageError(f"row {row} has no stored result with a class to confirm; name the true label")
    text = label or predicted or ""
    _, rejected = submit(conf, task, [(1, Label(row, None, text, VERDICT))], by)
    kind = "confirmed" if text == predicted else "corrected"
    document = {"task": task, "row": row, "label": text, "predicted": predicted, "verdict": kind, "by": by}
    document["rejected"] = rejected.get(1)
    shown = f"not stored: {rejected[1]}" if rejected else f"{kind} by {by}: row {row} is {text}"
    emit(document, as_json, lambda: echo(shown), passed=not rejected)


@click.command("label-next", epilog="Example: outstation label-next exercise --limit 40 --json")
@click.argument("task")
@click.option("--limit", metavar="N", default=20, type=click.IntRange(1, 500), help="At most N results; default 20.")
@click.option("--seed", metavar="N", default=0, help="Seed of the random choice; default 0.")
@config_options
def label_next(task: str, limit: int, seed: int, config_file: str | None, as_json: bool) -> None:
    """Show which results of TASK to label next: the least certain, the rarest classes, and some at random.

    Only results whose predictions are still in the store are considered ([buffer] keep_results).
    """
    _, conf = device.load_config(config_file, task)
    schema = _load_schema(conf, task)
    with device.open_store_read_only(conf) as store:
        requests = label_requests.list_next(store, task, schema, limit, seed)
    rows = [
        [each.row, clock.to_rfc3339(each.t)[:19] + "Z", each.answer, "" if each.score is None else f"{each.score:.3f}",
         each.reason]
        for each in requests
    ]  # fmt: skip
    empty = f"Every stored result of {task} has a label, or there is none."
    document = [each.to_dict() for each in requests]
    emit(document, as_json, lambda: print_table(["row", "time", "answer", "score", "why"], rows, empty))


@click.command("label-token", epilog="Example: outstation label-token power-meter")
@click.argument("name")
@config_options
def label_token(name: str, config_file: str | None, as_json: bool) -> None:
    """Print the token with which NAME, a program or a person, authenticates labels.

    Decisions use authenticated labels, so the holder of the token can let a roll-out pass or fail. Delete labels.key in
    the data folder and restart to revoke all tokens.
    """
    _, conf = device.load_config(config_file)
    token = secret_file.make_token(secret_file.LABEL_KEY.load(conf.data_dir), name)
    emit({"by": name, "token": token}, as_json, lambda: echo(token))


def _load_schema(conf: Config, task: str) -> LabelSchema:
    with device.open_store_read_only(conf) as store:
        manifest = bundle.read(history.locate_bundle(conf, store, task), None).manifest
    return manifest.label_schemas[""]


def _find_answer(conf: Config, task: str, row: int) -> str | None:
    """Return the class that the model named at this row; None for a number, or where nothing is stored."""
    schema = _load_schema(conf, task)
    with device.open_store_read_only(conf) as store:
        prediction = store.query(predictions.load_prediction, task, row)
    if prediction is None or prediction.predicted_class is None:
        return None
    return schema.format_class(prediction.predicted_class)

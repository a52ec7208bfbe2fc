"""Command group `outstation reference`: the site reference of each task, which drift is tested against."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from outstation.device import status
from outstation.device.bootstrap import device
from outstation.device.commands import erasure
from outstation.device.config import Config
from outstation.device.machine.timekeeping import Timekeeper, make_clock
from outstation.device.pipeline import relearn as requests
from outstation.device.store import task_keys
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.options import DURATION, config_options
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.errors import StorageBusy, UsageError
from outstation.foundation.text import format_span, printable
from outstation.ml.drift.baseline.reference import MIN_WINDOWS, RECOMMENDED_WINDOWS


def format_smallest_changes(changes: dict[str, Any], most: int | None = None) -> list[str]:
    """Return a line for the smallest change of each field that is found; of more than `most`, the least sensitive."""
    fields = sorted(changes["fields"].items(), key=lambda item: -(item[1]["shift_sd"] or math.inf))[:most]
    sizes = [
        f"  {printable(name)} {_format_change(numbers, pairs=len(changes['fields']) > 1)}" for name, numbers in fields
    ]
    left = len(changes["fields"]) - len(sizes)
    more = [f"  {left} more fields: outstation reference show"] if left else []
    return [
        f"found within {changes['windows']} drift windows, {changes['probability']:.0%} of the time:",
        *sizes,
        *more,
    ]


def _format_change(numbers: dict[str, Any], *, pairs: bool) -> str:
    shift, spread = numbers["shift"], numbers["spread"]
    by_sd = f" ({numbers['shift_sd']:.2g} sd)" if numbers["shift_sd"] else ""
    mean = f"±{shift:.3g}{by_sd}" if shift else "no shift"
    together = numbers["correlation"]
    at = ", ".join(f"{value:.4g}" for value in numbers["never_stuck_at"])
    parts = [
        mean,
        f"spread × {spread:.2g}" if spread else "no spread",
        *([f"correlation by {together:.2g}" if together else "no correlation"] if pairs else []),
        f"stuck for {numbers['stuck_rows']} rows" + (f", but never at {at}" if at else ""),
    ]
    return ", ".join(parts)


def format_learning(learning: dict[str, Any]) -> str:
    """Return how many drift windows are learned of how many, and the time that is left at the rate so far."""
    windows, seconds, times = learning["windows"], learning["seconds"], learning["times"]
    least, least_s = learning["of"], learning["for_s"]
    most = f", at most {math.ceil(times * least)}" if times > 1 else ""
    text = f"{windows} of at least {least}{most} drift windows"
    text += f" and {format_span(least_s)} of readings" if least_s else ""
    is_extended = windows >= least and seconds >= least_s
    if is_extended:
        least, least_s = times * least, times * least_s
    if windows and seconds > 0:
        left_s = max(seconds / windows * (least - windows), least_s - seconds, 0.0)
        minutes = max(1, math.ceil(left_s / 60))
        left = f"{minutes} min" if minutes < 60 else format_span(60 * minutes)
        text += f", {'at most' if is_extended else 'about'} {left} left"
    return text + ("; goes on, as windows are too alike or show too few modes" if is_extended else "")


_wait_option = click.option(
    "--wait", "wait_s", default=15.0, type=click.FloatRange(min=0), metavar="S", help="Seconds to wait for the daemon."
)


@click.group(cls=SentenceGroup)
def reference() -> None:
    """Show, relearn or accept the site reference of a task, which drift is tested against."""


@reference.command(epilog="Example: outstation reference relearn exercise --for 24h")
@click.argument("task")
@click.option("--for", "for_s", default="0 s", type=DURATION, help='Least span of readings: "24 h", "3 d".')
@_wait_option
@config_options
def relearn(task: str, for_s: float, wait_s: float, config_file: str | None, as_json: bool) -> None:
    """Learn TASK's reference again from the next readings without a fault. Drift is not tested meanwhile."""
    _submit_request(config_file, task, requests.make_request("relearn", for_s), wait_s, as_json)


@reference.command(epilog="Example: outstation reference reset exercise")
@click.argument("task")
@_wait_option
@config_options
def reset(task: str, wait_s: float, config_file: str | None, as_json: bool) -> None:
    """Discard TASK's reference, and learn another as configured."""
    _submit_request(config_file, task, requests.make_request("reset"), wait_s, as_json)


@reference.command(epilog="Example: outstation reference accept exercise")
@click.argument("task")
@_wait_option
@config_options
def accept(task: str, wait_s: float, config_file: str | None, as_json: bool) -> None:
    """Accept TASK's reference although it deviates, and its sensors as they are: their readings are right."""
    _submit_request(config_file, task, requests.make_request("accept"), wait_s, as_json)


@reference.command(epilog="Example: outstation reference show exercise --json")
@click.argument("task")
@config_options
def show(task: str, config_file: str | None, as_json: bool) -> None:
    """Show TASK's reference: its number, when and from how many windows it was learned, or the progress of learning."""
    _, conf = device.load_config(config_file, task)
    with device.open_store_read_only(conf) as store:
        document = status.build_reference_document(conf, store, task)
    emit(document, as_json, lambda: echo(_format_reference(document)))


def _submit_request(
    config_file: str | None, task: str, request: requests.RelearnRequest, wait_s: float, as_json: bool
) -> None:
    file, conf = device.load_config(config_file, task)
    erasure.require_unwiped(conf.data_dir)
    try:
        conf.data_dir.mkdir(parents=True, exist_ok=True)
        requests.submit_request(conf.data_dir, task, request)
    except OSError as error:
        place = Path(str(error.filename)) if error.filename else conf.data_dir
        place = place if place.is_absolute() else conf.data_dir / "requests" / place
        raise UsageError(
            f"{place}: cannot be written: {error.strerror}; run this as root or as the daemon's user"
        ) from None
    is_applied = _apply_or_wait(file, conf, task, request, wait_s)
    document = {"task": task, "asked": request.action, "for_s": request.duration_s, "taken_up": is_applied}
    verb = "accepted" if request.action == "accept" else "learned again"
    when = f"is {verb}" if is_applied else f"will be {verb} when the task next runs"
    emit(document, as_json, lambda: echo(f"{task}: the site reference {when}"))


def _apply_or_wait(file: Path, conf: Config, task: str, request: requests.RelearnRequest, wait_s: float) -> bool:
    """Wait for the daemon, which owns the store; apply the request here if no daemon runs."""
    try:
        store = device.open_store(conf)
    except StorageBusy:
        with device.open_store_read_only(conf) as store:
            deadline = time.monotonic() + wait_s
            while store.load_state(task, task_keys.RELEARN_REQUEST_DONE) != request.id.encode():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            return True
    # Not for `status`, which has its words for learning from here.
    from outstation.device.bootstrap import tasks

    try:
        writer, now = device.open_message_log(file, conf, store), make_clock(store)
        Timekeeper(store, writer).tick(now())
        return requests.apply_pending(tasks.load_task(file, conf, store, task), store, writer, now())
    finally:
        store.close()


def _format_reference(document: dict[str, Any]) -> str:
    task, site, learning = document["task"], document["site"], document["learning"]
    waits = f"; {document['asked']} requested, when the task next runs" if document["asked"] else ""
    if site is not None:
        daily = ", follows the hour of day" if site["daily"] else ""
        daily += f", in {site['modes']} operating modes" if site["modes"] > 1 else ""
        changes = "".join(f"\n{line}" for line in format_smallest_changes(site["smallest_changes"]))
        warning = f"\nwarning: {site['warning']}" if site["warning"] else ""
        warning += "".join(f"\ndeviates: {sentence}" for sentence in site["deviations"])
        warning += "\nheld: drift is not tested until it is accepted" if site["held"] else ""
        return (
            f"{task}: reference {site['number']} of this site, {site['digest']}\n"
            f"learned from {site['windows']} drift windows, {site['from']} to {site['to']}{daily}{waits}"
            f"{changes}{warning}"
        )
    if learning is None:
        windows = f"{RECOMMENDED_WINDOWS} drift windows (at least {MIN_WINDOWS})"
        return f"{task}: nothing learned yet; drift is tested once {windows} are learned{waits}"
    return f"{task}: learning, {format_learning(learning)}{waits}"

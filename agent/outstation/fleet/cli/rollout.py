"""`outstation fleet rollout`: bring a bundle to devices in steps, each promoted on evidence."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import fleet_option, fleet_options, open_for_reading, open_store
from outstation.fleet.database.interface import Connection
from outstation.foundation import clock
from outstation.foundation.cli.options import PATH
from outstation.foundation.cli.output import echo, emit
from outstation.foundation.errors import LinkDown, StorageError, UsageError
from outstation.foundation.text import printable
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.fleet.database.store import FleetStore
    from outstation.fleet.rollout.actions import RolloutOperator
    from outstation.fleet.rollout.journal import Rollout
    from outstation.fleet.rollout.publisher import RolloutPublisher

_force_option = click.option(
    "--force", "force_reason", metavar="REASON", help="Do it although rules forbid it; the reason is recorded."
)


@click.group("rollout")
def rollout() -> None:
    """Bring a bundle to devices in steps. Reports of devices decide about promotion or rollback."""


@rollout.command("start", epilog="Example: outstation fleet rollout start exercise-1.1.toml")
@click.argument("file", type=PATH)
@_force_option
@fleet_options
def start(file: Path, force_reason: str | None, home: Path, as_json: bool) -> None:
    """Start the rollout that FILE describes, with its first step."""
    from outstation.fleet.rollout import actions, bundles, plan

    with _open_publisher(home) as publisher:
        plan_file = plan.read(file)
        resolved = bundles.resolve(plan_file, bundles.read_bundle(plan_file), home)
        _decide_and_publish(publisher, partial(actions.start, plan=resolved, force_reason=force_reason), as_json)


@rollout.command("status", epilog="Example: outstation fleet rollout status exercise-1-1 --watch")
@click.argument("name", required=False)
@click.option("--watch", is_flag=True, help="Show a live table until Ctrl-C.")
@fleet_options
def status(name: str | None, watch: bool, home: Path, as_json: bool) -> None:
    """Show progress, rules and blockers of the rollout NAME, or of all open rollouts."""
    _, store = open_for_reading(home)
    if not as_json:
        from outstation.fleet.cli import rollout_table
    if watch and not as_json and sys.stdout.isatty():
        with contextlib.suppress(KeyboardInterrupt):
            rollout_table.watch(lambda: build_documents(store, name))
        return
    documents = build_documents(store, name)
    emit(documents, as_json, lambda: rollout_table.show(documents))


@rollout.command("follow", epilog="Example: outstation fleet rollout follow exercise-1-1")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--every", "every_s", metavar="S", default=5.0, type=click.FloatRange(min=0.1),
              help="Evaluate the rules this often; default 5.")  # fmt: skip
@fleet_option
def follow(names: tuple[str, ...], every_s: float, home: Path) -> None:
    """Evaluate rules repeatedly, and promote, finish or abort by them, until no rollout is open.

    A paused rollout is aborted if necessary, but not promoted. Exit 1 if one of the rollouts was aborted.
    """
    from outstation.fleet.rollout import journal
    from outstation.fleet.rollout.controller import RolloutController

    # No Event: a handler that runs while its own thread is inside one can deadlock on the Event's lock.
    stopped: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.put(number))
    with _open_publisher(home, role="follow") as publisher:
        with publisher.store.snapshot() as db:
            known = [journal.find(db, name).name for name in names]
            if not (known or journal.load_rollouts(db, only_open=True)):
                raise UsageError("no rollout is open; `outstation fleet rollout start FILE` starts one")
        controller = RolloutController(publisher, known or None, lambda line: echo(printable(line)))
        is_open = True
        while is_open and stopped.empty():
            try:
                is_open = controller.tick(clock.boot_seconds())
            except StorageError as error:
                echo(f"outstation: {error}; trying again", err=True)
            if is_open:
                with contextlib.suppress(queue.Empty):
                    stopped.get(timeout=every_s)
                    break
        with publisher.store.snapshot() as db:
            states = [journal.find(db, name).state for name in {*known, *controller.followed_names}]
    if "aborted" in states:
        sys.exit(1)


@rollout.command("pause", epilog="Example: outstation fleet rollout pause exercise-1-1")
@click.argument("name")
@fleet_options
def pause(name: str, home: Path, as_json: bool) -> None:
    """Stop promoting NAME until it is resumed. Devices stay as they are, and rules may still abort it."""
    from outstation.fleet.rollout import actions

    _decide(home, name, as_json, lambda db, operator, _, current: actions.pause(db, operator, current))


@rollout.command("resume", epilog="Example: outstation fleet rollout resume exercise-1-1")
@click.argument("name")
@fleet_options
def resume(name: str, home: Path, as_json: bool) -> None:
    """Resume NAME, which was paused."""
    from outstation.fleet.rollout import actions

    _decide(home, name, as_json, lambda db, operator, _, current: actions.resume(db, operator, current))


@rollout.command("promote", epilog='Example: outstation fleet rollout promote exercise-1-1 --force "seen on site"')
@click.argument("name")
@_force_option
@fleet_options
def promote(name: str, force_reason: str | None, home: Path, as_json: bool) -> None:
    """Promote NAME to its next step, or finish it, if its rules allow. Else print the blockers and exit 1."""
    from outstation.fleet.rollout import actions
    from outstation.fleet.rollout.rollout_status import load_snapshot

    with _open_publisher(home) as publisher:
        current, now_us = _find_rollout(publisher, name), clock.read().wall_us
        with publisher.store.snapshot() as db:
            verdict = load_snapshot(db, current, now_us).verdict
        if current.is_open and verdict.outcome not in ("promote", "finish") and force_reason is None:
            blockers = verdict.blockers or [verdict.summary]
            text = f"{name} is not promoted from {current.current_step.label}: {'; '.join(blockers)}"
            head = {"rollout": name, "state": current.state, "step": current.step}
            emit(
                {**head, "promoted": False, "blockers": blockers},
                as_json,
                lambda: echo(printable(f"{text}. --force REASON promotes it anyway.")),
                passed=False,
            )
        action = partial(actions.promote, expected=current, verdict=verdict, force_reason=force_reason)
        _decide_and_publish(publisher, action, as_json)


@rollout.command("abort", epilog='Example: outstation fleet rollout abort exercise-1-1 "wrong labels"')
@click.argument("name")
@click.argument("reason")
@fleet_options
def abort(name: str, reason: str, home: Path, as_json: bool) -> None:
    """Abort NAME: every device returns to its previous bundle, and does not try the bundle again for a while."""
    from outstation.fleet.rollout import actions

    _decide(home, name, as_json, partial(actions.abort, reason=reason))


def build_documents(store: FleetStore, name: str | None) -> list[dict[str, Any]]:
    """Return the status of the rollout `name`; without a name of all open rollouts, or else of the newest."""
    from outstation.fleet.rollout import journal
    from outstation.fleet.rollout.rollout_status import build_status, load_snapshot

    now_us = clock.read().wall_us
    with store.snapshot() as db:
        if name is not None:
            rollouts = [journal.find(db, name)]
        else:
            rollouts = journal.load_rollouts(db, only_open=True) or journal.load_rollouts(db)[-1:]
        return [build_status(db, load_snapshot(db, entry, now_us), now_us) for entry in rollouts]


@contextlib.contextmanager
def _open_publisher(home: Path, role: str = "operator") -> Iterator[RolloutPublisher]:
    from outstation.fleet.rollout.publisher import RolloutPublisher
    from outstation.protocol.transport.mqtt import Link

    config = fleet_config.load(home)
    key = keys.load_private(Path(config.operator.key_file))
    fleet = config.fleet.name
    client = f"outstation-{fleet}-rollout-{os.getpid()}"
    with open_store(config) as store:
        yield RolloutPublisher(store, fleet, home, key, lambda: Link(config.command_broker, client), role=role)


def _decide(
    home: Path, name: str, as_json: bool, action: Callable[[Connection, RolloutOperator, int, Rollout], Rollout]
) -> None:
    """Record and publish a decision about the rollout `name`, as it is now."""
    with _open_publisher(home) as publisher:
        current = _find_rollout(publisher, name)
        _decide_and_publish(publisher, lambda db, operator, counter: action(db, operator, counter, current), as_json)


def _find_rollout(publisher: RolloutPublisher, name: str) -> Rollout:
    from outstation.fleet.rollout import journal

    with publisher.store.snapshot() as db:
        return journal.find(db, name)


def _decide_and_publish(
    publisher: RolloutPublisher, action: Callable[[Connection, RolloutOperator, int], Rollout], as_json: bool
) -> None:
    """Record a decision and publish it. Raises LinkDown if the broker cannot be reached."""
    from outstation.fleet.database import rollouts

    done, publish_error = publisher.execute(action)
    with publisher.store.snapshot() as db:
        summary = str(rollouts.load_decisions(db, done.name)[-1][4])
    document = {
        "rollout": done.name,
        "state": done.state,
        "step": done.step,
        "summary": summary,
        "published": not publish_error,
        "publish_error": publish_error,
    }
    emit(document, as_json, lambda: echo(printable(f"{done.name}: {summary}")))
    if publish_error:
        hint = "the decision is recorded; `outstation fleet rollout follow`, or the next command, publishes it"
        raise LinkDown(f"{publish_error}: {hint}")

"""`outstation fleet rollout …`: a bundle to the devices in steps, each on evidence."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import clock
from agent.cli.fleet.common import fleet_option
from agent.cli.output import emit, json_option
from agent.errors import LinkDown, StorageError, UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.fleet.database.interface import Connection
from agent.text import printable
from agent.wire import keys

if TYPE_CHECKING:
    from agent.fleet.database.store import FleetStore
    from agent.fleet.rollout.actions import RolloutOperator
    from agent.fleet.rollout.journal import Rollout
    from agent.fleet.rollout.publisher import RolloutPublisher

_force_option = click.option("--force", "forced", metavar="REASON", help="Do it all the same; the reason is on record.")


@click.group("rollout")
def rollout() -> None:
    """Bring a bundle to devices in steps, each judged by what devices report; take it back where that is bad."""


@rollout.command("start", epilog="Example: outstation fleet rollout start exercise-1.1.toml")
@click.argument("file", type=click.Path(path_type=Path))
@_force_option
@fleet_option
@json_option
def start(file: Path, forced: str | None, folder: str | None, as_json: bool) -> None:
    """Begin the roll-out that FILE describes, with its first step."""
    from agent.fleet.rollout import actions, bundles, plan

    home = fleet_config.find_folder(folder)
    with _open_publisher(home) as desk:
        wanted = bundles.resolve(plan.read(file), home)
        _decide_and_publish(desk, lambda db, who, counter: actions.start(db, who, counter, wanted, forced), as_json)


@rollout.command("status", epilog="Example: outstation fleet rollout status exercise-1-1 --watch")
@click.argument("name", required=False)
@click.option("--watch", is_flag=True, help="A live table, until Ctrl-C.")
@fleet_option
@json_option
def status(name: str | None, watch: bool, folder: str | None, as_json: bool) -> None:
    """How far roll-outs came, by what they are judged and what they wait for: NAME, or all that are open."""
    from agent.cli.fleet import fleet_rollout_screen as screen

    store = _open_store(folder)
    if watch and not as_json and sys.stdout.isatty():
        with contextlib.suppress(KeyboardInterrupt):
            screen.watch(lambda: build_documents(store, name))
        return
    found = build_documents(store, name)
    emit(found, as_json, lambda: screen.show(found))


@rollout.command("follow", epilog="Example: outstation fleet rollout follow exercise-1-1")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--every", "every_s", metavar="S", default=5.0, type=click.FloatRange(min=0.1), help="Judge so often; 5.")
@fleet_option
def follow(names: tuple[str, ...], every_s: float, folder: str | None) -> None:
    """Judge again and again, and promote, finish or abort by the plan's rules, until no roll-out is open.

    Exit 1 where one of them was aborted. Decides nothing that is paused, but for an abort.
    """
    from agent.fleet.rollout import journal
    from agent.fleet.rollout.controller import RolloutController

    # No Event: a handler that runs while its own thread is inside one can deadlock on the Event's lock.
    stopped: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.put(number))
    with _open_publisher(fleet_config.find_folder(folder), by="follow") as desk:
        with desk.store.snapshot() as db:
            known = [journal.find(db, one).name for one in names]
            if not (known or journal.load_rollouts(db, only_open=True)):
                raise UsageError("no roll-out is open; `outstation fleet rollout start FILE` begins one")
        follower = RolloutController(desk, known or None, lambda line: click.echo(printable(line)))
        while stopped.empty() and _tick(follower.tick):
            with contextlib.suppress(queue.Empty):
                stopped.get(timeout=every_s)
                break
        with desk.store.snapshot() as db:
            ended = [journal.find(db, one).state for one in {*known, *follower.followed_names}]
    if "aborted" in ended:
        sys.exit(1)


@rollout.command("pause", epilog="Example: outstation fleet rollout pause exercise-1-1")
@click.argument("name")
@fleet_option
@json_option
def pause(name: str, folder: str | None, as_json: bool) -> None:
    """Promote NAME no further until it is resumed; devices stay as they are, and what is bad is still aborted."""
    from agent.fleet.rollout import actions

    with _open_publisher(fleet_config.find_folder(folder)) as desk:
        seen = _find_rollout(desk, name)
        _decide_and_publish(desk, lambda db, who, _: actions.pause(db, who, seen), as_json)


@rollout.command("resume", epilog="Example: outstation fleet rollout resume exercise-1-1")
@click.argument("name")
@fleet_option
@json_option
def resume(name: str, folder: str | None, as_json: bool) -> None:
    """Go on with NAME, which was paused."""
    from agent.fleet.rollout import actions

    with _open_publisher(fleet_config.find_folder(folder)) as desk:
        seen = _find_rollout(desk, name)
        _decide_and_publish(desk, lambda db, who, _: actions.resume(db, who, seen), as_json)


@rollout.command("promote", epilog='Example: outstation fleet rollout promote exercise-1-1 --force "seen on site"')
@click.argument("name")
@_force_option
@fleet_option
@json_option
def promote(name: str, forced: str | None, folder: str | None, as_json: bool) -> None:
    """Take NAME to its next step, or finish it, where its rules allow; exit 1 with what is open where they do not."""
    from agent.fleet.rollout import actions
    from agent.fleet.rollout.status import load_snapshot

    with _open_publisher(fleet_config.find_folder(folder)) as desk:
        seen, now_us = _find_rollout(desk, name), clock.read().wall_us
        with desk.store.snapshot() as db:
            verdict = load_snapshot(db, seen, now_us).verdict
        if seen.is_open and verdict.outcome not in ("promote", "finish") and forced is None:
            _report_not_promoted(seen, verdict.blockers or [verdict.summary], as_json)
        _decide_and_publish(
            desk, lambda db, who, counter: actions.promote(db, who, counter, seen, verdict, forced), as_json
        )


@rollout.command("abort", epilog='Example: outstation fleet rollout abort exercise-1-1 "wrong labels"')
@click.argument("name")
@click.argument("reason")
@fleet_option
@json_option
def abort(name: str, reason: str, folder: str | None, as_json: bool) -> None:
    """Stop NAME: every device goes back to what it ran before. The bundle is then held for a while."""
    from agent.fleet.rollout import actions

    with _open_publisher(fleet_config.find_folder(folder)) as desk:
        seen = _find_rollout(desk, name)
        _decide_and_publish(desk, lambda db, who, counter: actions.abort(db, who, counter, seen, reason), as_json)


def build_documents(store: FleetStore, name: str | None) -> list[dict[str, Any]]:
    """The roll-out `name`, or all open ones, or the newest where none is."""
    from agent.fleet.rollout import journal
    from agent.fleet.rollout.status import build_status, load_snapshot

    now_us = clock.read().wall_us
    with store.snapshot() as db:
        if name is not None:
            found = [journal.find(db, name)]
        else:
            found = journal.load_rollouts(db, only_open=True) or journal.load_rollouts(db)[-1:]
        return [build_status(db, load_snapshot(db, one, now_us), now_us) for one in found]


def _tick(tick: Callable[[float], bool]) -> bool:
    """Whether there is more to do; a database that fails for a while is waited for."""
    try:
        return tick(clock.boot_seconds())
    except StorageError as error:
        click.echo(f"outstation: {error}; trying again", err=True)
        return True


@contextlib.contextmanager
def _open_publisher(home: Path, by: str = "operator") -> Iterator[RolloutPublisher]:
    from agent.fleet.database.store import FleetStore
    from agent.fleet.rollout.publisher import RolloutPublisher
    from agent.transport.mqtt import Link

    config = fleet_config.load(home)
    key = keys.load_private(Path(config.operator.key_file))
    # The certificate for commands: `fleet watch` keeps its own connection.
    broker = config.broker_for(config.commander or config.operator)
    client = f"outstation-{config.fleet.name}-rollout-{os.getpid()}"
    store = FleetStore(config.fleet.db, partitions=config.fleet.partitions)
    try:
        yield RolloutPublisher(store, config.fleet.name, home, key, lambda: Link(broker, client), role=by)
    finally:
        store.close()


def _open_store(folder: str | None) -> FleetStore:
    from agent.fleet.database.store import FleetStore

    config: FleetConfig = fleet_config.load(fleet_config.find_folder(folder))
    store = FleetStore(config.fleet.db, read_only=True)
    click.get_current_context().call_on_close(store.close)
    return store


def _find_rollout(publisher: RolloutPublisher, name: str) -> Rollout:
    from agent.fleet.rollout import journal

    with publisher.store.snapshot() as db:
        return journal.find(db, name)


def _decide_and_publish(
    publisher: RolloutPublisher, action: Callable[[Connection, RolloutOperator, int], Rollout], as_json: bool
) -> None:
    """Decide and publish; exit 1 where the broker could not be told."""
    from agent.fleet.rollout import journal

    done, trouble = publisher.execute(action)
    with publisher.store.snapshot() as db:
        summary = str(journal.load_decision_rows(db, done.name)[-1][4])
    document = {
        "rollout": done.name,
        "state": done.state,
        "step": done.step,
        "summary": summary,
        "published": not trouble,
        "publish_error": trouble,
    }
    emit(document, as_json, lambda: click.echo(printable(f"{done.name}: {summary}")))
    if trouble:
        later = "it is decided; `outstation fleet rollout follow`, or the next command, publishes it"
        raise LinkDown(f"{trouble}: {later}")


def _report_not_promoted(current: Rollout, open_conditions: list[str], as_json: bool) -> None:
    said = f"{current.name} is not promoted from {current.current_step.label}; it waits for"
    document = {
        "rollout": current.name,
        "state": current.state,
        "step": current.step,
        "promoted": False,
        "blockers": open_conditions,
    }
    emit(
        document,
        as_json,
        lambda: click.echo(printable(f"{said}: {'; '.join(open_conditions)}. --force REASON does so.")),
    )
    sys.exit(1)

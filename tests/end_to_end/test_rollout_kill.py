"""A device that dies at any commit of a roll-out, before it or right after it, comes to where it would have come."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.device.rollout import transitions
from outstation.device.rollout.desired_state import DesiredStateStore
from outstation.device.store.store import Store
from tests.kit.marks import crashing
from tests.kit.rollouts import Site, bundles_in, signed, tiles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bundles_in(tmp_path_factory.mktemp("bundles"), "crash")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Site:
    return Site.template(tmp_path_factory.mktemp("template"), bundles, "2", "crash")


class Killed(BaseException):
    """Nothing after this is done."""


@contextlib.contextmanager
def dying(at: int, *, after_commit: bool) -> Iterator[list[int]]:
    """Die at the commit of the step of a roll-out of that number, from 0; the list counts the steps."""
    written: list[int] = []
    write, transaction = transitions.record, Store.transaction

    def counted(*arguments: Any) -> Any:
        written.append(1)
        return write(*arguments)

    @contextlib.contextmanager
    def deadly(self: Store, **options: bool) -> Iterator[Any]:
        before = len(written)
        with transaction(self, **options) as tx:
            yield tx
            if before <= at < len(written) and not after_commit:
                raise Killed
        if before <= at < len(written):
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transitions, "record", counted)
        patched.setattr(Store, "transaction", deadly)
        yield written


def go(site: Site, text: str, strategy: str, *, wild_from: int, until: Callable[[Site], bool]) -> None:
    """Desire it, as a retained message that comes with each connection, and run batches until it is there."""
    delivery = signed(site.operator.key, next(NUMBERS), {"sort": site.wanted(text, strategy)})
    end = time.monotonic() + 60
    while not until(site):
        assert time.monotonic() < end, f"it stands {site.standing}"
        receivers = site.daemon.uplink._receivers
        [desires] = [receiver for receiver in receivers if isinstance(receiver, DesiredStateStore)]
        desires.accept(delivery)
        desires.apply_pending(site.now)
        site.tick()
        if site.phase in ("shadow", "canary") and not site.daemon._updater.rollouts.is_resuming("sort"):
            if site.store.last_row("cells") == (site.store.cursor("sort") or 0):
                site.feed(wild=site._written >= wild_from)
            site.daemon._run_batches(site.daemon._scheduled_tasks[0], site.now)
        site.until(lambda: not site.daemon._updater.rollouts.is_resuming("sort"), "it is there again")


NUMBERS = itertools.count(1)
WHERE = [(number, after) for number in range(3) for after in (False, True)]


@pytest.mark.parametrize(("at", "after"), WHERE)
def test_a_kill_at_any_step_still_ends_active(tmp_path: Path, template: Site, at: int, after: bool) -> None:
    site = template.copy(tmp_path)
    with dying(at, after_commit=after) as steps_taken, contextlib.suppress(Killed):
        go(site, "2", "all", wild_from=10**9, until=lambda state: state.phase == "active")
    assert len(steps_taken) == at + 1
    site.crash()
    go(site, "2", "all", wild_from=10**9, until=lambda state: state.phase == "active")
    assert site.batch() == "2"
    site.crash()
    assert site.batch() == "2"
    assert site.events() == [("2", "downloading", ""), ("2", "canary", ""), ("2", "active", "")]
    assert site.activations() == [(None, "1", "configured"), ("1", "2", "roll-out")]
    assert tiles(site.answered(), site.store.cursor("sort") or 0)
    versions = [body["model"]["version"] for body in site.results()]
    assert versions == sorted(versions)
    site.stop()


# The steps before are those to settled.
@crashing
@pytest.mark.parametrize(("at", "after"), WHERE[-2:])
def test_a_kill_at_any_step_still_ends_rolled_back(tmp_path: Path, template: Site, at: int, after: bool) -> None:
    site = template.copy(tmp_path)
    with dying(at, after_commit=after) as steps_taken, contextlib.suppress(Killed):
        go(site, "crash", "all", wild_from=40, until=lambda state: state.phase == "rolled_back")
    assert len(steps_taken) == at + 1
    site.crash()
    go(site, "crash", "all", wild_from=40, until=lambda state: state.phase == "rolled_back")
    assert site.batch() == "1"
    site.crash()
    site.tick()
    assert (site.phase, site.batch()) == ("rolled_back", "1")
    assert [phase for _, phase, _ in site.events()] == ["downloading", "canary", "rolled_back"]
    assert tiles(site.answered(), site.store.cursor("sort") or 0)
    assert [body["model"]["version"] for body in site.results()].count("crash") == 1
    site.stop()

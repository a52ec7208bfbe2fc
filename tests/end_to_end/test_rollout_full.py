"""A disk that is full just when a roll-out goes on: what answers goes on, nothing is lost, and it is tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from outstation.device.rollout import transitions
from outstation.workbench.testing.patience import wait_until
from scripts.faults.disk import Card, no_card
from tests.kit.marks import crashing
from tests.kit.rollouts import Site, bundles_in, tiles

# Processes are counted by their commands.
pytestmark = pytest.mark.exec


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bundles_in(tmp_path_factory.mktemp("bundles"), "crash")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Site:
    return Site.template(tmp_path_factory.mktemp("template"), bundles, "2", "crash")


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    """The disk of the device's data, an ext4 of its own."""
    if why := no_card():
        pytest.skip(why)
    made = Card(tmp_path / "card.ext4", tmp_path / "device" / "data")
    made.make(128)
    yield made
    made.unmount()


@pytest.fixture
def site(tmp_path: Path, template: Site, card: Card) -> Iterator[Site]:
    """One that gives nothing up where there is no room."""
    made = template.copy(tmp_path / "device")
    made.stop()
    file = made.home / "outstation.toml"
    file.write_text(file.read_text(encoding="utf-8") + '[buffer]\nwhen_full = "refuse"\n', encoding="utf-8")
    made.start()
    yield made
    made.stop()


def fill_at(monkeypatch: pytest.MonkeyPatch, card: Card, phase: str) -> None:
    """The disk is full at the first step to this phase, in the middle of its transaction."""
    write = transitions.record
    full: list[int] = []

    def filling(*arguments: Any) -> Any:
        if arguments[4].phase == phase and not full:
            full.append(1)
            card.fill()
        return write(*arguments)

    monkeypatch.setattr(transitions, "record", filling)


def is_full(caplog: pytest.LogCaptureFixture) -> bool:
    return any("its roll-out continues when there is room" in record.message for record in caplog.records)


def versions(site: Site) -> list[str]:
    """Return the versions of the bundles that made results so far."""
    return sorted({body["model"]["version"] for body in site.results()})


def list_processes() -> set[psutil.Process]:
    """Return the processes of models and downloads, also ended ones that are not yet collected."""
    return {child for child in psutil.Process().children(recursive=True) if is_of_agent(child)}


@pytest.fixture
def processes(template: Site) -> Callable[[], int]:
    """Return a function that counts such processes; those that other tests left running are none of them."""
    left = list_processes()
    return lambda: len(list_processes() - left)


def is_of_agent(child: psutil.Process) -> bool:
    try:
        return any(argument.startswith("outstation.") for argument in child.cmdline())
    except psutil.ZombieProcess:
        return bool(child.name().startswith("python"))
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("before", ["downloading", "shadow"])
def test_a_disk_that_fills_up_at_activation_keeps_the_old_bundle(
    processes: Callable[[], int],
    site: Site,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: str,
) -> None:
    assert site.batch() == "1"
    if before == "shadow":
        site.desire("2", "shadow")
        site.until_phase("shadow")
        site.until(site.is_in_shadow, "it answers beside")
    site.feed()
    fill_at(monkeypatch, card, "canary")
    with caplog.at_level(logging.ERROR):
        site.desire("2", "all")
        site.until(lambda: is_full(caplog), "there is no room for the step")
    assert site.phase == before
    assert site.runs() == "1"
    # A download's process may still be ending.
    wait_until("what was made for the step is ended", lambda: processes() == (1 if before == "shadow" else 0))
    site.work()
    assert site.phases()[-1] == before
    assert site.store.last_row("cells") == 80, "no reading is lost"

    card.free()
    site.work()
    assert versions(site) == ["1"]
    site.until_phase("canary")
    assert [site.batch() for _ in range(3)] == ["2", "2", "2"]
    site.until_phase("active")
    assert tiles(site.answered(), site._written)
    assert site.activations() == [(None, "1", "configured"), ("1", "2", "roll-out")]
    assert [phase for _, phase, _ in site.events()].count("canary") == 1


def test_a_kill_at_activation_on_a_full_disk_is_recovered(
    site: Site, card: Card, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert site.batch() == "1"
    site.feed()
    fill_at(monkeypatch, card, "canary")
    with caplog.at_level(logging.ERROR):
        site.desire("2", "all")
        site.until(lambda: is_full(caplog), "there is no room for the step")
    site.crash()
    assert (site.phase, site.runs()) == ("downloading", "1")
    card.free()
    site.work()
    site.until_phase("canary")
    assert site.batch() == "2"
    assert tiles(site.answered(), site._written)


def test_a_disk_that_fills_up_at_promotion_keeps_the_canary(
    processes: Callable[[], int],
    site: Site,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert site.batch() == "1"
    site.desire("2", "all")
    site.until_phase("canary")
    fill_at(monkeypatch, card, "active")
    with caplog.at_level(logging.ERROR):
        assert [site.batch() for _ in range(3)] == ["2", "2", "2"]
        site.until(lambda: is_full(caplog), "there is no room for the step")
    assert (site.phase, site.runs()) == ("canary", "2")
    card.free()
    site.until_phase("active")
    assert site.batch() == "2"
    assert processes() == 0
    site.crash()
    assert site.batch() == "2"
    assert tiles(site.answered(), site._written)


@crashing
def test_a_full_disk_does_not_prevent_a_rollback(site: Site, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve file is for this case."""
    assert site.batch() == "1"
    site.desire("crash", "all")
    site.until_phase("canary")
    site.feed(wild=True)
    card.fill()
    site.work()
    assert (site.phase, site.reason, site.runs()) == ("rolled_back", "crash", "1")
    card.free()
    site.work()
    assert versions(site) == ["1"]
    assert tiles(site.answered(), site._written)

"""Why a device takes a bundle back: real bundles whose fault shows in real batches, beside the bundle before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from outstation.device.rollout import canary
from outstation.foundation.errors import StorageError
from outstation.ml.comparison import paired_intervals
from scripts.kit import rig
from scripts.kit.bundles import CENTRES, LABELS, Floats, change_manifest, model, readings
from tests.kit.bundle_devices import version
from tests.kit.rollouts import HOUR_S, Site, bundles_in, tiles, with_model

BATCHES = 12
NO_RULES = {"max_accuracy_drop": None, "max_error_growth": None, "output_drift": False}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`mixed` names classes wrongly, `renamed` in other words; `doubtful` has lower scores, `slow` takes its time."""
    made = bundles_in(tmp_path_factory.mktemp("bundles"), "sensitive")
    for text in ("mixed", "doubtful", "slow", "renamed"):
        made[text] = version(Path(shutil.copytree(made["1"], made["1"].with_name(text))), text)
    change_manifest(made["mixed"], mixed_up)
    change_manifest(made["doubtful"], doubtful)
    change_manifest(made["renamed"], renamed)
    with_model(made["slow"], rig.rigged(model("classify_int8"), "slow", times=8000))
    # It was counted for the labels as they were.
    for text in ("mixed", "renamed"):
        (made[text] / "reference.json").unlink()
    return made


def mixed_up(head: dict[str, Any]) -> None:
    head["output"]["labels"] = [*LABELS[1:], LABELS[0]]
    del head["files"]["reference.json"]


def renamed(head: dict[str, Any]) -> None:
    head["output"]["labels"] = ["north", "east", "south"]
    del head["files"]["reference.json"]


def doubtful(head: dict[str, Any]) -> None:
    head["output"]["temperature"] = 8.0


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Site:
    offered = ("2", "slow", "sensitive", "mixed", "doubtful", "renamed")
    return Site.template(tmp_path_factory.mktemp("template"), bundles, *offered)


@pytest.fixture
def site(tmp_path: Path, template: Site) -> Iterator[Site]:
    made = template.copy(tmp_path)
    yield made
    made.stop()


def on_probation(site: Site, text: str, **rules: Any) -> None:
    assert site.batch() == "1"
    site.desire(text, "all", rules={**NO_RULES, "min_batches": BATCHES, **rules})
    site.until_phase("canary")


def until_over(site: Site, batch: Callable[[], object], most: int = 60) -> int:
    """Batches until the bundle is no longer on probation; how many."""
    for count in range(1, most + 1):
        batch()
        if site.phase != "canary":
            return count
    raise AssertionError(f"after {most} batches it stands {site.standing}")


def labelled_batch(site: Site) -> None:
    """One batch, and then what somebody saw, which an operator sends."""
    first = site._written + 1
    site.batch()
    truth = [LABELS[i // 7 % 3] for i in range(40)]
    columns = {"row": list(range(first, first + 40)), "label": truth}
    ok, summary, _ = site.obey("label", task="sort", labels=json.dumps(columns))
    assert (ok, summary) == (True, "40 labels of sort accepted, 0 rejected.")


def is_taken_back(site: Site, text: str, reason: str) -> None:
    """The one before answers, no row was skipped or answered twice, and it is said once with its numbers."""
    assert (site.phase, site.reason) == ("rolled_back", reason)
    assert site.model_alerts() == [("raised", "critical")]
    assert site.activations()[-1] == (text, "1", "rolled_back")
    assert site.batch() == "1"
    assert tiles(site.answered(), site._written)
    site.desire(text, "all", "another")
    assert (site.phase, site.reason) == ("rejected", "hold_off")
    site.crash()
    assert site.batch() == "1"


# --- by intervals over what was compared ---


def test_a_canary_with_worse_labelled_accuracy_is_rolled_back(site: Site) -> None:
    on_probation(site, "mixed", max_accuracy_drop=0.05, min_hours=1.0)
    assert until_over(site, lambda: labelled_batch(site)) >= BATCHES
    assert site.standing is not None
    numbers = site.standing.numbers
    assert numbers["high"] < numbers["limit"] == -0.05
    assert numbers["value"] < -0.9
    is_taken_back(site, "mixed", "labels")


def test_without_labels_swapped_classes_are_not_detected(site: Site) -> None:
    on_probation(site, "mixed", max_accuracy_drop=0.05)
    until_over(site, site.batch)
    assert site.phase == "active"


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        ("mixed", {"min_agreement": 0.9}, "agreement"),
        ("doubtful", {"max_accuracy_drop": 0.05}, "estimated_accuracy"),
        ("slow", {"max_latency_ratio": 3.0}, "latency"),
    ],
)
def test_a_canary_that_violates_a_rule_is_rolled_back(
    site: Site, text: str, rules: dict[str, float], reason: str
) -> None:
    on_probation(site, text, min_hours=1.0, **rules)
    assert until_over(site, site.batch) >= BATCHES
    assert site.standing is not None
    numbers = site.standing.numbers
    assert numbers["low"] <= numbers["value"] <= numbers["high"]
    [limit] = rules.values()
    assert abs(numbers["limit"]) == limit
    is_taken_back(site, text, reason)


def test_rules_include_the_last_required_batch(site: Site) -> None:
    on_probation(site, "mixed", min_agreement=0.9)
    assert until_over(site, site.batch) == BATCHES
    is_taken_back(site, "mixed", "agreement")


def test_an_equally_good_bundle_passes_all_rules(site: Site) -> None:
    on_probation(site, "2", max_accuracy_drop=0.05, min_agreement=0.9, output_drift=True)
    until_over(site, lambda: labelled_batch(site))
    assert site.phase == "active"
    assert site.standing is not None
    assert {"labels", "estimated_accuracy", "agreement"} <= site.standing.numbers.keys()


# --- answers that drift ---


def one_class(rows: int) -> Floats:
    """Return readings of a site where only the second class occurs from now on."""
    random = np.random.default_rng(7)
    values: Floats = np.clip(CENTRES[1] + random.normal(0, 0.6, (rows, 4)), -3, 3).astype(np.float32)
    return values


def loud(rows: int) -> Floats:
    """Return such readings, so large that `sensitive` names the first class."""
    values = one_class(rows)
    values[:, 1] = np.random.default_rng(8).uniform(3.7, 4, rows)
    return values


def batch_of(site: Site, values: Floats) -> None:
    site.add(values)
    site.work()


def know_the_site(site: Site, small: int = 0) -> None:
    """Run batches until the canary has learned the site reference, and `small` batches more."""
    for _ in range(2):
        site.batch(800)
    calm = np.clip(readings(40 * small), -3, 3)
    for first in range(0, 40 * small, 40):
        batch_of(site, calm[first : first + 40])
    assert site.phase == "canary"
    assert not is_alarmed(site)


def is_alarmed(site: Site) -> bool:
    """Return True if the active bundle has an open alert on the drift of predictions or scores."""
    drift = site.daemon._scheduled_tasks[0].task.drift
    return drift is not None and bool(drift.state.suite.open_subjects[-3:-1].any())


def test_output_drift_of_the_canary_alone_rolls_it_back(site: Site) -> None:
    on_probation(site, "sensitive", output_drift=True, min_hours=1.0)
    know_the_site(site, BATCHES)
    until_over(site, lambda: batch_of(site, loud(400)))
    is_taken_back(site, "sensitive", "output_drift")


def test_output_drift_of_both_bundles_is_the_sites(site: Site) -> None:
    on_probation(site, "2", output_drift=True, min_hours=1.0)
    know_the_site(site, BATCHES)
    batch_of(site, one_class(800))
    assert is_alarmed(site)
    assert site.phase == "canary"
    site.tick(HOUR_S)
    site.until_phase("active")
    assert tiles(site.answered(), site._written)


def test_output_drift_waits_for_the_comparison(site: Site) -> None:
    on_probation(site, "2", output_drift=True, min_batches=3)
    know_the_site(site)
    batch_of(site, one_class(800))
    assert is_alarmed(site)
    assert site.phase == "canary", "three batches were asked, and tell nothing"
    assert until_over(site, lambda: batch_of(site, one_class(40))) >= 5
    assert site.phase == "active"


def test_early_output_drift_rolls_back_once_comparable(site: Site) -> None:
    on_probation(site, "sensitive", output_drift=True, min_batches=3)
    know_the_site(site)
    batch_of(site, loud(800))
    assert is_alarmed(site)
    assert site.phase == "canary"
    until_over(site, lambda: batch_of(site, loud(40)))
    is_taken_back(site, "sensitive", "output_drift")


def test_output_drift_alone_counts_for_incomparable_bundles(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary.CanaryRun, "_list_drifting_outputs", lambda run: [""] if run.is_serving else [])
    on_probation(site, "renamed", output_drift=True)
    assert until_over(site, site.batch) == paired_intervals.MIN_BLOCKS
    is_taken_back(site, "renamed", "output_drift")


def test_a_store_failure_ends_model_processes_without_a_write(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its threads never began here.
    monkeypatch.setattr(site.daemon.intake, "stop", lambda: None)
    monkeypatch.setattr(site.daemon.uplink, "stop", lambda drain_s: None)
    assert site.batch() == "1"
    site.desire("2", "shadow")
    site.until_phase("shadow")
    site.until(site.is_in_shadow, "it answers beside")
    before, written = len(psutil.Process().children(recursive=True)), site.store.get_meta("seq", "")
    site.daemon.signals.fail(StorageError("the disk is gone"))
    site.daemon._shut_down()
    assert len(psutil.Process().children(recursive=True)) == before - 1
    assert site.store.get_meta("seq", "") == written

"""Roll-outs on a device: shadow, probation, settled, taken back, and all of it again after a crash."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from outstation.__main__ import main
from outstation.device.bundles import history
from outstation.device.bundles.quarantine import CrashMarker, CrashRecord
from outstation.device.bundles.rollout_state import find_canary_digest as on_probation_now
from outstation.device.rollout.canary import CanaryRun
from outstation.device.rollout.shadow import ShadowState
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.foundation import clock
from outstation.foundation.errors import StorageFull
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.state import DriftState
from outstation.ml.model.sandbox import probe
from tests.kit.marks import crashing
from tests.kit.rollouts import HOUR_S, Site, bundles_in, tiles

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bundles_in(tmp_path_factory.mktemp("bundles"), "crash", "error", "hang", "wrong", "otherwise")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Site:
    offered = ("2", "3", "wrong", "crash", "error", "hang", "otherwise")
    return Site.template(tmp_path_factory.mktemp("template"), bundles, *offered)


@pytest.fixture
def site(tmp_path: Path, template: Site) -> Iterator[Site]:
    made = template.copy(tmp_path)
    yield made
    made.stop()


def test_a_good_bundle_becomes_active_and_stays_active_over_restarts(site: Site) -> None:
    assert site.batch() == "1"
    site.desire("2", "shadow")
    site.until_phase("shadow")
    assert site.batch() == "1"
    site.desire("2", "canary", percent=100.0)
    site.until_phase("canary")
    assert [site.batch() for _ in range(3)] == ["2", "2", "2"]
    site.until_phase("active")
    assert site.batch() == "2"
    site.desire("2", "all")
    site.crash()
    assert site.runs() == "2"
    assert site.batch() == "2"
    assert site.phases() == ["downloading", "shadow", "canary", "active", "active"]
    assert site.activations() == [(None, "1", "configured"), ("1", "2", "roll-out")]
    assert tiles(site.answered(), 7 * 40)
    assert site.model_alerts() == []


def on_probation(site: Site, text: str = "2", **more: Any) -> Site:
    assert site.batch() == "1"
    site.desire(text, "all", **more)
    site.until_phase("canary")
    return site


def settled(site: Site, text: str = "2") -> Site:
    on_probation(site, text)
    for _ in range(3):
        site.batch()
    site.until_phase("active")
    return site


# --- who it is for ---


def test_an_unselected_device_only_reports_once(site: Site) -> None:
    site.desire("2", "canary", percent=0.0)
    site.tick(10)
    site.desire("2", "canary", percent=0.001)
    site.tick(10)
    assert site.events() == [("2", "not_selected", "")]
    assert site.copies() == {"1"}
    assert site.batch() == "1"


def test_a_shadow_ends_when_the_device_is_no_longer_selected(site: Site) -> None:
    site.desire("2", "shadow")
    site.until_phase("shadow")
    task = site.daemon._scheduled_tasks[0].task
    site.until(lambda: any(isinstance(part, CanaryRun) for part in task.parts), "it answers beside")
    site.desire("2", "shadow", percent=0.0)
    assert site.phase == "not_selected"
    assert not any(isinstance(part, CanaryRun) for part in task.parts)
    assert site.daemon._updater.rollouts._rollouts["sort"].canary is None


def compared(site: Site) -> ShadowState | None:
    """Return the stored state of a comparison."""
    result = site.store.load_state("sort", task_keys.SHADOW_STATE)
    return None if result is None else msgspec.msgpack.decode(result, type=ShadowState)


def test_comparison_state_survives_restarts_until_the_bundle_is_active(site: Site) -> None:
    on_probation(site)
    site.batch()
    site.until(lambda: compared(site) is not None, "it was told of the first batch")
    site.crash()
    state_of = compared(site)
    assert state_of is not None
    assert (state_of.rollout, state_of.message_count) == ("r-2", 1)
    for _ in range(2):
        site.batch()
    site.until_phase("active")
    assert compared(site) is None
    site.crash()
    site.batch()
    assert compared(site) is None


@pytest.mark.parametrize(("text", "phase"), [("error", "rejected"), ("2", "cancelled"), ("3", "not_selected")])
def test_comparison_state_is_deleted_when_a_shadow_ends(site: Site, text: str, phase: str) -> None:
    site.desire(text, "shadow")
    site.until_phase("shadow")
    site.until(site.is_in_shadow, "it answers beside")
    site.batch()
    site.until(lambda: compared(site) is not None, "it was told of the first batch")
    match phase:
        case "rejected":
            site.batch(wild=True)
        case "cancelled":
            site.desire_tasks({})
        case _:
            site.desire(text, "shadow", percent=0.0)
    site.until_phase(phase)
    assert compared(site) is None
    site.batch()
    assert compared(site) is None


def test_a_shadow_that_becomes_the_canary_is_compared_anew(site: Site) -> None:
    site.desire("2", "shadow")
    site.until_phase("shadow")
    site.until(site.is_in_shadow, "it answers beside")
    site.batch()
    site.until(lambda: compared(site) is not None, "it was told of the first batch")
    site.desire("2", "canary")
    site.until_phase("canary")
    assert compared(site) is None
    site.batch()
    site.until(lambda: compared(site) is not None, "it was told of the first batch")
    state_of = compared(site)
    assert state_of is not None
    assert state_of.task_digest == site.digest("2")


def test_an_active_bundle_stays_when_it_is_no_longer_desired(site: Site) -> None:
    settled(site)
    site.desire_tasks({})
    site.crash()
    assert (site.phase, site.batch()) == ("active", "2")


def shadows(site: Site) -> list[dict[str, Any]]:
    return [body for body in site.messages() if body["kind"] == "shadow"]


def test_a_shadow_publishes_no_result_and_reports_its_agreement(site: Site) -> None:
    site.desire("2", "shadow")
    site.until_phase("shadow")
    site.until(site.is_in_shadow, "it answers beside")
    for _ in range(3):
        assert site.batch() == "1"
        site.until(lambda: len(shadows(site)) >= len(site.results()), "it was told")
    [first, *_] = shadows(site)
    assert (first["rollout"], first["model"]["version"], first["other"]["version"]) == ("r-2", "1", "2")
    assert (
        sum(message["n"] for message in shadows(site))
        == sum(message["agreeing"] for message in shadows(site))
        == 3 * 40
    )
    assert tiles(site.answered(), 3 * 40)


@crashing
def test_a_crashing_shadow_is_rejected_and_delays_no_batch(site: Site) -> None:
    site.desire("crash", "shadow")
    site.until_phase("shadow")
    site.until(site.is_in_shadow, "it answers beside")
    assert site.batch(wild=True) == "1"
    site.until_phase("rejected")
    assert site.reason == "error_rate"
    assert site.standing is not None
    assert "crashed" in site.standing.detail
    assert site.batch() == "1"
    parts = site.daemon._scheduled_tasks[0].task.parts
    assert not any(isinstance(part, CanaryRun) for part in parts)


def test_the_previous_bundle_is_the_shadow_of_a_canary(site: Site) -> None:
    settled(site)
    messages = shadows(site)
    assert {(entry["model"]["version"], entry["other"]["version"]) for entry in messages} == {("2", "1")}
    assert sum(entry["n"] for entry in messages) == 3 * 40
    assert site.standing is not None
    assert site.standing.numbers["batches"] == 3


# --- what speaks against a bundle ---


def test_a_bundle_with_failing_golden_vectors_is_rejected(site: Site) -> None:
    site.desire("wrong", "all")
    site.until_phase("rejected")
    assert site.events() == [("wrong", "downloading", ""), ("wrong", "rejected", "golden_vectors")]
    assert site.model_alerts() == [("raised", "warning")]
    assert site.batch() == "1"
    assert site.copies() == {"1"}


@pytest.mark.parametrize("trap", [pytest.param("crash", marks=crashing), "error"])
def test_the_previous_bundle_answers_the_batch_of_a_failed_canary(site: Site, trap: str) -> None:
    on_probation(site, trap)
    assert site.batch() == trap
    assert site.batch(wild=True) == "1"
    assert (site.phase, site.reason) == ("rolled_back", {"error": "error_rate"}.get(trap, trap))
    assert site.batch() == "1"
    assert tiles(site.answered(), 4 * 40)
    assert [body["model"]["version"] for body in site.results()] == ["1", trap, "1", "1"]
    assert site.model_alerts() == [("raised", "critical")]
    assert site.activations()[-1] == (trap, "1", "rolled_back")


def test_a_hanging_canary_is_killed_in_time(site: Site) -> None:
    on_probation(site, "hang", rules={"batch_timeout_s": 1.0})
    assert site.batch(wild=True) == "1"
    assert (site.phase, site.reason) == ("rolled_back", "hang")
    assert tiles(site.answered(), 2 * 40)


def test_rules_may_tolerate_a_share_of_failed_batches(site: Site) -> None:
    on_probation(site, "error", rules={"max_error_rate": 0.5, "min_batches": 5})
    assert [site.batch(wild=wild) for wild in (False, True, False, False)] == ["error", "1", "error", "error"]
    assert site.phase == "canary"
    assert site.batch() == "error"
    site.until_phase("active")
    assert tiles(site.answered(), 6 * 40)
    assert site.standing is not None
    assert site.standing.numbers["errors"] == 1


def test_a_canary_above_the_batch_timeout_is_rolled_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    on_probation(site, rules={"batch_timeout_s": 20.0})
    model = site.daemon._scheduled_tasks[0].task.model
    wait = model.wait

    def wait_long(run: Any) -> Any:
        numbers = wait(run)
        run.seconds += 21.0
        return numbers

    monkeypatch.setattr(model, "wait", wait_long)
    assert site.batch() == "2"
    assert (site.phase, site.reason) == ("rolled_back", "batch_timeout")
    assert site.batch() == "1"


@pytest.mark.parametrize("batches", [12, 25, 31])
def test_a_disagreeing_canary_is_rolled_back_after_min_batches(site: Site, batches: int) -> None:
    on_probation(site, "otherwise", rules={"min_batches": batches, "min_agreement": 0.75})
    assert {site.batch() for _ in range(batches - 1)} == {"otherwise"}
    assert site.phase == "canary"
    site.batch()
    assert (site.phase, site.reason) == ("rolled_back", "agreement")
    assert sum(message["batches"] for message in shadows(site)) == batches
    assert site.batch() == "1"


def test_a_canary_is_not_promoted_before_its_last_report_is_stored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    on_probation(site, "otherwise", rules={"min_batches": 25, "min_agreement": 0.75})
    for _ in range(24):
        site.batch()
    with monkeypatch.context() as full:
        full.setattr(MessageLog, "append", _refuse_comparisons(MessageLog.append))
        site.batch()
        site.tick()
        assert site.phase == "canary"
    site.tick(HOUR_S)
    assert (site.phase, site.reason) == ("rolled_back", "agreement")


def _refuse_comparisons(write: Callable[..., Any]) -> Callable[..., Any]:
    def refusing(author: MessageLog, tx: Any, kind: str, *more: Any, **named: Any) -> Any:
        if kind == "shadow":
            raise StorageFull("no room")
        return write(author, tx, kind, *more, **named)

    return refusing


def test_a_hold_off_applies_to_every_roll_out_until_it_ends(site: Site) -> None:
    on_probation(site, "crash", rules={"hold_off_hours": 2.0})
    site.batch(wild=True)
    assert site.phase == "rolled_back"
    site.desire("crash", "all", "another")
    assert (site.phase, site.reason) == ("rejected", "hold_off")
    site.crash()
    site.tick()
    assert (site.phase, site.reason) == ("rejected", "hold_off")
    site.tick(1.9 * HOUR_S)
    assert (site.phase, site.reason) == ("rejected", "hold_off")
    site.tick(0.2 * HOUR_S)
    site.until_phase("canary")
    assert site.model_alerts() == [("raised", "critical"), ("raised", "warning"), ("cleared", "info")]


@crashing
def test_another_bundle_can_be_tried_during_a_hold_off(site: Site) -> None:
    on_probation(site, "crash")
    site.batch(wild=True)
    site.desire("2", "all")
    site.until_phase("canary")
    assert site.batch() == "2"


# --- operators ---


def test_an_operators_rollback_of_a_canary_begins_a_hold_off(site: Site) -> None:
    on_probation(site)
    assert site.batch() == "2"
    ok, summary, data = site.obey("rollback", task="sort")
    assert ok, summary
    assert (data["from"], data["to"]) == (site.digest("2"), site.digest("1"))
    assert (site.phase, site.reason) == ("rolled_back", "operator")
    assert site.batch() == "1"
    site.tick(60)
    site.crash()
    site.tick(60)
    assert (site.phase, site.batch()) == ("rolled_back", "1")
    assert tiles(site.answered(), 4 * 40)


def test_an_operators_rollback_of_an_active_bundle_begins_a_hold_off(site: Site) -> None:
    settled(site)
    assert site.obey("rollback", task="sort")[0]
    assert (site.phase, site.reason, site.batch()) == ("rolled_back", "operator", "1")
    site.crash()
    site.tick()
    assert (site.phase, site.batch()) == ("rolled_back", "1")


@pytest.mark.parametrize("phase", ["shadow", "canary"])
def test_an_abort_ends_a_shadow_and_a_canary(site: Site, phase: str) -> None:
    assert site.batch() == "1"
    site.desire("2", "shadow" if phase == "shadow" else "all")
    site.until_phase(phase)
    site.batch()
    site.desire("2", "rollback")
    assert (site.phase, site.reason) == ("cancelled", "aborted")
    assert site.batch() == "1"
    assert tiles(site.answered(), 3 * 40)


def test_an_abort_returns_an_active_device_to_the_verified_previous_bundle(site: Site) -> None:
    settled(site)
    site.desire("2", "rollback")
    assert site.batch() == "2"
    site.until_phase("cancelled")
    assert site.batch() == "1"
    site.crash()
    site.tick()
    assert (site.phase, site.batch()) == ("cancelled", "1")


def test_an_abort_waits_for_a_copy_of_a_previous_bundle(site: Site) -> None:
    settled(site)
    copy = history.copy_folder(site.conf.data_dir, site.digest("1"))
    copy.rename(site.home / "away")
    site.desire("2", "rollback")
    site.tick()
    assert (site.phase, site.reason, site.batch()) == ("rejected", "incompatible", "2")
    (site.home / "away").rename(copy)
    site.until_phase("cancelled")
    assert site.batch() == "1"
    site.crash()
    site.tick()
    assert (site.phase, site.batch()) == ("cancelled", "1")


def test_a_config_that_names_another_bundle_cancels_the_roll_out(site: Site) -> None:
    settled(site)
    site.crash("3")
    site.tick()
    assert site.phase == "cancelled"
    assert site.standing is not None
    assert "the config on this device names another bundle" in site.standing.detail
    assert site.batch() == "3"
    site.crash()
    site.tick()
    assert (site.phase, site.batch()) == ("cancelled", "3")
    site.desire("2", "all", "another")
    site.until_phase("canary")


def test_a_config_change_cancels_a_canary(site: Site) -> None:
    on_probation(site)
    site.batch()
    site.crash("3")
    site.tick()
    assert (site.phase, site.batch()) == ("cancelled", "3")
    site.crash()
    assert site.batch() == "3"
    assert site.activations()[-1] == ("2", "3", "cancelled")


def test_a_rollback_right_after_a_start_ends_the_canary(site: Site) -> None:
    on_probation(site)
    site.batch()
    site.crash()
    assert site.daemon._updater.rollouts.is_resuming("sort")
    ok, summary, _ = site.obey("rollback", task="sort")
    assert ok, summary
    assert (site.phase, site.reason, site.batch()) == ("rolled_back", "operator", "1")
    assert tiles(site.answered(), 3 * 40)


def drift_of(site: Site) -> DriftState:
    drift = site.daemon._scheduled_tasks[0].task.drift
    assert drift is not None
    return drift.state


def with_alerts_of_canary(site: Site, count: int) -> None:
    """The canary has raised so many alerts of one field."""
    stored = site.store.load_state("sort", task_keys.DRIFT_STATE)
    assert stored is not None
    state = DriftState.from_bytes(stored)
    counts = state.raised_counts.copy()
    counts[0] = count
    with site.store.transaction() as tx:
        tx.save_state("sort", task_keys.DRIFT_STATE, replace(state, raised_counts=counts).to_bytes())


@pytest.mark.parametrize("is_crash", [False, True])
def test_alert_numbers_of_a_canary_that_is_not_loaded_are_never_used_again(site: Site, is_crash: bool) -> None:
    on_probation(site)
    site.batch()
    with_alerts_of_canary(site, 5)
    if is_crash:
        marked(site, "2")
    else:
        site.crash()
        ok, summary, _ = site.obey("rollback", task="sort")
        assert ok, summary
    assert site.phase == "rolled_back"
    assert drift_of(site).raised_counts.min() == 5
    assert site.batch() == "1"
    site.crash()
    assert drift_of(site).raised_counts.min() == 5


# --- the agent itself ---


def marked(site: Site, text: str) -> None:
    """The agent ends while that bundle is loaded into it: its mark stays."""
    site.stop()
    CrashMarker(site.conf.data_dir).write(CrashRecord("sort", site.digest(text), f"{text} {next(NUMBERS)}"))
    site.start()


def test_a_crash_during_promotion_rolls_back_at_once(site: Site) -> None:
    on_probation(site)
    site.batch()
    marked(site, "2")
    assert (site.phase, site.reason) == ("rolled_back", "crash")
    assert site.batch() == "1"
    site.crash()
    site.tick()
    assert (site.phase, site.batch()) == ("rolled_back", "1")
    assert site.phases() == ["downloading", "canary", "rolled_back"]
    assert [body["event"] for body in site.messages() if body.get("event") == "quarantined"] == []


def test_an_active_bundle_that_crashes_twice_counts_as_rolled_back(site: Site) -> None:
    settled(site)
    marked(site, "2")
    assert site.phase == "active"
    marked(site, "2")
    site.tick()
    assert (site.phase, site.reason, site.batch()) == ("rolled_back", "crash", "1")


def test_stopping_does_not_wait_for_a_hanging_model(site: Site) -> None:
    on_probation(site, "hang")
    site.feed(wild=True)
    threading.Timer(0.5, site.daemon.signals.request_stop).start()
    began = time.monotonic()
    site.daemon._run_batches(site.daemon._scheduled_tasks[0], site.now)
    assert time.monotonic() - began < 30
    assert (site.phase, site.store.cursor("sort")) == ("canary", 40)


def test_a_roll_out_repairs_a_task_with_a_broken_bundle(site: Site) -> None:
    site.stop()
    for path in (site.home / "data" / "bundles" / "tiny", *(site.home / "data" / "bundles" / ".copies").iterdir()):
        (path / "model.tflite").write_bytes(b"no model")
    site.start()
    assert site.runs() is None
    site.desire("2", "all")
    site.until_phase("canary")
    assert [site.batch() for _ in range(3)] == ["2", "2", "2"]
    site.until_phase("active")
    site.crash()
    assert site.batch() == "2"


@crashing
def test_rows_wait_if_the_only_bundle_crashes(site: Site) -> None:
    site.stop()
    for path in (site.home / "data" / "bundles" / "tiny", *(site.home / "data" / "bundles" / ".copies").iterdir()):
        (path / "model.tflite").write_bytes(b"no model")
    site.start()
    site.desire("crash", "all")
    site.until_phase("canary")
    assert site.batch() == "crash"
    site.feed(wild=True)
    site.work()
    assert (site.phase, site.runs(), site.store.cursor("sort")) == ("rolled_back", None, 40)


# --- drift ---


def resets(site: Site) -> int:
    return len([body for body in site.messages() if body.get("event") == "reference reset"])


def learned(site: Site) -> str:
    """The digest of the site's reference, once there is one."""
    while (result := site.store.load_state("sort", task_keys.SITE_REFERENCE)) is None:
        site.batch(800)
    return Reference.from_json(result).digest


@crashing
def test_a_rollback_keeps_what_the_site_had_learned(site: Site) -> None:
    before = learned(site)
    site.desire("crash", "all")
    site.until_phase("canary")
    site.batch()
    assert learned(site) == before
    site.crash()
    assert site.batch(wild=True) == "1"
    task = site.daemon._scheduled_tasks[0].task
    assert task.drift is not None
    assert task.drift.state.site_reference is not None
    assert task.drift.state.site_reference.digest == before == learned(site)
    site.batch()
    site.crash()
    assert (learned(site), resets(site)) == (before, 0)


def test_a_promoted_bundle_keeps_what_the_site_had_learned(site: Site) -> None:
    before = learned(site)
    site.desire("2", "all")
    site.until_phase("canary")
    assert learned(site) == before
    for _ in range(3):
        site.batch()
    site.until_phase("active")
    site.crash()
    assert (site.batch(), resets(site), learned(site)) == ("2", 0, before)


# --- where there is nothing to get it from ---


def test_without_updates_a_missing_bundle_is_rejected_until_it_is_copied(
    tmp_path: Path, bundles: dict[str, Path]
) -> None:
    site = Site(tmp_path, bundles)
    site.desire("2", "all")
    site.until_phase("rejected")
    assert site.reason == "download_failed"
    assert site.standing is not None
    assert "no [updates]" in site.standing.detail
    site._offered = ("2",)
    site.crash()
    site.until_phase("canary")
    assert site.phases() == ["downloading", "rejected", "canary"]
    site.stop()


def test_a_passed_deadline_is_reported_once(site: Site) -> None:
    deadline = clock.to_rfc3339(site.now.wall_us + 3_600_000_000)[:19] + "Z"
    on_probation(site, deadline=deadline)
    site.batch()
    site.tick(1.5 * HOUR_S)
    site.tick()
    reported = [body["evidence"] for body in site.messages() if body.get("event") == "rollout"]
    assert [(entry["phase"], entry["late"]) for entry in reported] == [
        ("downloading", False),
        ("canary", False),
        ("canary", True),
    ]
    assert site.obey("report")[2]["tasks"][0]["rollout"]["late"] is True
    site.batch()
    site.batch()
    site.until_phase("active")
    assert site.standing is not None
    assert not site.standing.late


def test_batches_continue_while_a_bundle_is_probed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, requested = threading.Event(), threading.Event()
    prove = probe.probe

    def slow(*arguments: Any) -> probe.ProbeReport:
        requested.set()
        assert may_go_on.wait(200)
        return prove(*arguments)

    monkeypatch.setattr(probe, "probe", slow)
    site.desire("2", "all")
    site.until(requested.is_set, "it is being proved")
    for _ in range(3):
        began = time.monotonic()
        site.tick()
        assert site.batch() == "1"
        assert time.monotonic() - began < 60
    assert site.phase == "downloading"
    may_go_on.set()
    site.until_phase("canary")


def test_two_tasks_can_get_the_same_bundle_at_once(site: Site) -> None:
    site.stop()
    file = site.home / "outstation.toml"
    other = '[tasks.again]\nstream = "cells"\nbundle = "tiny"\nschedule = "every 60 s"\n'
    file.write_text(file.read_text(encoding="utf-8") + other, encoding="utf-8")
    site.start()
    wanted = site.wanted("2", "all")
    site.desire_tasks({"sort": wanted, "again": wanted})
    site.until(lambda: on_probation_now(site.store, "again") == site.digest("2"), "the other task's")
    site.until_phase("canary")


# --- what others see ---


def test_health_and_status_explain_the_roll_out_state(site: Site) -> None:
    site.desire("wrong", "all", "r7")
    site.until_phase("rejected")
    status = site.obey("report")[2]["tasks"][0]
    health = [body for body in site.messages() if body["kind"] == "health"][-1]["tasks"]["sort"]
    for reported in (status, health):
        first = reported["rollout"]
        assert (first["id"], first["strategy"], first["phase"], first["reason"]) == (
            "r7",
            "all",
            "rejected",
            "golden_vectors",
        )
        assert first["desired"] == {"name": "tiny", "version": "wrong", "digest": site.digest("wrong")}
        assert (first["selected"], first["percent"], first["late"]) == (True, 100.0, False)
        assert "golden" in first["detail"]
    assert status["bundle"] == "tiny 1"


def test_a_copy_of_the_candidate_is_stored_until_its_rollback(site: Site) -> None:
    on_probation(site)
    assert site.copies() == {"1", "2"}
    site.desire("2", "rollback")
    assert site.copies() == {"1"}


def test_a_manual_batch_during_a_canary_uses_the_previous_bundle(site: Site) -> None:
    on_probation(site)
    assert site.batch() == "2"
    site.feed()
    site.stop()
    with pytest.raises(SystemExit) as ended:
        main(["batch", "-c", str(site.file)])
    assert ended.value.code in (0, None)
    site.start()
    assert site.results()[-1]["model"]["version"] == "1"
    assert (site.phase, site.batch()) == ("canary", "2")
    assert tiles(site.answered(), 4 * 40)
    assert site.activations()[-1] == ("1", "2", "roll-out")

"""Quarantine: a bundle that crashed twice in a row; a healthy one that was killed is not quarantined."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.device import open_message_log, open_store
from outstation.device.bundles import history, overrides
from outstation.device.bundles.quarantine import CrashMarker, CrashRecord
from outstation.device.store import task_keys
from outstation.ml.model.inference import runtime
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.workbench.testing.patience import wait_until
from tests.kit.bundle_devices import Device, version
from tests.kit.operators import NOW
from tests.kit.rollouts import with_trap

pytest_plugins = ["tests.kit.bundle_device_fixtures"]

NUMBERS = itertools.count()


@pytest.fixture
def device(bundle_device: Device) -> Device:
    return bundle_device


def dies(device: Device, digest: str, task: str = "sort") -> None:
    """Leave the crash marker of a daemon that ended while that bundle was loaded or ran."""
    device.store.close()
    CrashMarker(device.conf.data_dir).write(CrashRecord(task, digest, str(next(NUMBERS))))


def dies_and_starts(device: Device, digest: str) -> None:
    dies(device, digest)
    device.start()


def audits(device: Device, event: str) -> list[dict[str, Any]]:
    return [body for body in device.messages() if body.get("event") == event]


def alerts(device: Device) -> list[tuple[str, str, str]]:
    """Return (id, state, severity) of all model alerts."""
    result = [body for body in device.messages() if body.get("alert") == "model"]
    return [(body["id"], body["state"], body["severity"]) for body in result]


def set_aside(device: Device) -> set[str]:
    return set(overrides.load_quarantined(device.store, "sort"))


def test_one_death_sets_nothing_aside(device: Device) -> None:
    device.crash("2")
    dies_and_starts(device, device.digest("2"))
    assert device.runs() == device.results_by() == "2"
    assert (set_aside(device), alerts(device)) == (set(), [])


def test_after_two_crashes_in_a_row_the_previous_bundle_resumes(device: Device) -> None:
    device.crash("2")
    bad = device.digest("2")
    dies_and_starts(device, bad)
    dies_and_starts(device, bad)
    assert device.runs() == device.results_by() == "1"
    assert set_aside(device) == {bad}
    assert device.activations()[-1] == ("2", "1", "quarantine")
    [audit] = audits(device, "quarantined")
    assert audit["evidence"] == {"task": "sort", "digest": bad, "crashes": 2, "to": device.digest("1")}
    [alert] = [body for body in device.messages() if body.get("alert") == "model"]
    assert (alert["state"], alert["severity"], alert["id"]) == ("raised", "critical", "sort/quarantine")
    assert alert["summary"] == audit["summary"]
    assert "sort: tiny 2 (sha256:" in alert["summary"]
    assert "crashed or hung 2 times in a row" in alert["summary"]
    assert alert["summary"].endswith("tiny 1 runs instead.")


def test_it_stays_aside_over_restarts_and_status_says_so(device: Device) -> None:
    device.crash("2")
    bad = device.digest("2")
    dies_and_starts(device, bad)
    dies_and_starts(device, bad)
    device.crash()
    device.crash()
    assert device.runs() == "1"
    assert len(audits(device, "quarantined")) == 1
    [task] = device.obey("report")[2]["tasks"]
    assert (task["quarantined_bundles"], task["rolled_back_to"]) == ([bad], device.digest("1"))


def test_a_healthy_model_that_is_often_killed_is_not_quarantined(device: Device) -> None:
    device.crash("2")
    for _ in range(4):
        dies_and_starts(device, device.digest("2"))
        assert device.results_by() == "2"
    assert (set_aside(device), alerts(device)) == (set(), [])


def test_a_batch_of_another_bundle_does_not_reset_the_crash_count(device: Device) -> None:
    device.crash("2")
    bad = device.digest("2")
    dies(device, bad)
    device.configure("1")
    device.start()
    assert device.results_by() == "1"
    device.store.close()
    device.configure("2")
    dies_and_starts(device, bad)
    assert device.runs() == "1"
    assert set_aside(device) == {bad}


def test_deaths_of_two_bundles_are_not_added_up(device: Device) -> None:
    dies_and_starts(device, device.digest("1"))
    dies(device, device.digest("2"))
    device.configure("2")
    device.start()
    assert device.runs() == "2"
    assert set_aside(device) == set()


def test_a_marker_counts_once_even_if_the_next_start_crashes_too(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    device.crash("2")
    dies(device, device.digest("2"))
    with monkeypatch.context() as patched:
        patched.setattr(CrashMarker, "clear", die)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                device.start()
            device.store.close()
    device.start()
    assert device.runs() == "2"
    assert set_aside(device) == set()


def test_without_a_previous_bundle_the_task_stops_and_its_readings_wait(device: Device) -> None:
    bad = device.digest("1")
    dies_and_starts(device, bad)
    dies_and_starts(device, bad)
    assert device.runs() is None
    device.daemon._health_reporter.report_bundles(device.daemon._bundle_failures)
    [alert] = [body for body in device.messages() if body.get("alert") == "model"]
    assert (alert["state"], alert["severity"]) == ("raised", "critical")
    assert "tiny 1 (sha256:" in alert["summary"]
    assert "crashed or hung 2 times in a row" in alert["summary"]
    assert "readings are kept" in alert["summary"]
    assert audits(device, "quarantined")[0]["evidence"]["to"] is None
    device.add_rows(40)
    device.daemon.tick(NOW)
    assert (device.store.first_row("cells"), device.store.cursor("sort")) == (1, None)


def test_a_rollback_to_a_quarantined_bundle_resets_its_crash_count(device: Device) -> None:
    bad = device.digest("1")
    dies_and_starts(device, bad)
    dies_and_starts(device, bad)
    ok, summary, _ = device.obey("rollback", task="sort")
    assert ok, summary
    assert device.runs() == device.results_by() == "1"
    assert set_aside(device) == set()
    dies_and_starts(device, bad)
    assert device.runs() == "1"
    dies_and_starts(device, bad)
    assert device.runs() is None


def test_a_rollback_from_the_one_that_resumed_clears_the_alert(device: Device) -> None:
    device.crash("2")
    bad = device.digest("2")
    dies_and_starts(device, bad)
    dies_and_starts(device, bad)
    ok, summary, data = device.obey("rollback", task="sort")
    assert ok, summary
    assert data["to"] == bad
    assert device.runs() == "2"
    assert alerts(device)[-1] == ("sort/quarantine", "cleared", "info")
    device.crash()
    assert device.runs() == "2"


def test_another_configured_bundle_ends_the_quarantine(device: Device) -> None:
    device.crash("2")
    bad = device.digest("2")
    dies_and_starts(device, bad)
    dies_and_starts(device, bad)
    device.crash("3")
    assert device.runs() == "3"
    assert alerts(device)[-1] == ("sort/quarantine", "cleared", "info")
    device.crash("2")
    assert device.runs() == "2"


def test_where_the_one_that_resumed_dies_twice_as_well_the_task_stops(device: Device) -> None:
    device.crash("2")
    for text in ("2", "2", "1", "1"):
        dies_and_starts(device, device.digest(text))
    assert device.runs() is None
    assert set_aside(device) == {device.digest("1"), device.digest("2")}


def test_a_crashing_rollback_target_gives_way_to_the_configured_bundle(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    for _ in range(2):
        dies_and_starts(device, device.digest("1"))
    assert device.runs() == device.results_by() == "2"
    device.crash()
    assert (device.runs(), set_aside(device)) == ("2", {device.digest("1")})


def test_a_bundle_that_crashes_while_it_loads_is_never_activated(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies(device, device.digest("2"))
    device.configure("2")
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(runtime, "TfliteModel", die)
        with pytest.raises(KeyboardInterrupt):
            device.start()
    dies_and_starts(device, device.digest("2"))
    assert device.runs() == "1"
    assert device.activations() == [(None, "1", "configured")]


def test_without_the_copy_of_the_one_before_the_task_stops(device: Device) -> None:
    device.crash("2")
    bad = device.digest("2")
    dies_and_starts(device, bad)
    dies(device, bad)
    copy = history.copy_folder(device.conf.data_dir, device.digest("1"))
    copy.rename(copy.with_name("gone"))
    device.start()
    assert device.runs() is None


def test_a_mark_of_a_task_that_is_no_longer_configured_is_cleared(device: Device) -> None:
    dies(device, device.digest("1"), task="removed")
    device.start()
    assert CrashMarker(device.conf.data_dir).previous is None
    assert device.runs() == "1"


def test_the_model_runs_and_is_loaded_within_the_mark(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    run = runtime.TfliteModel._run_batch

    def looking(self: runtime.TfliteModel, part: Any) -> Any:
        left = CrashMarker(device.conf.data_dir).previous
        seen.append(left.digest if left else "")
        return run(self, part)

    monkeypatch.setattr(runtime.TfliteModel, "_run_batch", looking)
    device.crash()
    loaded = len(seen)
    device.results_by()
    assert 0 < loaded < len(seen)
    assert set(seen) == {device.digest("1")}
    assert CrashMarker(device.conf.data_dir).previous is None


def test_a_batch_by_hand_counts_the_death_of_the_one_before(device: Device) -> None:
    device.crash("2")
    dies(device, device.digest("2"))
    device.store = open_store(device.conf)
    tasks.open_crash_marker(device.conf, device.store, open_message_log(device.file, device.conf, device.store))
    crashes = device.store.load_state("sort", task_keys.CRASH_COUNT)
    assert crashes is not None
    assert json.loads(crashes)["count"] == 1


# --- models in processes of their own ---


@pytest.fixture
def confined(tmp_path: Path, bundles: dict[str, Path]) -> Iterator[Device]:
    """Return a device whose bundle "bad" crashes on readings of 3.9, in a process of its own."""
    bad = version(with_trap(Path(shutil.copytree(bundles["1"], tmp_path / "bad")), "crash"), "bad")
    made = Device(tmp_path, {**bundles, "bad": bad}, confinement="auto")
    yield made
    made.stop()


def test_a_model_that_crashes_twice_gives_way_while_the_daemon_goes_on(confined: Device) -> None:
    assert confined.results_by() == "1"
    confined.crash("bad")
    assert confined.results_by() == "bad"
    confined.add_rows(40, 3.9)
    before = len(confined.messages())
    confined.daemon._run_batches(confined.daemon._scheduled_tasks[0], NOW)
    assert (confined.runs(), set_aside(confined)) == ("bad", set())
    [alert] = [body for body in confined.messages()[before:] if body.get("alert") == "model"]
    assert "SIGFPE" in alert["summary"]
    confined.daemon._run_batches(confined.daemon._scheduled_tasks[0], NOW)
    assert (confined.runs(), set_aside(confined)) == ("1", {confined.digest("bad")})
    assert confined.activations()[-1] == ("bad", "1", "quarantine")
    confined.daemon._run_batches(confined.daemon._scheduled_tasks[0], NOW)
    newest = [body for body in confined.messages() if body["kind"] == "results"][-1]
    assert (newest["model"]["version"], newest["rows"]) == ("1", [81, 120])


def test_a_model_process_that_is_killed_while_idle_is_started_again(confined: Device) -> None:
    assert confined.results_by() == "1"
    model = confined.daemon._scheduled_tasks[0].task.model
    assert isinstance(model, SubprocessModel)
    assert model.pid is not None
    os.kill(model.pid, signal.SIGKILL)
    wait_until("it ended", lambda: not model.is_running)
    assert confined.results_by() == "1"
    assert (set_aside(confined), alerts(confined)) == (set(), [])


def test_the_daemon_that_is_killed_while_a_confined_model_runs_blames_no_bundle(confined: Device) -> None:
    confined.add_rows(40)
    seen: list[object] = []
    task = confined.daemon._scheduled_tasks[0].task

    class Looking(BatchPart):
        def confirm(self, batch: Batch) -> None:
            seen.append(CrashMarker(confined.conf.data_dir).previous)

    task.attach(Looking())
    confined.daemon._run_batches(confined.daemon._scheduled_tasks[0], NOW)
    assert seen == [None]


def test_a_quarantined_model_without_another_stops_its_task_alone(tmp_path: Path, bundles: dict[str, Path]) -> None:
    bad = with_trap(Path(shutil.copytree(bundles["1"], tmp_path / "bad")), "crash")
    device = Device(tmp_path, {"1": bad}, confinement="auto")
    try:
        device.add_rows(40, 3.9)
        for _ in range(2):
            device.daemon._run_batches(device.daemon._scheduled_tasks[0], NOW)
        assert device.runs() is None
        assert set_aside(device) == {device.digest("1")}
        assert ("sort/model", "raised", "critical") in alerts(device)
        assert device.store.last_row("cells") == 40
    finally:
        device.stop()

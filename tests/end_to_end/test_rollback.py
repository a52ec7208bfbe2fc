"""Rollback: copies of bundles that ran are verified like any bundle, also after restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outstation.device.bundles import history
from outstation.foundation import durable_files
from outstation.foundation.errors import StorageFull
from tests.kit.bundle_devices import Device

pytest_plugins = ["tests.kit.bundle_device_fixtures"]


@pytest.fixture
def device(bundle_device: Device) -> Device:
    return bundle_device


def test_a_first_bundle_has_nothing_to_go_back_to(device: Device) -> None:
    ok, summary, _ = device.obey("rollback", task="sort")
    assert not ok
    assert "nothing to go back to" in summary
    assert device.runs() == "1"


def test_a_rollback_runs_the_previous_bundle_also_after_a_restart(device: Device) -> None:
    device.crash("2")
    assert device.results_by() == "2"
    ok, summary, data = device.obey("rollback", task="sort")
    assert ok, summary
    assert (data["from"], data["to"]) == tuple(device.digest(text) for text in ("2", "1"))
    assert device.runs() == device.results_by() == "1"
    device.crash()
    assert device.runs() == device.results_by() == "1"
    assert device.activations() == [(None, "1", "configured"), ("1", "2", "configured"), ("2", "1", "rollback")]


def test_a_second_rollback_goes_back_to_the_one_that_was_left(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    ok, _, _ = device.obey("rollback", task="sort")
    assert ok
    assert device.runs() == "2"
    device.crash()
    assert device.runs() == "2"


def test_a_rollback_ends_when_another_bundle_is_configured(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    device.crash("3")
    assert device.runs() == "3"
    device.crash()
    assert device.runs() == "3"
    ok, _, data = device.obey("rollback", task="sort")
    assert (ok, data["to"]) == (True, device.digest("1"))


def test_only_the_last_two_bundles_are_stored(device: Device) -> None:
    device.crash("2")
    assert device.stored_versions() == {"1", "2"}
    device.crash("3")
    assert device.stored_versions() == {"2", "3"}


def test_an_altered_copy_is_refused_and_the_current_bundle_goes_on(device: Device) -> None:
    device.crash("2")
    copy = history.copy_folder(device.conf.data_dir, device.digest("1"))
    (copy / "model.tflite").write_bytes(b"evil")
    ok, summary, _ = device.obey("rollback", task="sort")
    assert not ok
    assert "altered" in summary
    assert device.runs() == device.results_by() == "2"
    device.crash()
    assert device.runs() == "2"


def broken(device: Device, text: str) -> str:
    """The version that runs after a start with this bundle of that version configured, whose model is none."""
    device.store.close()
    device.configure(text)
    (device.home / "data" / "bundles" / "tiny" / "model.tflite").write_bytes(b"not a model")
    device.start()
    return str(device.runs())


def test_a_broken_configured_bundle_leaves_the_current_one_and_an_alert(
    device: Device,
) -> None:
    assert broken(device, "2") == device.results_by() == "1"
    device.daemon._health_reporter.report_bundles(device.daemon._bundle_failures)
    [alert] = [body for body in device.messages() if body.get("alert") == "model"]
    assert (alert["state"], alert["severity"]) == ("raised", "critical")
    assert alert["summary"].startswith("sort goes on with tiny 1: ")
    assert "model.tflite was altered" in alert["summary"]
    device.crash("2")
    device.daemon._health_reporter.report_bundles(device.daemon._bundle_failures)
    assert device.runs() == "2"
    assert [body["state"] for body in device.messages() if body.get("alert") == "model"] == ["raised", "cleared"]
    assert device.activations()[-1] == ("1", "2", "configured")


def test_a_broken_bundle_on_disk_is_replaced_by_its_stored_copy(device: Device) -> None:
    assert broken(device, "1") == "1"
    assert device.activations() == [(None, "1", "configured")]


def test_a_rollback_rescues_a_task_with_a_broken_bundle(device: Device) -> None:
    copy = history.copy_folder(device.conf.data_dir, device.digest("1"))
    copy.rename(device.home / "away")
    device.store.close()
    model = device.home / "data" / "bundles" / "tiny" / "model.tflite"
    model.write_bytes(b"not a model")
    device.start()
    assert device.runs() is None
    (device.home / "away").rename(copy)
    ok, summary, _ = device.obey("rollback", task="sort")
    assert ok, summary
    assert device.runs() == device.results_by() == "1"
    device.crash()
    assert device.runs() == "1"


def test_a_crash_within_the_commit_leaves_the_bundle_that_ran(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.crash("2")
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(history, "record_activation", die)
        with pytest.raises(KeyboardInterrupt):
            device.obey("rollback", task="sort")
    device.crash()
    assert device.runs() == "2"
    with device.store.transaction() as tx:
        assert "stopped while" in tx.commands.unsent(0)[-1].summary


def test_half_a_copy_is_no_copy_and_is_made_anew(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.store.close()
    device.configure("2")
    writes = []

    def die_later(path: Path, data: bytes, mode: int) -> None:
        writes.append(path)
        if len(writes) == 3:
            raise KeyboardInterrupt
        path.write_bytes(data)

    with monkeypatch.context() as patched:
        patched.setattr(durable_files, "write_new", die_later)
        with pytest.raises(KeyboardInterrupt):
            device.start()
    device.daemon._store.close()
    device.store.close()
    device.start()
    assert device.stored_versions() == {"1", "2"}
    assert [path.name for path in (device.home / "data" / "bundles" / ".copies").iterdir() if "half" in path.name] == []


def test_a_disk_that_takes_no_copy_keeps_no_task_from_running(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable_files, "write_new", full)
        device.crash("2")
    assert device.runs() == "2"
    device.crash()
    assert device.stored_versions() == {"1", "2"}


def test_a_full_store_at_the_start_records_the_activation_at_the_next_one(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("full")

    with monkeypatch.context() as patched:
        patched.setattr(history, "record_activation", full)
        device.crash("2")
    assert device.activations()[-1] == (None, "1", "configured")
    device.crash()
    assert device.activations()[-1] == ("1", "2", "configured")


def test_pause_schedule_and_rollback_are_shown_by_health(device: Device) -> None:
    device.crash("2")
    device.obey("rollback", task="sort")
    device.obey("pause", task="sort")
    device.obey("set-schedule", task="sort", schedule="when 7 rows")
    ok, _, status = device.obey("report")
    assert ok
    health = [body for body in device.messages() if body["kind"] == "health"][-1]["tasks"]["sort"]
    expected = (True, "when 7 rows", device.digest("1"))
    assert (health["paused"], health["schedule_override"], health["rolled_back_to"]) == expected
    shown = status["tasks"][0]
    assert (shown["paused"], shown["schedule"], shown["rolled_back_to"]) == expected
    assert shown["bundle"] == "tiny 1"


def test_an_activation_says_what_labels_of_its_results_may_be(device: Device) -> None:
    bodies = [json.loads(message.payload) for message in device.store.unacknowledged_messages(0, 1000)]
    evidence = [body["evidence"] for body in bodies if body.get("event") == "activated"][-1]
    manifest = device.daemon._scheduled_tasks[0].task.bundle.manifest
    wanted = (manifest.kind, list(manifest.output.labels), manifest.output.threshold)
    assert (evidence["kind"], evidence["labels"], evidence["threshold"]) == wanted

"""Bundle without a drift reference that the config names: it ends the alerts of the bundle before it, once."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from outstation.device.rollout import saved_drift
from outstation.device.store import task_keys
from outstation.protocol.wire.messages import AlertPayload
from scripts.kit.bundles import CLASSIFY, activated, readings
from tests.kit.devices import NOW, Device


def alerts(device: Device) -> list[tuple[str, str]]:
    bodies = [message.body for message in device.messages()]
    return [(body.id, body.state) for body in bodies if isinstance(body, AlertPayload)]


def break_field(device: Device) -> None:
    """Let a site learn its reference, then let a field stand still."""
    device.feed(readings(500))
    rows = readings(200, seed=5)
    rows[:, 2] = 0.5
    device.feed(rows)
    device.run_all()


def end(device: Device) -> int:
    return saved_drift.end_unreferenced(device.task, device.store, device.author, NOW)


def test_a_config_change_to_a_bundle_without_a_reference_clears_what_is_open(tmp_path: Path) -> None:
    active = activated(CLASSIFY)
    device = Device(tmp_path, CLASSIFY, active)
    break_field(device)
    raised = {alert_id for alert_id, state in alerts(device) if state == "raised"}
    assert raised
    assert end(device) == 0, "a bundle with a reference goes on"

    device.active = replace(active, reference=None)
    device.restart()
    assert end(device) == len(raised)
    assert {alert_id for alert_id, state in alerts(device)[-len(raised) :] if state == "cleared"} == raised
    assert device.store.load_state("tiny", task_keys.DRIFT_STATE) is None
    device.restart()
    assert end(device) == 0, "it clears them once"

    device.active = active
    device.restart()
    assert device.task.drift is not None
    assert device.task.drift.state.site_reference is None
    break_field(device)
    again = [alert_id for alert_id, state in alerts(device) if state == "raised"]
    assert len(again) == len(set(again)) > len(raised), "no id is used twice"
    device.store.close()

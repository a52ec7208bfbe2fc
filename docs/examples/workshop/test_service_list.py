"""The service list names a machine whose sensor fails or that is silent, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from service_list import Visit, plan_visits

from outstation.ml.model.bundle import builtin

HERE = Path(__file__).parent
RECORDINGS = {"watch": builtin.recordings_dir() / "exercise.npz"}


def test_a_stuck_sensor_is_replaced(outstation_fleet):
    fault = {"kind": "stuck", "at": "4 min", "devices": ["sim-02"], "fields": ["wy"], "amount": 0.25}
    fleet = outstation_fleet(
        devices=3, config=HERE / "outstation.toml", recordings=RECORDINGS, scenario={"events": [fault]}
    )
    fleet.run("4 min")
    assert plan_visits(fleet.database) == []
    fleet.wait_for(alert="wy", device="sim-02", within="5 min")
    assert plan_visits(fleet.database) == [Visit("sim-02", "replace the sensor of wy")]


def test_a_silent_machine_is_visited_until_it_is_back(outstation_fleet):
    fleet = outstation_fleet(devices=2, config=HERE / "outstation.toml", recordings=RECORDINGS)
    fleet.run("1 min")
    fleet.set_offline("sim-01", is_offline=True)
    fleet.wait_for(alert="connection", within="6 min")
    assert plan_visits(fleet.database) == [Visit("sim-01", "look at power and network")]
    fleet.set_offline("sim-01", is_offline=False)
    fleet.wait_for(alert="connection", state="cleared", within="5 min")
    assert plan_visits(fleet.database) == []


def test_a_wait_says_what_was_there_instead(outstation_fleet):
    fleet = outstation_fleet(devices=1, config=HERE / "outstation.toml", recordings=RECORDINGS)
    with pytest.raises(AssertionError, match="alert 'drift' raised did not come within 90 s") as failure:
        fleet.wait_for(alert="drift", within="90 s")
    assert "sim-01: " in str(failure.value)
    assert "alerts: none" in str(failure.value)

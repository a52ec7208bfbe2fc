"""Simulated fleets over a real broker: nothing is lost, whatever happens to the links."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from outstation.foundation.errors import LinkDown
from outstation.workbench.cli.simulate import simulate
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from outstation.workbench.testing.simulation import scenario, setup, simulation_report
from outstation.workbench.testing.simulation.pace import Pace
from outstation.workbench.testing.simulation.runner import Simulation

_ROUGH = """
seed = 5
duration = "4 min"
groups.hall = { devices = 3, start_within = "10 s" }
network = { loss = 0.05, duplication = 0.1, delay_s = 2.0, disconnect = 0.005 }
events = [
  { kind = "power-cut", devices = ["hall-01"], at = "90 s", lasts = "20 s" },
  { kind = "outage", devices = ["hall-02"], at = "1 min", lasts = "1 min", expect = [] },
  { kind = "collector-outage", at = "50 s", lasts = "20 s" },
]
"""


@pytest.mark.process
def test_a_rough_day_over_a_real_broker_loses_nothing(tmp_path: Path, outstation_broker: MosquittoBroker) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(_ROUGH, encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    chosen = setup.load(None, folder, {}, {}, ())
    read = scenario.load(file, chosen.fields, chosen.batch_s)
    url = f"mqtt://127.0.0.1:{outstation_broker.port}"
    with contextlib.closing(Simulation(folder, read, chosen, broker=url, speed=20.0)) as simulation:
        outcome = simulation.run()
        document = simulation_report.build(read, outcome, simulation.store)
    assert outcome.audit.passed, outcome.audit.to_dict()
    assert outcome.undelivered == []
    assert outcome.messages > 30
    assert {entry["device"] for entry in document["audit"]["coverage"]} == {"hall-01", "hall-02", "hall-03"}
    # Real time had to pass.
    assert outcome.real_s > 240 / 20


@pytest.mark.parametrize("scenario", [True, False])
def test_a_broker_that_cannot_be_reached_ends_a_simulation_before_it_begins(tmp_path: Path, scenario: bool) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(_ROUGH, encoding="utf-8")
    home, url = tmp_path / "run", f"mqtt://127.0.0.1:{free_port()}"
    options = ["--scenario", str(file)] if scenario else []
    result = CliRunner().invoke(simulate, [*options, "--broker", url, "--dir", str(home)])
    assert isinstance(result.exception, LinkDown)
    assert str(result.exception).startswith(f"{url}: Connection refused")
    assert not home.exists()


def test_simulated_time_is_never_ahead_of_its_pace() -> None:
    pace, before = Pace(50.0), time.monotonic()
    pace.resume(100.0)
    assert pace.remaining_s(105.0) <= 0.1
    while pace.remaining_s(105.0):
        time.sleep(0.001)
    assert time.monotonic() - before >= 0.1


def test_a_simulation_that_falls_behind_does_not_hurry() -> None:
    pace = Pace(0.01)
    pace.resume(0.0)
    pace._origin_real_s -= 6000.0
    assert pace.remaining_s(10.0) == 0.0
    assert pace.remaining_s(12.0) > 100.0

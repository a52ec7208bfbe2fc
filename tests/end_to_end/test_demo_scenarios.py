"""`outstation demo --scenario`: what goes wrong is found where it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outstation.workbench.testing.process import find_program
from tests.end_to_end.test_demo import left_over, run


def played(home: Path, name: str) -> list[Any]:
    """The report and its devices."""
    find_program("mosquitto")
    done = run(home, "--scenario", name, "--duration", "15", "--devices", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert left_over(home) == []
    report = json.loads(done.stdout)
    assert report["audit"]["passed"] is True
    assert report["scenario"] == name
    return [report, *report["devices"]]


def test_labels_tell_of_dust_on_the_panels_that_no_reading_shows(tmp_path: Path) -> None:
    report, dusty, stuck, well = played(tmp_path / "home", "solar")
    assert report["accuracy"] is None
    assert (report["unit"], report["mae"]) == ("W", pytest.approx(167, abs=8))
    assert dusty["quality"] == ["decay"]
    assert any(sentence.startswith("the error grew: ") for sentence in dusty["alerts"])
    assert dusty["faults"] == well["faults"] == well["quality"] == []
    assert dusty["drift"] == well["drift"]
    assert dusty["labelled_mae"] > 1.5 * well["labelled_mae"]
    assert stuck["faults"] == ["ghi"]


def test_a_bearing_raises_anomalies_and_a_bad_microphone_drift(tmp_path: Path) -> None:
    report, worn, deaf, well = played(tmp_path / "home", "machine")
    assert (report["accuracy"], report["mae"], report["unit"]) == (None, None, None)
    before, after = worn["anomalies"]
    assert before < 0.1
    assert after > 0.7
    assert {"mel26", "mel27"} & set(worn["drift"] + worn["faults"])
    assert len(deaf["drift"]) > 20
    assert max(well["anomalies"]) < 0.1
    assert well["drift"] == well["faults"] == []

"""Lesson for students: its cells run in order, and show what the text between them claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "guides" / "lesson.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def lesson() -> dict[str, Any]:
    """Return the variables that a student has after the last cell."""
    names: dict[str, Any] = {"__name__": "lesson"}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names


def test_a_sensor_may_be_coarse_until_the_signal_goes(lesson: dict[str, Any]) -> None:
    accuracy = lesson["accuracy_by_step"]
    assert abs(accuracy[0.5] - lesson["baseline"].right.mean()) < 0.02
    assert accuracy[4.0] < 0.5
    assert lesson["rounding_sd"] == pytest.approx(lesson["step"] / 12**0.5, rel=0.02)


def test_a_wrong_temperature_is_outside_what_chance_explains(lesson: dict[str, Any]) -> None:
    calibration = lesson["calibration"]
    fitted = lesson["exercise"].manifest.output.temperature
    assert calibration[fitted][0] < calibration[fitted][1]
    assert all(calibration[wrong][0] > calibration[wrong][1] for wrong in (0.5, 2.5, 4.0))


def test_psi_cries_wolf_and_the_site_reference_does_not(lesson: dict[str, Any]) -> None:
    assert sum(values.max() > 0.25 for values in lesson["psi_of_person"].values()) == 2
    by_length = lesson["psi_by_length"]
    assert by_length[200] > by_length[1000] > by_length[5000]
    alerts = lesson["alerts_by_gain"]
    assert alerts[1.0] == []
    assert [(alert.alert, alert.subject) for alert in alerts[1.2]] == [("drift", "ax")]


def test_the_notebook_holds_no_output_of_a_machine() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)

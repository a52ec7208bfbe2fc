"""Poisoned labels in a retraining set: a person or device that contradicts the others is named."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.fleet.dataset import card, poisoning
from outstation.fleet.dataset.gather import Gathered, LabelledOutput, Recording
from outstation.fleet.dataset.sample_labels import RowLabel

PEOPLE = ("mira", "juri", "anna", "tariq", "lena")


def gathered(liar: str = "", share: float = 0.5, devices: int = 5) -> Gathered:
    """Return 30 recordings, each labelled by a person at its first row and every third after."""
    draw = np.random.default_rng(0)
    recordings = []
    for i in range(30):
        truth = draw.integers(0, 2, 40)
        values = draw.normal(0, 1, (120, 3)) + 4 * np.repeat(truth, 3)[:, None]
        rows = np.arange(40) * 3
        labels = []
        for row, code in zip(rows.tolist(), truth.tolist(), strict=True):
            person = PEOPLE[row % 5]
            is_lie = person == liar and draw.random() < share
            labels.append(RowLabel(1000 + row, ("rest", "work")[code ^ is_lie], "", ("human",), (person,), 1))
        samples = [{"row": 1000 + row, "rows": [1000 + row, 1000 + row + 2]} for row in rows.tolist()]
        t = np.arange(120) + 1000 * i
        recordings.append(Recording(f"pi-{i % devices}", "log", 1000, t, values, samples, {"": LabelledOutput(labels)}))
    return Gathered(["a", "b", "c"], recordings)


def test_honest_people_are_not_accused() -> None:
    report = poisoning.check(gathered())
    assert (report.state, report.windows) == ("passed", 1200)
    assert {provider.kind for provider in report.providers} == {"device", "labeller"}


def test_a_person_who_flips_half_of_the_labels_is_named_with_rows() -> None:
    report = poisoning.check(gathered("anna"))
    [finding] = [finding for finding in report.findings if finding.check in ("device", "labeller")]
    assert (finding.check, finding.subject) == ("labeller", "anna")
    assert all((int(name.rpartition("/")[2]) - 1000) % 5 == PEOPLE.index("anna") for name in finding.rows)


def test_labels_that_are_numbers_are_no_classes() -> None:
    given = gathered()
    for i, recording in enumerate(given.recordings):
        labels = recording.outputs[""].labels
        labels[:] = [replace(label, label=f"{label.row}.{i:02}") for label in labels]
    report = poisoning.check(given)
    assert report.reasons == ["the labels are numbers, and the checks take classes"]
    counts = card.count_labels(given.recordings, "")
    assert (counts["by_class"], counts["labelled"]) == ({}, 1200)
    assert counts["numbers"] == {"distinct": 1200, "lowest": 1000.0, "highest": 1117.29}


def test_a_set_without_labels_is_not_checked() -> None:
    recordings = gathered().recordings
    for recording in recordings:
        recording.outputs = {}
    assert poisoning.check(Gathered(["a", "b", "c"], recordings)).reasons == ["no labelled windows"]


def test_a_short_sample_of_one_device_does_not_shorten_the_windows_of_all() -> None:
    given = gathered()
    given.recordings[0].samples.append({"row": 1000, "rows": [1000, 1000]})
    for recording in given.recordings:
        for sample in recording.samples[:40]:
            sample["rows"][0] -= 2
    assert poisoning._estimate_window_rows(given.recordings) == [3]


@pytest.mark.parametrize("length", [1, 120])
def test_one_of_two_devices_that_sends_shorter_or_longer_samples_does_not_hide_flipped_labels(length: int) -> None:
    given = gathered("anna", devices=2)
    for recording in given.recordings:
        # The label is at the end of its three rows, and only the rows before tell the class.
        moved = [replace(label, row=label.row + 2) for label in recording.get_output("").labels]
        recording.outputs = {"": LabelledOutput(moved)}
        recording.values[2::3] = np.random.default_rng(1).normal(0, 1, (40, 3))
        for sample in recording.samples:
            sample["row"] += 2
            sample["rows"] = [sample["row"] - (length if recording.device == "pi-0" else 3) + 1, sample["row"]]
    assert poisoning.check(given).state == "warning"

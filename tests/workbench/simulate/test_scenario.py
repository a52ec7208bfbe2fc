"""Scenarios: recordings, bundles and faults fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from outstation.foundation.errors import UsageError
from outstation.ml.datasets.recordings import load
from outstation.ml.model.bundle import builtin, bundle
from outstation.protocol.client import Client
from outstation.workbench.simulate import scenario
from outstation.workbench.simulate.label_meter import LabelMeter
from outstation.workbench.simulate.plan import demo_plan
from outstation.workbench.simulate.scenario import SCENARIOS, DelayedLabels, GradualLoss, Scenario

MEASURED = DelayedLabels(
    column="power", unit="W", every_rows=4, delay_rows=10, filter_field="ghi_clear", filter_min=20.0
)


class Book(Client):
    """A client that records the labels that it would send."""

    def __init__(self) -> None:
        self.sent: list[tuple[int | None, float | str]] = []

    def label(
        self,
        task: str,
        label: str | float,
        *,
        row: int | None = None,
        t: float | None = None,
        source: str = "human",
        author: tuple[str, str] | None = None,
        output: str = "",
    ) -> None:
        assert (task, t, source, output) == ("solar", None, "system", "")
        self.sent.append((row, label))


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_a_scenario_has_the_fields_of_its_bundle_and_its_recordings(scenario: Scenario) -> None:
    manifest = bundle.read(builtin.bundles_dir() / scenario.bundle, builtin.publisher_keys()).manifest
    recordings = load(scenario.file)
    assert [name for name, _ in scenario.fields] == manifest.input.fields
    assert set(manifest.input.fields) <= set(recordings.fields)
    assert manifest.kind == scenario.kind


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_faults_begin_at_the_first_two_sites_after_they_have_learned(
    scenario: Scenario,
) -> None:
    made = demo_plan(4, 30.0, scenario=scenario)
    clean = [made.first_faulty_row(site) for site in made.sites]
    assert all(scenario.baseline_rows <= row < scenario.total_rows - scenario.tail_rows for row in clean[:2])
    assert clean[2:] == [scenario.total_rows + 1] * 2
    assert len(scenario.faults_by_site) == 2


def test_measured_values_are_the_recordings_with_what_the_site_lost() -> None:
    solar = SCENARIOS["solar"]
    made, recordings = demo_plan(2, 30.0, scenario=solar), load(solar.file)
    dusty, other = (made.measured_values(recordings, site) for site in made.sites)
    assert other.tolist() == pytest.approx(
        recordings.columns["power"][solar.skip_rows :][: solar.total_rows].tolist(), nan_ok=True
    )
    first = made.first_faulty_row(made.sites[0])
    assert dusty[:first].tolist() == pytest.approx(other[:first].tolist(), nan_ok=True)
    bright = np.nan_to_num(other[-2000:]) > 100
    assert dusty[-2000:][bright].tolist() == pytest.approx((0.65 * other[-2000:][bright]).tolist())


def test_a_loss_grows_evenly_and_then_stays() -> None:
    left = GradualLoss(from_row=100, ramp_rows=200, amount=0.4).remaining(np.array([1, 100, 200, 300, 5000]))
    assert left.tolist() == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.6])


def test_only_what_was_measured_by_day_is_worth_a_label() -> None:
    solar = SCENARIOS["solar"]
    made, recordings = demo_plan(1, 30.0, scenario=solar), load(solar.file)
    report = made.metered_labels(recordings, made.sites[0])
    clear = recordings.rows[solar.skip_rows :][: solar.total_rows, recordings.fields.index("ghi_clear")]
    assert np.isnan(report[clear < 20]).all()
    assert np.isfinite(report[clear >= 20]).mean() > 0.9


def test_a_meter_tells_each_value_once_and_only_after_its_delay(tmp_path: Path) -> None:
    values = np.arange(1.0, 41.0)
    values[19] = np.nan
    book = Book()
    meter = LabelMeter(tmp_path / "no.sock", "solar", MEASURED, values, client=lambda: book)
    for through in (5, 18, 18, 27, 100):
        meter.send_due_labels(through)
    assert book.sent == [(row, float(row)) for row in range(4, 41, 4) if row != 20]
    early = LabelMeter(tmp_path / "no.sock", "solar", MEASURED, values, client=lambda: book)
    book.sent.clear()
    early.send_due_labels(17)
    assert book.sent == [(4, 4.0)]


def test_a_scenario_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match="unknown scenario 'wind'; known scenarios are exercise, solar, machine"):
        scenario.from_name("wind")

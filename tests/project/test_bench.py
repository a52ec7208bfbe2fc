"""Results of `scripts/bench`, and detections of its drift benchmark on data with a known change; no timing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from outstation.workbench.authoring import error_training
from scripts.benchmarks import Rates, Report, Result, Section, alarms, catalogue, expected_error, page, rates
from scripts.benchmarks.__main__ import document, main
from scripts.benchmarks.cost_curve import Point, render_chart
from scripts.benchmarks.drift_peers import (
    error_cases,
    ours,
    peers,
    recordings,
    site_trials,
    synthetic,
    tables,
    targets,
)
from scripts.benchmarks.drift_peers.counting import DetectionDelays, Row
from scripts.benchmarks.drift_peers.peers import Kit
from scripts.benchmarks.drift_peers.synthetic import KINDS

MORE = Result("rate", 30.0, 20.0, "rows/s", 1.0, "more is better")
LESS = Result("cost", 3.0, 2.0, "µs", 1.0, "less is better", less=True)


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with the pages of an empty checkout."""
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "FIGURES", tmp_path / "figures.jsonl")
    monkeypatch.setattr(page, "RATIOS", tmp_path / "ratios.json")
    (tmp_path / "docs" / "internals").mkdir(parents=True)
    return tmp_path


def test_the_committed_pages_show_the_committed_figures_in_at_most_forty_rows() -> None:
    for path, text in page.render_pages().items():
        assert (page.ROOT / path).read_text(encoding="utf-8") == text, "run python -m scripts.benchmarks.page"
    assert 30 <= len(catalogue.FIGURES) <= catalogue.MOST_ROWS
    text = (page.ROOT / catalogue.MAIN).read_text(encoding="utf-8")
    limits = text.partition("\n## What limits\n")[2].partition("\n## ")[0]
    assert limits.count("\n1. ") == 1
    assert "\n11. " not in limits


def test_rates_have_both_clocks_and_costs_invert_them() -> None:
    turns = iter(range(10**6))
    busy, idle = (lambda: sum(range(200_000)) and 1), (lambda: sum(range(100_000)) and 1)
    pace = rates(busy, idle, rounds=3, cpu=lambda: float(next(turns)))
    assert (pace.clock, pace.other_ratio) == ("wall", 1.0)
    cost = Rates(4.0, 2.0, "CPU", 4.0).to_costs(1e3)
    assert cost == Rates(250.0, 500.0, "CPU", 0.25)
    assert Result.timed("cost", cost, "ms", 1.0, "", less=True).ratio == 0.5


def test_the_chart_has_a_point_for_each_size_and_side() -> None:
    points = [Point(1, 5000.0, 40.0), Point(64, 300.0, 16.0), Point(4096, 200.0, 10.0)]
    svg = render_chart(points, points[:2])
    assert svg.count("<circle") == 10
    assert svg.count("<path") == 4
    assert "NaN" not in svg
    assert "4,096" in svg


def test_more_is_better_unless_less_is_set() -> None:
    assert (MORE.ratio, MORE.met) == (1.5, True)
    assert (LESS.ratio, LESS.met) == (1.5, False)


def test_a_benchmark_of_several_results_is_one_text_and_an_item_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"some": lambda: Report((MORE, LESS), "a table")})
    shown = CliRunner().invoke(main, ["some"])
    assert (shown.output, shown.exit_code) == ("a table\n", 1)
    document_list = json.loads(CliRunner().invoke(main, ["some", "--json"]).output)
    assert document_list == [document(MORE), document(LESS)]
    assert list(document_list[0]) == [
        "name",
        "ours",
        "reference",
        "unit",
        "ratio",
        "clock",
        "other_ratio",
        "target",
        "met",
        "note",
    ]


def test_a_ratio_that_is_worse_by_a_third_is_named_and_no_other(
    pages: Path,
) -> None:
    page.write([MORE, LESS], [MORE, LESS], complete=True)
    page.write_section(Section(catalogue.OTHER, "Limits", "Nothing."))
    assert page.find_regressions([MORE, LESS]) == []
    slower, dearer = replace(MORE, ours=19.0), replace(LESS, ours=4.6)
    assert [sentence.split(":")[0] for sentence in page.find_regressions([slower, dearer])] == ["rate", "cost"]
    assert page.find_regressions([replace(MORE, ours=21.0), replace(LESS, ours=4.4), replace(MORE, name="new")]) == []
    page.write([replace(MORE, clock="CPU")], [MORE], complete=True)
    text = (pages / catalogue.OTHER).read_text()
    assert "| rate | 30 | 20 | rows/s | 1.5 CPU | ≥ 1 | met |" in text
    assert "| cost |" not in text
    assert text.endswith("\n## Limits\n\nNothing.\n"), "the hand-written section is kept"


def test_a_figure_goes_to_its_page_with_the_bound_and_the_ratio_by_the_other_clock(pages: Path) -> None:
    batch = Result("batch", 30.0, 100.0, "windows/s", 0.45, "exercise", clock="CPU", other_ratio=0.4)
    alarms = replace(LESS, name="drift, smartwatch: false alarms")
    page.write([batch, alarms, MORE], [], complete=True)
    page.write_section(Section(catalogue.MAIN, "What limits", "1. Nothing.", {"chart.svg": "<svg/>"}))
    page.write([replace(MORE, ours=25.0)], [], complete=False)
    text = (pages / catalogue.MAIN).read_text()
    assert "| batch | 30 | 100 | windows/s | 0.3 CPU | 0.4 | 0.62 | ≥ 0.45 | **missed** |" in text
    assert "**0 of 1 targets are met.**" in text
    assert text.count("## What is compared") == text.count("## What limits") == 1
    assert text.endswith("\n## What limits\n\n1. Nothing.\n")
    assert "| drift, smartwatch: false alarms |" in (pages / catalogue.DRIFT).read_text()
    assert "| rate | 25 | 20 |" in (pages / catalogue.OTHER).read_text()
    assert (pages / "chart.svg").read_text() == "<svg/>"
    assert page.read_figures()["batch"].measured.count(" at ") == 1


def test_the_readme_names_the_kinds_of_quiet_data_that_alarm_too_often(pages: Path) -> None:
    readme = pages / "README.md"
    readme.write_text("- **First.** One.\n- **Drift with few false alarms.** Old\n  words.\n- **Last.** Two.\n\nEnd.\n")
    counts = {"weather": 10, "codes": 2, "household": 12}
    measured = [
        alarms.Measured(name, 60, site_trials.QuietCount(windows=1000, alarms=count), {})
        for name, count in counts.items()
    ]
    page.write([MORE], [], complete=True)
    item = alarms.render_readme_item(measured)
    page.write_section(Section(catalogue.OTHER, "Alarms", "Table.", bullets={"README.md": item}))
    first, _, rest = readme.read_text().partition("\n")
    changed, _, last = rest.partition("\n- ")
    assert (first, last) == ("- **First.** One.", "**Last.** Two.\n\nEnd.\n")
    assert changed.split() == item.split()
    assert " 2 of 3 kinds of quiet data at most 10 in 1000 windows alarm; on household, up to 12 (" in item


def test_quick_ends_with_1_only_where_a_ratio_has_fallen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"rate": lambda: MORE, "cost": lambda: LESS})
    monkeypatch.setattr("scripts.benchmarks.__main__.QUICK", {"cost"})
    for before, code in ((1.5, 0), (0.9, 1)):
        (tmp_path / "ratios.json").write_text(json.dumps({"cost": before}))
        shown = CliRunner().invoke(main, ["--quick"])
        assert shown.exit_code == code
        assert ("worse by more than a third" in shown.output) is bool(code)


def test_the_page_has_the_median_run_and_the_baseline_the_worst(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmarks.__main__.QUICK", {"both"})
    more, less, limit = (5.0, 40.0, 30.0), (3.0, 1.0, 8.0), replace(LESS, name="limit", limit=True)
    turns = iter(
        [Report((replace(MORE, ours=a), replace(LESS, ours=b), limit), "") for a, b in zip(more, less, strict=True)]
    )
    monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"both": lambda: next(turns)})
    CliRunner().invoke(main, ["--write"])
    text, ratios = (pages / catalogue.OTHER).read_text(), json.loads((pages / "ratios.json").read_text())
    assert "| rate | 30 | 20 |" in text
    assert "| cost | 3 | 2 |" in text
    assert ratios == {"rate": 0.25, "cost": 4.0}
    assert page.find_regressions([replace(limit, ours=1000.0)]) == []


def test_a_fallen_ratio_is_measured_again_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RATIOS", tmp_path / "ratios.json")
    (tmp_path / "ratios.json").write_text(json.dumps({"rate": 1.5}))
    monkeypatch.setattr("scripts.benchmarks.__main__.QUICK", {"rate"})
    slow = replace(MORE, ours=10.0)
    for measured, code in (([slow, slow, MORE], 0), ([slow, slow, slow], 1)):
        turns = iter(measured)
        monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"rate": lambda turns=turns: next(turns)})
        assert CliRunner().invoke(main, ["--quick"]).exit_code == code
        assert next(turns, None) is None


def test_an_undetected_change_counts_as_missed_and_late() -> None:
    delays, flags = DetectionDelays(), np.zeros((4, 3), np.bool_)
    flags[2, 1] = True
    for subjects in ([0, 1], [1], [0]):
        delays.add(flags, subjects)
    assert delays.delays == [3, 3, None]
    assert (delays.median, round(delays.missed)) == (3, 33)
    assert DetectionDelays([None, None, 2]).median == float("inf")


def test_misses_of_changes_that_status_states_to_find_are_named() -> None:
    delays = {
        "+1 sd": DetectionDelays([None, None, 2], [True, False, True]),
        "stuck": DetectionDelays([None, 1], [False, True]),
    }
    text = alarms.table([alarms.Measured("weather", 60, site_trials.QuietCount(), delays)], {})
    assert text.endswith(
        "Each change met 2 to 3 sites of a kind. In 3 of the 5 trials `status` had stated that the change is found; "
        "1 of these missed it. "
        "More than a tenth were missed with weather, 60 rows, +1 sd (1 of 2)."
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_made_rows_are_as_steady_as_they_should_be_and_of_unit_variance(kind: synthetic.Kind) -> None:
    rows = synthetic.table(kind, (1,), 100)[:, : synthetic.FIELDS]
    assert rows.var(0) == pytest.approx(1, abs=0.15)
    assert np.mean(rows[1:] * rows[:-1]) == pytest.approx(kind.steady, abs=0.02)


def test_fewer_made_rows_are_the_first_of_more() -> None:
    assert (synthetic.quiet(KINDS[1], 3, 4)[: 2 * synthetic.ROWS] == synthetic.quiet(KINDS[1], 3, 2)).all()


def test_changes_are_what_they_are_called() -> None:
    by_name = {change.name: synthetic.table(KINDS[0], (1,), 200, change) for change in synthetic.changes(4)}
    assert by_name[synthetic.QUARTER].mean(0)[:5] == pytest.approx([0.25] * 4 + [0], abs=0.02)
    assert by_name[synthetic.HALF].mean(0)[:5] == pytest.approx([0.5] * 4 + [0], abs=0.02)
    assert by_name[synthetic.WIDER].var(0)[:5] == pytest.approx([1.5] * 4 + [1], abs=0.03)
    assert by_name[synthetic.RAMPED][: synthetic.ROWS].mean(0)[0] == pytest.approx(0.025, abs=0.1)
    assert by_name[synthetic.RAMPED][-synthetic.ROWS :].mean(0)[0] == pytest.approx(0.5, abs=0.1)
    first, *others = by_name[synthetic.TOGETHER][:, :5].T
    together = [np.mean(first * other) for other in others]
    assert together == pytest.approx([0.5, 0.5, 0.5, 0], abs=0.02)
    shares = np.bincount(by_name[synthetic.ANSWERS][:, synthetic.ANSWER].astype(int)) / len(by_name[synthetic.ANSWERS])
    assert shares == pytest.approx(synthetic.OTHER_SHARES, abs=0.01)


@pytest.mark.parametrize("model_rows", [1, 100])
def test_a_site_that_learned_sees_a_shift_of_half_a_sd(model_rows: int) -> None:
    row = ours.row("ours", KINDS[0], [synthetic.changes(4)[1]], sites=1, quiet=5, trials=1, model_rows=model_rows)
    (delay,) = row.delays[synthetic.HALF].delays
    assert row.quiet == 5
    assert delay is not None
    assert delay <= 3


def test_a_peer_in_a_process_of_its_own_sees_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in any environment, because PSI needs nothing but numpy."""
    monkeypatch.setattr(Kit, "python", Path(sys.executable))
    data, changes = tmp_path / "data.npz", [synthetic.changes(4)[1]]
    peers.write(data, KINDS[0], changes, sites=1)
    with peers.started(Kit("psi", "PSI", quiet=3, trials=1, timed=2), data) as peer:
        row = peer.row(data, changes)
        assert peer.seconds_per_row() > 0
        assert peer.memory.keys() >= {"work_mb"}
        assert all(math.isfinite(mb) for mb in peer.memory.values())
    assert (row.quiet, row.alarmed) == (3, 0)
    assert row.delays[synthetic.HALF].delays == [1]


def test_the_failure_of_a_peer_contains_its_last_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kit, "python", Path(sys.executable))
    kit = Kit("none", "no such kit")
    with pytest.raises(click.ClickException, match="no such kit failed") as failed, peers.started(kit, tmp_path):
        pass
    assert "KeyError" in failed.value.message


def test_a_peer_without_its_environment_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "VENV", str(tmp_path / "none"))
    with (
        pytest.raises(click.ClickException, match=r"whylogs, profiles: .*none-peers-whylogs"),
        peers.started(peers.WHYLOGS, tmp_path),
    ):
        pass


def test_a_slower_clock_reads_the_same_movement_in_fewer_rows() -> None:
    rows = np.sin(np.arange(100, dtype=np.float32) / 10)[:, None]
    read = recordings.slower(rows)
    assert len(read) == pytest.approx(80, abs=1)
    assert read[8, 0] == pytest.approx(rows[10, 0], abs=1e-6)


def test_results_are_finite_for_undetected_changes() -> None:
    changes = {
        name: DetectionDelays([None, None])
        for name in (synthetic.QUARTER, synthetic.HALF, synthetic.WIDER, synthetic.ANSWERS)
    }
    rows = [Row("ours, one prediction per row", 10, 1, changes), Row("PSI", 10, 10, changes)]
    results = list(targets.synthetic_results("independent", rows))
    assert "Infinity" not in json.dumps([document(result) for result in results])
    assert [result.met for result in results] == [False] * 6
    assert "PSI: 1000" in results[0].note
    assert "; PSI: > 20 / 100 %" in results[1].note
    assert "> 20 / 100 %" in tables.render_detections("title", rows, synthetic.WATCHED)


@pytest.mark.parametrize(("data", "shift"), [("growing noise", "inputs shift up"), ("Friedman", "inputs shift far")])
def test_the_expected_error_follows_made_inputs_and_misses_another_truth(data: str, shift: str) -> None:
    held_out = error_cases.make_answers(data, 1, 2000)
    trained = error_training.train(held_out.inputs, held_out.answers, held_out.errors)
    usual, deviations = float(np.abs(held_out.errors).mean()), expected_error.Deviations()
    for change in (shift, "another truth"):
        case = error_cases.Case(data, held_out, {change: error_cases.make_answers(data, 2, 2000, change)})
        true = case.true_errors()[change]
        expected, inside = expected_error.estimate(trained, case.later[change].windows(case.rows), true)
        assert len(inside) == len(true) == 4
        deviations.add(change, expected, true)
        deviations.add("held-out mean", [usual] * 4, true)
    assert deviations.mean(shift) < 0.15 < deviations.mean("held-out mean")
    assert deviations.mean("another truth") > 0.25

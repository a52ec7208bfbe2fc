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

from scripts.benchmarks import Report, Result, alarms, page
from scripts.benchmarks.__main__ import document, main
from scripts.benchmarks.drift_peers import ours, peers, recordings, site_trials, synthetic, tables, targets
from scripts.benchmarks.drift_peers.counting import DetectionDelays, Row
from scripts.benchmarks.drift_peers.peers import Kit
from scripts.benchmarks.drift_peers.synthetic import KINDS

MORE = Result("rate", 30.0, 20.0, "rows/s", 1.0, "more is better")
LESS = Result("cost", 3.0, 2.0, "µs", 1.0, "less is better", less=True)


def test_more_is_better_unless_less_is_set() -> None:
    assert (MORE.ratio, MORE.met) == (1.5, True)
    assert (LESS.ratio, LESS.met) == (1.5, False)


def test_a_benchmark_of_several_results_is_one_text_and_an_item_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"some": lambda: Report((MORE, LESS), "a table")})
    shown = CliRunner().invoke(main, ["some"])
    assert (shown.output, shown.exit_code) == ("a table\n", 1)
    document_list = json.loads(CliRunner().invoke(main, ["some", "--json"]).output)
    assert document_list == [document(MORE), document(LESS)]
    assert list(document_list[0]) == ["name", "ours", "reference", "unit", "ratio", "target", "met", "note"]


def test_a_ratio_that_is_worse_by_a_third_is_named_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "RATIOS", tmp_path / "ratios.json")
    page.write([MORE, LESS], [MORE, LESS], complete=True)
    (tmp_path / "page.md").write_text((tmp_path / "page.md").read_text() + "\n## Limits\n\nNothing.\n")
    assert page.find_regressions([MORE, LESS]) == []
    slower, dearer = replace(MORE, ours=19.0), replace(LESS, ours=4.6)
    assert [sentence.split(":")[0] for sentence in page.find_regressions([slower, dearer])] == ["rate", "cost"]
    assert page.find_regressions([replace(MORE, ours=21.0), replace(LESS, ours=4.4), replace(MORE, name="new")]) == []
    page.write([MORE], [MORE], complete=True)
    text = (tmp_path / "page.md").read_text()
    assert "| rate | 30 | 20 | rows/s | 1.5 | ≥ 1 | met |" in text
    assert text.endswith("\n## Limits\n\nNothing.\n"), "the hand-written section is kept"


def test_quick_ends_with_1_only_where_a_ratio_has_fallen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"rate": lambda: MORE, "cost": lambda: LESS})
    monkeypatch.setattr("scripts.benchmarks.__main__.QUICK", {"cost"})
    for before, code in ((1.5, 0), (0.9, 1)):
        (tmp_path / "ratios.json").write_text(json.dumps({"cost": before}))
        shown = CliRunner().invoke(main, ["--quick"])
        assert shown.exit_code == code
        assert ("worse by more than a third" in shown.output) is bool(code)


def test_the_page_has_the_median_run_and_the_baseline_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr("scripts.benchmarks.__main__.QUICK", {"both"})
    more, less, limit = (5.0, 40.0, 30.0), (3.0, 1.0, 8.0), replace(LESS, name="limit", limit=True)
    turns = iter(
        [Report((replace(MORE, ours=a), replace(LESS, ours=b), limit), "") for a, b in zip(more, less, strict=True)]
    )
    monkeypatch.setattr("scripts.benchmarks.__main__.BENCHMARKS", {"both": lambda: next(turns)})
    CliRunner().invoke(main, ["--write"])
    text, ratios = (tmp_path / "page.md").read_text(), json.loads((tmp_path / "ratios.json").read_text())
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
        "In 3 of these trials `status` had stated that the change is found; 1 missed it. "
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

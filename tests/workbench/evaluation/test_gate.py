"""Quality gate of `model evaluate`: requirements, comparison with another bundle, small cells, and exit codes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.foundation.errors import ConfigError, UsageError
from outstation.ml.model.bundle import bundle
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation import evaluation_report, gate, label_quality, small_cells
from outstation.workbench.evaluation.context import EvaluationRequest
from outstation.workbench.evaluation.document import Evaluation
from scripts.kit.bundles import CLASSIFY, KEY, LABELS, REGRESS, packed
from tests.kit.evaluations import evaluated

CENTRES = np.arange(2000) // 7 % 3


def write_rows(path: Path, n: int = 1200, wrong: float = 0.0) -> Path:
    """Rows of the tiny classifier, of which `wrong` have another label than it gives."""
    rows, rng = CLASSIFY.rows(n, seed=5), np.random.default_rng(1)
    given_labels = np.where(rng.random(n) < wrong, (CENTRES[:n] + 1) % 3, CENTRES[:n])
    lines = [",".join([*CLASSIFY.fields, "label", "site"])]
    for i, row in enumerate(rows):
        lines.append(
            ",".join([*(f"{v:.5f}" for v in row), LABELS[given_labels[i]], "s0" if i < 4 else f"s{1 + i % 2}"])
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tabular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("tabular"), CLASSIFY)


@pytest.fixture(scope="module")
def evaluation(tabular: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.csv", wrong=0.1)
    return evaluated(tabular, data, slices=("site",), robustness=True, adversarial=True)


def run(*args: object) -> Result:
    return CliRunner().invoke(command, ["evaluate", *(str(arg) for arg in args), "--no-latency"])


def check(evaluation: Evaluation, *texts: str) -> list[tuple[str, str]]:
    return [(each.subject, each.state) for each in gate.check(gate.read_gate(texts), evaluation)]


def test_a_requirement_is_met_by_the_value_or_by_an_end_of_the_interval(evaluation: Evaluation) -> None:
    [accuracy] = [metric for metric in evaluation.metrics if metric.metric == "accuracy"]
    assert accuracy.low is not None
    assert accuracy.value is not None
    assert accuracy.low < accuracy.value
    between = (accuracy.low + accuracy.value) / 2
    assert check(evaluation, f"accuracy >= {between}") == [("accuracy", "passed")]
    assert check(evaluation, f"accuracy.low >= {between}") == [("accuracy", "failed")]
    assert check(evaluation, f"accuracy.high<={between}") == [("accuracy", "failed")]


def test_every_quantity_that_a_pattern_matches_must_meet_it(evaluation: Evaluation) -> None:
    results = check(evaluation, "class(*).recall >= 0.5", "slice(site=s*).accuracy >= 1.1", "model.bytes > 1e9")
    assert [subject for subject, _ in results] == [
        *(f"class({label}).recall" for label in LABELS),
        *(f"slice(site=s{i}).accuracy" for i in range(3)),
        "model.bytes",
    ]
    assert [state for _, state in results] == ["passed"] * len(LABELS) + ["failed"] * 4


def test_every_quantity_can_be_named(evaluation: Evaluation) -> None:
    for name, estimate in gate.list_quantities(evaluation):
        assert estimate.value is not None
        limit = 1e9 if np.isinf(estimate.value) else estimate.value
        assert check(evaluation, f"{name} >= {limit!r}") == [(name, "passed")], name


def test_a_quantity_without_a_value_or_interval_is_not_met(evaluation: Evaluation) -> None:
    metrics = [replace(metric, value=None, low=None, high=None) for metric in evaluation.metrics]
    emptied = replace(evaluation, metrics=metrics)
    for text in ("accuracy >= 0", "accuracy <= 2", "accuracy.low <= 2"):
        assert check(emptied, text) == [("accuracy", "failed")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("accuracy", "is no requirement; write a quantity, an operator (>=,"),
        ("accuracy => 0.9", "is no requirement; write a quantity, an operator (>=, <=, >, <, ==) and a number"),
        ("accuracy =< 0.9", "is no requirement"),
        ("accuracy<>0.9", "is no requirement"),
        ("accuracy != 0.9", "is no requirement"),
        (">= 0.9", "is no requirement"),
        ("accuracy >= 0.9.1", "is no requirement"),
        ("acuracy >= 0.9", "no quantity 'acuracy'; did you mean 'accuracy'"),
        ("latency(1).p95_ms <= 3", "unless --no-latency is given"),
        ("slice(side=left).accuracy > 0", "--slice COL"),
    ],
)
def test_a_requirement_that_cannot_be_checked_is_refused(evaluation: Evaluation, text: str, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        gate.check(gate.read_gate([text]), evaluation)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("acuracy >= 0.9", "no quantity 'acuracy'; did you mean 'accuracy'"),
        ("class(PEM).recall > 0.5", "no quantity 'class(PEM).recall'; did you mean 'class(*).recall'"),
        ("latency(3).p95_ms < 9", "no quantity 'latency(3).p95_ms'; measured for 1, 8, "),
        ("slice(side=left).accuracy > 0", "--slice COL"),
        ("slice(wrist=left).accuracy > 0", "--slice COL"),
        ("fault(noise, 0.5 sd).accuracy > 0", "--robustness measures faults"),
        ("f1 > 0.5", "no quantity 'f1'"),
    ],
)
def test_a_quantity_that_cannot_come_is_refused_before_anything_is_read(
    tabular: Path, tmp_path: Path, text: str, problem: str
) -> None:
    missing = tmp_path / "rows.csv"
    missing.write_text("not,read\n")
    options = ["--slice", "site"] if "wrist" in text else []
    refused = run(tabular, missing, "--require", text, *options).exception
    assert isinstance(refused, UsageError)
    assert problem in str(refused)


@pytest.mark.parametrize("option", ["--html", "--junit", "--card"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    tabular: Path, tmp_path: Path, option: str
) -> None:
    missing, file = tmp_path / "rows.csv", tmp_path / "file"
    missing.write_text("not,read\n")
    file.touch()
    refused = run(tabular, missing, "--require", "accuracy > 0", option, file / "out").exception
    assert isinstance(refused, UsageError)
    assert ": cannot be written: " in str(refused)


def test_a_quantity_that_may_come_is_not_refused(evaluation: Evaluation, tabular: Path) -> None:
    manifest = bundle.read(tabular, None).manifest
    request = EvaluationRequest(
        Path("x"), slices=("site",), robustness=True, ablate=True, adversarial=True, float_model=Path("x")
    )
    names = [name for name, _ in gate.list_quantities(evaluation)]
    names += ["slice(site=*).accuracy", "slice(site=s1).accuracy", "slice(*).accuracy", "*.recall", "*", "fault(*, 1*"]
    names += ["fault(noise, 0.5 sd).accuracy", "without(ax, ay).drop", "adversarial(ax, PEN).median_sd", "float.*"]
    gate.check_names(gate.read_gate([f"{name} > 0" for name in names]), manifest, request)


def test_a_class_without_windows_is_named_and_no_multiple_of_it() -> None:
    checks = label_quality.check_class_balance({"a": 300, "b": 20, "c": 0}, None)
    assert [check.summary for check in checks] == [
        "a has 15 times as many windows as b (300 and 20): read F1 and the classes, not accuracy alone.",
        "c has 0 windows: too few to say how well the model recognises it.",
    ]
    assert len(label_quality.check_class_balance({"a": 300, "c": 0}, None)) == 1


@given(st.text(max_size=40))
def test_any_text_is_a_requirement_or_is_refused(text: str) -> None:
    try:
        gate.parse_requirement(text, "--require")
    except UsageError:
        return


def test_the_report_of_a_closed_gate_begins_with_what_is_not_met(evaluation: Evaluation) -> None:
    results = gate.check(gate.read_gate(("accuracy >= 0.1", "accuracy > 1")), evaluation)
    page = evaluation_report.render_html(replace(evaluation, requirements=results, warnings=[]))
    assert "Look at this" in page
    assert "accuracy &gt; 1: failed." in page
    assert "Nothing of concern" not in page
    assert "Nothing of concern" in evaluation_report.render_html(
        replace(evaluation, requirements=results[:1], warnings=[])
    )


def test_a_file_holds_requirements_and_limits(tmp_path: Path, evaluation: Evaluation) -> None:
    file = tmp_path / "gate.toml"
    file.write_text('require = ["accuracy >= 0.5", "warnings <= 9"]\n[against]\nmax_accuracy_drop = 0.01\n')
    read = gate.read_gate([str(file), "model.bytes > 0"])
    assert [each.text for each in read.requirements] == ["accuracy >= 0.5", "warnings <= 9", "model.bytes > 0"]
    assert (read.limits.max_accuracy_drop, read.limits.max_error_growth) == (0.01, 0.1)
    with pytest.raises(ConfigError, match=r"other\.toml: no such file; it is the TOML file of --require"):
        gate.read_gate([str(tmp_path / "other.toml")])
    file.write_text("[against]\nmax_drop = 0.01\n")
    with pytest.raises(ConfigError, match=r"gate\.toml.*max_drop"):
        gate.read_gate([str(file)])


def test_the_exit_code_and_the_reports_name_what_is_not_met(tabular: Path, tmp_path: Path) -> None:
    data, junit, html = write_rows(tmp_path / "rows.csv"), tmp_path / "out" / "gate.xml", tmp_path / "report.html"
    met = run(tabular, data, "--require", "accuracy >= 0.9")
    assert met.exit_code == 0, met.output
    out = ("--junit", junit, "--html", html)
    failed = run(tabular, data, "--require", "accuracy >= 0.9", "--require", "model.bytes < 10", *out)
    assert failed.exit_code == 1
    assert "failed" in failed.output
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    [case] = [case for case in suite if case.find("failure") is not None]
    assert (case.get("classname"), case.get("name")) == ("model.bytes < 10", "model.bytes")
    assert "1 of 2 met" in html.read_text()


def test_a_worse_bundle_fails_against_a_better_one_and_an_equal_one_passes(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.csv")
    good, bad = (
        packed(tmp_path / "good", CLASSIFY),
        packed(tmp_path / "bad", replace(CLASSIFY, labels=LABELS[1:] + LABELS[:1])),
    )
    same = run(good, data, "--against", good)
    assert same.exit_code == 0, same.output
    worse = run(bad, data, "--against", good)
    assert (worse.exit_code, "failed" in worse.output) == (1, True), worse.output
    assert "Labelled accuracy, less that of the previous bundle: -" in worse.output


def test_few_labels_decide_nothing(tabular: Path, tmp_path: Path) -> None:
    few = run(tabular, write_rows(tmp_path / "rows.csv", n=8), "--against", tabular)
    assert few.exit_code == 1
    assert "More labelled data would decide it." in few.output


def test_errors_of_numbers_are_compared(tmp_path: Path) -> None:
    bundle, rows = packed(tmp_path / "b", REGRESS), REGRESS.rows(600, seed=3)
    lines = [",".join([*REGRESS.fields, "label"])]
    lines += [",".join([*(f"{v:.5f}" for v in row), f"{row.sum():.4f}"]) for row in rows]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    same = run(bundle, tmp_path / "rows.csv", "--against", bundle)
    assert same.exit_code == 0, same.output
    assert "Mean absolute error by labels, relative to the previous bundle: 1.000" in same.output


# --- small cells


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(2, 20))
def test_no_cell_follows_from_the_total_and_the_cells_shown(counts: list[int], min_count: int) -> None:
    shown = list(small_cells._large_cells(counts, lambda n: n, min_count))
    assert all(n >= min_count for n in shown)
    rest = sum(counts) - sum(shown)
    assert rest == 0 or rest >= min_count or not shown


def test_privacy_leaves_out_small_slices_and_single_rows(tabular: Path, tmp_path: Path, evaluation: Evaluation) -> None:
    assert {cell.slice: cell.n for cell in evaluation.slices}["site=s0"] == 4
    data = write_rows(tmp_path / "rows.csv", wrong=0.1)
    private = evaluated(tabular, data, slices=("site",), min_count=10)
    # One more goes: the total less the two others would give the small one.
    assert len(private.slices) == 1
    assert private.suspects == []
    assert private.data.files[0].file == "file 1"
    assert "Privacy: numbers of fewer than 10 windows are left out" in private.notes[-1]
    attacked = small_cells.withhold(evaluation, 10**6)
    assert attacked.adversarial is not None
    assert (attacked.adversarial.attacks, attacked.adversarial.smallest_changes) == ([], [])
    assert all(counted in attacked.notes[-1] for counted in ("attack shares", "smallest changes"))
    printed = run(tabular, write_rows(tmp_path / "rows.csv"), "--slice", "site", "--privacy", "--json")
    assert printed.exit_code == 0, printed.output
    assert "rows.csv" not in printed.output
    assert "site=s0" not in printed.output


def test_a_report_of_no_requirement_and_data_of_another_kind_are_refused(tabular: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.csv")
    refused = run(tabular, data, "--junit", tmp_path / "gate.xml")
    assert isinstance(refused.exception, UsageError)
    assert "give --require or --against" in str(refused.exception)
    wrong = run("machine", data)
    assert "none of its rows can be read; the first: " in str(wrong.exception)
    # Another publisher than that of the program's own bundle.
    other = run(tabular, data, "--publisher", KEY.public.text, "--against", "exercise")
    assert str(other.exception).startswith(f"--against exercise: {data}: no column ax")

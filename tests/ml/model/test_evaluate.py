"""`outstation model evaluate`: document, tables, report, cards, and errors for bad data."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from outstation.foundation.errors import BadBundle, ConfigError, UsageError
from outstation.ml.model.inference import tuning
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model import evaluation_tables
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation import cards, evaluation_report
from outstation.workbench.evaluation.document import Evaluation
from scripts.kit.bundles import ANOMALY, CLASSIFY, KEY, LABELS, MODELS, REGRESS, Recipe, change, packed, write_spec
from tests.kit.evaluations import evaluated

CENTRE = np.arange(1200) // 7 % 3


@pytest.fixture(scope="module")
def tabular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("tabular"), CLASSIFY)


def labelled(path: Path, recipe: Recipe = CLASSIFY, n: int = 600, **columns: Any) -> Path:
    """Write the recipe's rows as CSV; a classifier gets nearly right labels."""
    rows = recipe.rows(n, seed=5)
    given = {"label": [LABELS[i] for i in CENTRE[:n]], "site": [f"s{i // 60 % 3}" for i in range(n)]} | columns
    lines = [",".join([*recipe.fields, *given])]
    lines += [
        ",".join([*(f"{v:.5f}" for v in row), *(str(c[i]) for c in given.values())]) for i, row in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(command, ["evaluate", *(str(arg) for arg in args)])


@pytest.fixture(scope="module")
def whole(tabular: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """An evaluation of a tiny classifier with all options."""
    folder = tmp_path_factory.mktemp("whole")
    data, train = labelled(folder / "test.csv"), labelled(folder / "train.csv", n=300)
    options = {
        "group": "site",
        "slices": ("site", "a"),
        "train": train,
        "float_model": MODELS / "classify_float32.tflite",
    }
    return evaluated(
        tabular, data, ablate=True, robustness=True, adversarial=True, max_invocations=3000, latency=True, **options
    )


def test_the_command_prints_the_document_and_writes_report_and_cards(tabular: Path, tmp_path: Path) -> None:
    about = tmp_path / "about.toml"
    about.write_text('[card]\nintended_use = "Telling | <left> from right."\n')
    out = ("--html", tmp_path / "r.html", "--card", tmp_path / "cards", "--about", about)
    result = run(
        tabular,
        labelled(tmp_path / "rows.csv"),
        "--slice",
        "site",
        "--ablate",
        "--robustness",
        "--adversarial",
        *out,
        "--json",
    )
    assert result.exit_code == 0
    evaluation = msgspec.json.decode(result.stdout, type=Evaluation, strict=True)
    assert (evaluation.data.windows, evaluation.metrics[0].metric) == (600, "accuracy")
    assert [p.batch for p in evaluation.latency] == [1, 8, 32, 128]
    assert all(p.p50_ms <= p.p95_ms and p.memory_mib > 10 for p in evaluation.latency)
    names = ["DATA_CARD.html", "DATA_CARD.md", "MODEL_CARD.html", "MODEL_CARD.md"]
    assert sorted(p.name for p in (tmp_path / "cards").iterdir()) == names
    assert "Telling | &lt;left&gt; from right." in (tmp_path / "cards" / "MODEL_CARD.md").read_text()
    message = run(tabular, tmp_path / "rows.csv", "--no-latency")
    for word in ("accuracy", "By class", "Confusion", "left", "Can the metrics be trusted"):
        assert word in message.stdout


def test_the_same_seed_gives_the_same_document(tabular: Path, tmp_path: Path) -> None:
    data = labelled(tmp_path / "rows.csv")
    options = {"ablate": True, "robustness": True, "adversarial": True, "slices": ("site",)}
    first, second = (evaluated(tabular, data, **options) for _ in range(2))
    still = {"evaluated_at": "", "seconds": 0.0}
    assert msgspec.structs.replace(first, **still) == msgspec.structs.replace(second, **still)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["left"] * 600, "all 600 labels in column label are left"),
        ([""] * 600, "column label is empty"),
        (
            ["nan"] + ["left", "right"] * 300,
            "row 1, column label: this is no label of this model; it knows left",
        ),
        (["up"] + ["left", "right"] * 300, "row 1, column label: this is no label of this model"),
    ],
)
def test_useless_labels_are_one_error(tabular: Path, tmp_path: Path, labels: list[str], message: str) -> None:
    result = run(tabular, labelled(tmp_path / "rows.csv", label=labels))
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "truth"), "no column truth; there is a, b, c, d, label, site; give a file with it, or name the"),
        (("--label", "truth"), "column of labels with --label COL"),
        (("--group", "who"), "no column who"),
        (("--slice", "who"), "no column who"),
        (("--train", "none.csv"), "none.csv: no such file"),
        (("--float", "none.tflite"), "none.tflite: no such file"),
        (("--about", "about.toml"), "name their folder with --card"),
    ],
)
def test_wrong_options_are_one_error(tabular: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(tabular, labelled(tmp_path / "rows.csv"), "--no-latency", *options)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_no_output_takes_the_place_of_a_file_that_is_read(tabular: Path, tmp_path: Path) -> None:
    folder, gate = tmp_path / "data", tmp_path / "gate.toml"
    folder.mkdir()
    labelled(folder / "a.csv")
    gate.write_text('require = ["accuracy >= 0"]')
    link = tmp_path / "link.html"
    link.symlink_to(gate)
    bundle = tmp_path / "packed"
    shutil.copytree(tabular, bundle)
    (bundle / "DATA_CARD.md").write_text("of the bundle")
    for options in (
        ["--html", gate],
        ["--junit", link],
        ["--html", folder / "a.csv"],
        ["--html", bundle / "manifest.json"],
        ["--card", bundle],
    ):
        result = run(bundle, folder, "--require", gate, *options)
        assert "would overwrite it" in str(result.exception), options
    same = tmp_path / "same.html"
    assert "the same file" in str(run(bundle, folder, "--require", gate, "--html", same, "--junit", same).exception)
    assert not same.exists()


def test_empty_or_unreadable_data_are_one_error(tabular: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,c,d,label\n")
    (tmp_path / "rows.txt").write_text("a,b,c,d,label\n1,2,3,4,left\n")
    (tmp_path / "empty").mkdir()
    for name, message in (("rows.csv", "no rows in it"), ("rows.txt", "cannot be read as data"), ("empty", "no .csv")):
        result = run(tabular, tmp_path / name)
        assert isinstance(result.exception, UsageError)
        assert message in str(result.exception)


def test_a_split_that_is_all_training_leaves_nothing_to_test(tabular: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="says train everywhere"):
        evaluated(tabular, labelled(tmp_path / "rows.csv", split=["Train"] * 600), split="split")


def test_a_group_that_is_the_same_everywhere_is_refused(tabular: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="column who holds ann everywhere"):
        evaluated(tabular, labelled(tmp_path / "rows.csv", who=["ann"] * 600), group="who")


def test_each_file_of_a_folder_is_a_stream_of_its_own_and_a_slice(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", ANOMALY)
    (tmp_path / "data").mkdir()
    for name in "xyz":
        labelled(tmp_path / "data" / f"{name}.csv", ANOMALY, 30, label=["normal"] * 15 + ["anomaly"] * 15)
    evaluation = evaluated(bundle, tmp_path / "data", group="file")
    assert [(item.file, item.rows) for item in evaluation.data.files] == [("x.csv", 30), ("y.csv", 30), ("z.csv", 30)]
    assert evaluation.data.windows == 3 * 6  # of 8 rows, a step of 4: none spans two files
    assert evaluation.data.groups == 3


def test_rows_without_a_label_are_left_out_and_counted(tabular: Path, tmp_path: Path) -> None:
    labels = ["" if i % 3 == 0 else LABELS[CENTRE[i]] for i in range(600)]
    evaluation = evaluated(tabular, labelled(tmp_path / "rows.csv", label=labels))
    assert (evaluation.data.windows, evaluation.data.unlabelled) == (400, 200)
    assert "200 windows have no label and were left out." in evaluation.notes


@pytest.mark.parametrize("recipe", [REGRESS, ANOMALY], ids=["regress", "anomaly"])
def test_other_kinds_are_measured_and_reported(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "b").mkdir()
    spec = write_spec(tmp_path / "b", recipe)
    if recipe is ANOMALY:
        change(spec, "[output]\n", "[output]\nthreshold = 0.5\n")
    pack.write_bundle(pack.pack(spec, KEY), tmp_path / "bundle")
    rng = np.random.default_rng(0)
    truth = (
        [f"{v:.3f}" for v in rng.normal(0, 1, 600)] if recipe is REGRESS else (["normal"] * 8 + ["anomaly"] * 4) * 50
    )
    data = labelled(tmp_path / "rows.csv", recipe, label=truth)
    evaluation = evaluated(tmp_path / "bundle", data, ablate=True, robustness=True, adversarial=True, slices=("site",))
    wanted = {"mae", "rmse", "r2"} if recipe is REGRESS else {"auc", "average_precision", "precision", "recall"}
    assert {m.metric for m in evaluation.metrics} >= wanted
    assert len(evaluation.field_importance) == len(recipe.fields)
    assert {fault.fault for fault in evaluation.robustness} == {
        "noise",
        "gain",
        "missing",
        "stuck",
        "saturated",
        "swapped",
    }
    page = Page(evaluation_report.render_html(evaluation))
    assert len(page.pictures) >= 8


def test_evaluate_and_run_predict_the_same_windows(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", ANOMALY)
    data = labelled(tmp_path / "rows.csv", ANOMALY, label=["normal", "anomaly", "anomaly"] * 200)
    evaluation = evaluated(bundle, data)
    assert CliRunner().invoke(command, ["run", str(bundle), str(data), "-o", str(tmp_path / "out.csv")]).exit_code == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) - 1 == evaluation.data.windows


def test_the_float_model_is_compared_on_the_same_windows(whole: Evaluation) -> None:
    other = whole.float_comparison
    assert other is not None
    assert other.agreement is not None
    assert other.agreement.value is not None
    assert other.agreement.value > 0.95
    assert 0 < other.mean_output_difference < other.max_output_difference < 1
    assert other.metric_difference.low is not None
    assert other.metric_difference.high is not None
    assert other.metric_difference.low <= 0.02
    assert other.metric_difference.high >= -0.02


def test_latency_is_reported_with_the_machine_and_the_float_model(
    whole: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole.float_comparison is not None
    theirs = whole.float_comparison.latency
    assert [p.batch for p in theirs] == [p.batch for p in whole.latency]
    evaluation_tables.print_evaluation(whole)
    for text in (" ".join(Page(evaluation_report.render_html(whole)).texts), capsys.readouterr().out):
        assert tuning.describe_machine() in text
        assert all(f"{p.p50_ms:g}" in text for p in (*whole.latency, *theirs))


def test_a_float_model_with_renamed_outputs_is_compared_by_position(tmp_path: Path) -> None:
    content = (MODELS / "each_label_and_sums.tflite").read_bytes()
    assert content.count(b"sums") == 1
    (tmp_path / "other.tflite").write_bytes(content.replace(b"sums", b"Name"))
    chosen = Recipe("classify", "each_label_and_sums", labels=LABELS, output='tensor = "sums"\nactivation = "softmax"')
    data = labelled(tmp_path / "rows.csv", chosen)
    evaluation = evaluated(packed(tmp_path / "b", chosen), data, float_model=tmp_path / "other.tflite").float_comparison
    assert evaluation is not None
    assert (evaluation.max_output_difference, evaluation.agreement and evaluation.agreement.value) == (0.0, 1.0)


def test_a_float_model_of_another_shape_is_refused(tabular: Path, tmp_path: Path) -> None:
    data = labelled(tmp_path / "rows.csv")
    with pytest.raises(BadBundle, match="--float"):
        evaluated(tabular, data, float_model=MODELS / "anomaly_int8.tflite")


def test_field_importance_is_ordered_and_large_for_a_needed_field(whole: Evaluation) -> None:
    lost = {drop.fields[0]: drop.metric_drop.value for drop in whole.field_importance}
    assert max(v for v in lost.values() if v is not None) > 0.1
    ordered = [drop.metric_drop.value for drop in whole.field_importance]
    assert ordered == sorted(ordered, key=lambda v: -(v or 0))


def test_faults_lower_the_metric_and_no_fault_leaves_it(whole: Evaluation) -> None:
    for fault in whole.robustness:
        [untouched] = [p for p in fault.points if p.strength == "none"]
        assert untouched.value.value == pytest.approx(whole.metrics[0].value, rel=1e-5)
    stuck = next(f for f in whole.robustness if f.fault == "stuck")
    values = [p.value.value for p in stuck.points]
    assert values[-1] is not None
    assert values[0] is not None
    assert values[-1] < values[0] - 0.3


class Page(HTMLParser):
    """Parsed page: texts, links and resources; an error if it is malformed."""

    VOID = frozenset({"meta", "line", "rect", "circle", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.pictures: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.resources += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "svg":
            self.pictures.append(dict(attrs).get("viewbox") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_loads_nothing_and_runs_nothing(whole: Evaluation) -> None:
    text = evaluation_report.render_html(whole)
    page = Page(text)
    assert page.resources == []
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"url\(|@import|https?://", text)
    attacks = whole.adversarial.attacks if whole.adversarial else []
    assert len(attacks) > 5
    # reliability, classes, slices, ablation, faults, attacks
    assert len(page.pictures) == 1 + 2 + 2 + 1 + 6 + len(attacks)
    assert "prefers-color-scheme:dark" in text
    drawn = len(re.findall(r">\d+%</text>", text.partition("When readings are forged")[2]))
    assert drawn == sum(len(attack.points) for attack in attacks)


def test_names_that_are_markup_stay_text(whole: Evaluation) -> None:
    evil = '<script>alert("1")</script>'
    data = msgspec.to_builtins(whole)
    spoilt = json.loads(json.dumps(data).replace("left", evil.replace('"', "'")).replace("site=s0", f"site={evil[:8]}"))
    evaluation = msgspec.convert(spoilt, Evaluation)
    for text in (
        evaluation_report.render_html(evaluation),
        *(card.to_html() for card in cards.build_cards(evaluation, cards.CardTexts()).values()),
    ):
        page = Page(text)
        assert "script" not in page.tags
        assert any("<script>" in item for item in page.texts)


def test_cards_have_no_empty_headings_and_the_metrics_of_the_document(whole: Evaluation) -> None:
    for card in cards.build_cards(whole, cards.CardTexts()).values():
        lines = [line for line in card.to_markdown().splitlines() if line]
        headings = [i for i, line in enumerate(lines) if line.startswith("#")]
        assert len(headings) >= 4
        assert all(b - a > 1 for a, b in itertools.pairwise(headings[1:]))
        assert headings[-1] < len(lines) - 1
    text = cards.model_card(whole, cards.ModelCardText()).to_markdown()
    accuracy = whole.metrics[0]
    assert f"| accuracy | {accuracy.value:.3f} | [{accuracy.low:.3f}, {accuracy.high:.3f}] | 600 |" in text
    assert "Ethical considerations" not in text
    words = cards.ModelCardText(ethics="None of a person.")
    assert "## Ethical considerations\n\nNone of a person." in cards.model_card(whole, words).to_markdown()


def test_an_unknown_key_of_the_texts_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "about.toml").write_text('[card]\nintended_uses = "x"\n')
    with pytest.raises(ConfigError, match="intended_use"):
        cards.read_texts(tmp_path / "about.toml")


def test_every_field_of_a_bundle_may_be_a_slice(whole: Evaluation) -> None:
    of_a = [item.slice for item in whole.slices if item.slice.startswith("a=")]
    assert len(of_a) == 4
    assert of_a[0].startswith("a=below")
    assert of_a[-1].startswith("a=from")

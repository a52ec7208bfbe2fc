"""Every kind of bundle and type of tensor: packed, probed, and run on a device as on files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.errors import BadBundle, ConfigError, UsageError
from outstation.ml.datasets import training_data
from outstation.ml.datasets.training_data import LabelParser
from outstation.ml.model import activation
from outstation.ml.model.activation import LoadedBundle
from outstation.ml.model.bundle import bundle, golden_vectors
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.ml.model.inference.scores import Scores
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.messages import ResultsPayload
from outstation.workbench.authoring import pack
from scripts.kit.bundles import (
    CENTRES,
    EACH,
    KEY,
    LABELS,
    SEVERAL,
    VECTORS,
    Recipe,
    activated,
    packed,
    readings,
    write_csv,
    write_spec,
)
from tests.kit.devices import STEP_US, T0, Device, columns, expand_columns, tiles

Floats = NDArray[np.float32]
BIAS = -np.square(CENTRES).sum(axis=1) / 2
SOFTMAX = 'activation = "softmax"'
# Type of the tensors → how far from exact sums its rounding may lead.
ALLOWED = {"float32": 1e-5, "float16": 1e-5, "hybrid": 0.1, "int8": 0.5, "uint8": 0.5, "int16": 0.1}
TYPES = tuple(ALLOWED)
SUMS = {kind: Recipe("classify", f"sums_{kind}", labels=LABELS, output=SOFTMAX) for kind in TYPES}
HELD = replace(SUMS["float32"], output=f'{SOFTMAX}\ncalibration_data = "held.csv"')
BINARY = Recipe("classify", "one_sigmoid", labels=("off", "on"), output='activation = "sigmoid"\nthreshold = 0.9')
CHOSEN = Recipe("classify", "each_label_and_sums", labels=LABELS, output=f'tensor = "sums"\n{SOFTMAX}')
NAMED = Recipe("regress", "two_values", output='names = ["power", "total"]\nunits = ["W", "W"]')
ANGLES = Recipe("embedding", "vectors_int8", output='distance = "cosine"')
HISTORY = Recipe(
    "classify",
    "sums_float32",
    fields=("a", "b"),
    labels=LABELS,
    output=SOFTMAX,
    input="""max_gap_s = 0.5
max_missing = 0.3
derived = [
  { name = "a usual", function = "mean", field = "a", rows = 20 },
  { name = "b before", function = "lag", field = "b", rows = 5 },
]""",
)
KINDS = {
    **{f"sums of {kind}": recipe for kind, recipe in SUMS.items()},
    "one sigmoid": BINARY,
    "several labels": SEVERAL,
    "one output of two": CHOSEN,
    "named values": NAMED,
    "vectors": VECTORS,
    "angles": ANGLES,
}


def rows_of(recipe: Recipe, n: int, seed: int = 3) -> Floats:
    return readings(n, seed)[:, : len(recipe.fields)]


def answered(result: LoadedBundle, rows: Floats) -> InferenceResult:
    t = T0 + np.arange(len(rows), dtype=np.int64) * STEP_US
    return Inference(result.bundle.manifest, result.model).run(rows, t, with_outputs=True)


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    p = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(1 / (1 + np.exp(-x)))


# --- what each kind answers, against numpy ---


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_of_every_type_of_tensor_is_packed_proved_and_right(kind: str) -> None:
    result, rows = activated(SUMS[kind]), readings(200, seed=3)
    assert golden_vectors.decode(result.bundle.files["golden.npz"]).expected.shape == (32, 3)
    answers = answered(result, rows)
    exact = rows @ CENTRES.T + BIAS
    assert answers.outputs is not None
    assert np.abs(answers.outputs - exact).max() < {"float32": 1e-5, "float16": 1e-5, "hybrid": 0.1, "int16": 0.1}.get(
        kind, 0.5
    )
    assert answers.scores.label is not None
    assert (answers.scores.label == exact.argmax(axis=1)).mean() > 0.98
    np.testing.assert_allclose(np.asarray(answers.scores.score), softmax(answers.outputs).max(axis=1), atol=1e-6)


def test_one_sigmoid_names_the_second_label_above_the_threshold_only() -> None:
    result, rows = activated(BINARY), readings(200)
    answers = answered(result, rows)
    p = sigmoid(rows @ np.array([1, -1, 0, 0.5]))
    message = p > 0.9
    assert 0 < message.sum() < (p > 0.5).sum()
    assert scores.to_texts(answers.scores, result.bundle.manifest) == [("off", "on")[int(on)] for on in message]
    np.testing.assert_allclose(np.asarray(answers.scores.score), np.where(message, p, 1 - p), atol=1e-5)


def test_each_label_of_a_multilabel_model_has_its_probability() -> None:
    result, rows = activated(SEVERAL), readings(200)
    answers = answered(result, rows)
    p = sigmoid(rows @ CENTRES.T + BIAS)
    message = p > np.array([0.5, 0.2, 0.9])
    texts = [
        "|".join(name for name, is_predicted in zip(EACH, row, strict=True) if is_predicted) or "-" for row in message
    ]
    assert {text.count("|") for text in texts} == {0, 1}
    assert "-" in texts
    assert scores.to_texts(answers.scores, result.bundle.manifest) == texts
    assert list(answers.scores.extra_columns) == ["score_warm", "score_damp", "score_loud"]
    for i, probability in enumerate(answers.scores.extra_columns.values()):
        np.testing.assert_allclose(probability, np.maximum(p[:, i], 1e-6), atol=1e-5)
    np.testing.assert_allclose(np.asarray(answers.scores.score), np.where(message, p, 1 - p).prod(axis=1), atol=1e-5)


def test_the_output_that_is_named_is_the_one_that_counts() -> None:
    rows = readings(50)
    answers = answered(activated(CHOSEN), rows)
    np.testing.assert_allclose(np.asarray(answers.outputs), rows @ CENTRES.T + BIAS, atol=1e-4)


def test_the_first_of_several_outputs_is_the_value_and_others_have_names() -> None:
    rows = readings(50)
    result = answered(activated(NAMED), rows).scores
    np.testing.assert_allclose(np.asarray(result.value), rows @ [0.5, -1, 0.25, 2], atol=1e-5)
    assert list(result.extra_columns) == ["value_total"]
    np.testing.assert_allclose(result.extra_columns["value_total"], rows.sum(axis=1), atol=1e-5)


def test_an_embedding_far_from_the_centroid_is_an_anomaly() -> None:
    result = activated(VECTORS)
    output = result.bundle.manifest.output
    usual = readings(1600)
    vectors = np.stack([usual[:, 0] + usual[:, 2], usual[:, 1] + usual[:, 3]], axis=1)
    assert output.centroid == pytest.approx(vectors.mean(axis=0), abs=1e-4)
    away = np.sqrt(np.square(vectors - vectors.mean(axis=0)).sum(axis=1))
    assert output.threshold == pytest.approx(np.quantile(away, 0.9), rel=0.01)
    answers = answered(result, np.array([usual.mean(axis=0), [50, 0, 0, 0]], np.float32))
    assert scores.to_texts(answers.scores, result.bundle.manifest) == ["normal", "anomaly"]
    assert answers.scores.extra_columns == {}


def test_of_a_cosine_distance_only_the_direction_counts() -> None:
    rows = np.array([[1, 1, 0, 0], [3, 3, 0, 0], [-1, -1, 0, 0]], np.float32)
    value = answered(activated(ANGLES), rows).scores.value
    assert value is not None
    assert value[0] == pytest.approx(value[1], abs=0.05)
    assert value[0] + value[2] == pytest.approx(2, abs=0.05)


# --- the device ---


@pytest.fixture
def device(tmp_path: Path) -> Any:
    made: list[Device] = []

    def new(recipe: Recipe, **options: Any) -> Device:
        made.append(Device(tmp_path / str(len(made)), recipe, activated(recipe), **options))
        return made[-1]

    yield new
    for target in made:
        target.store.close()


def raw_columns(device: Device) -> dict[str, list[Any]]:
    """Return the columns of all results, as any JSON reader sees them."""
    joined: dict[str, list[Any]] = {}
    for message in device.messages():
        if not isinstance(message.body, ResultsPayload):
            continue
        body = json.loads(message.payload)
        expanded = expand_columns(body["columns"])
        for name, values in expanded.items():
            joined.setdefault(name, []).extend(values)
        if "missing" not in expanded:
            joined.setdefault("missing", []).extend([0.0] * len(expanded["row"]))
    return joined


@pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS)
def test_a_device_predicts_its_rows_as_model_run_predicts_files(device: Any, recipe: Recipe) -> None:
    target: Device = device(recipe)
    rows = readings(700, seed=8)
    for part in np.array_split(rows, 7):
        target.feed(part)
    target.run_all()
    result = answered(target.active, rows).scores
    assert tiles(target.results()) == (1, 700)
    message = raw_columns(target)
    assert message["row"] == list(range(1, 701))
    assert message.get("label") == scores.to_texts(result, target.active.bundle.manifest)
    for name, values in {"score": result.score, "value": result.value, **result.extra_columns}.items():
        if values is not None:
            assert message[name] == pytest.approx(values, rel=1e-4, abs=1e-4)
    assert set(message) - {"row", "t", "label", "score", "value", "missing"} == set(result.extra_columns)


def test_messages_of_many_columns_stay_within_the_brokers_limit(device: Any) -> None:
    target: Device = device(SEVERAL, max_bytes=6_000)
    target.feed(readings(300))
    target.run_all()
    assert all(len(message.payload) <= 6_000 for message in target.messages())
    assert len(raw_columns(target)["score_loud"]) == 300


def history_device(device: Any, parts: list[Floats]) -> Device:
    target: Device = device(HISTORY)
    for part in parts:
        target.feed(part)
        while target.run() is not None:
            pass
    return target


def test_features_of_earlier_rows_do_not_depend_on_batches(device: Any) -> None:
    rows = rows_of(HISTORY, 300)
    rows[40:55] = np.nan
    whole = history_device(device, [rows])
    pieces = history_device(device, np.split(rows, [1, 3, 40, 41, 50, 120, 123, 299]))
    assert raw_columns(pieces) == raw_columns(whole)
    expected = answered(whole.active, rows)
    assert raw_columns(whole)["score"] == np.round(np.asarray(expected.scores.score), 4).tolist()


def test_only_a_result_of_partly_missing_input_has_the_missing_share(device: Any) -> None:
    rows = rows_of(HISTORY, 100)
    rows[60:62, 1] = np.nan
    rows[61, 0] = np.nan
    target = history_device(device, [rows[:50], rows[50:]])
    first, second = target.results()
    # Of the first five rows there is neither half of twenty nor a row five before.
    assert first.columns.missing == [0.5] * 5 + [0.0] * 45
    assert first.incomplete == 5
    assert second.columns.missing is not None
    assert second.columns.missing[10:13] == [0.0, 0.5, 0.0]
    assert second.incomplete == 1
    later = history_device(device, [rows[:50], rows[10:50]])
    assert later.results()[1].columns.missing is None
    assert "incomplete" not in json.loads(later.messages()[-1].payload)


def test_history_that_was_deleted_counts_as_missing(device: Any) -> None:
    target: Device = device(HISTORY)
    rows = rows_of(HISTORY, 100)
    target.feed(rows[:50])
    target.run_all()
    with target.store.transaction() as tx:
        tx.trim_rows("watch", 50, T0 + 10**12, 1)
    target.feed(rows[50:])
    target.run_all()
    text = target.results()[-1].columns
    assert text.missing is not None
    assert text.score is not None
    assert text.missing[:10] == [0.5] * 5 + [0.0] * 5
    fresh = answered(target.active, rows[50:])
    assert text.score == np.round(np.asarray(fresh.scores.score), 4).tolist()


def test_history_reaches_over_a_restart_but_not_over_a_pause(device: Any) -> None:
    rows = rows_of(HISTORY, 60)
    target: Device = device(HISTORY)
    target.feed(rows[:30])
    target.run_all()
    target.restart()
    target.feed(rows[30:50])
    target.run_all()
    target.feed(rows[50:], pause_s=0.6)
    target.run_all()
    expected = answered(target.active, rows[:50])
    message = columns(target.results())
    assert message["score"][:50] == np.round(np.asarray(expected.scores.score), 4).tolist()
    assert target.results()[-1].columns.missing == [0.5] * 5 + [0.0] * 5


# --- thresholds and calibration, from data ---


def test_a_threshold_is_learned_from_held_out_windows_that_are_normal(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, replace(VECTORS, output='calibration_data = "quiet.csv"\nquantile = 0.95'))
    rows = readings(400, seed=4)
    rows[::10] += 100
    text = write_csv(tmp_path / "plain.csv", VECTORS.fields, rows).read_text().splitlines()
    labelled = [f"{line},{'anomaly' if i % 10 == 0 else 'normal'}" for i, line in enumerate(text[1:])]
    (tmp_path / "quiet.csv").write_text("\n".join([f"{text[0]},label", *labelled]) + "\n")
    made = pack.pack(spec, KEY)
    assert any("of 360 normal windows are not above it" in note for note in made.notes)
    assert json.loads(made.files["manifest.json"])["output"]["threshold"] < 10


def test_an_embedding_without_data_of_what_is_normal_is_refused(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, VECTORS)
    spec.write_text(spec.read_text().replace('reference = "reference.csv"', ""))
    with pytest.raises(ConfigError, match="an embedding needs normal data"):
        pack.pack(spec, KEY)


def labelled_rows(path: Path, n: int, label: Callable[[Floats], list[str]], seed: int = 6) -> None:
    rows = readings(n, seed)
    text = write_csv(path, ("a", "b", "c", "d"), rows).read_text().splitlines()
    lines = [f"{line},{name}" for line, name in zip(text[1:], label(rows), strict=True)]
    path.write_text("\n".join([f"{text[0]},label", *lines]) + "\n")


def of_softer_model(rows: Floats) -> list[str]:
    """Draw labels at temperature 4: the model is far too confident."""
    random = np.random.default_rng(0)
    p = softmax((rows @ CENTRES.T + BIAS) / 4)
    return [LABELS[random.choice(3, p=item)] for item in p]


@pytest.mark.parametrize("how", ["temperature", "isotonic"])
def test_scores_of_an_overconfident_model_are_calibrated_on_other_labels(tmp_path: Path, how: str) -> None:
    output = f'{SOFTMAX}\ncalibration_data = "held.csv"\ncalibration_method = "{how}"'
    spec = write_spec(tmp_path, replace(SUMS["float32"], output=output))
    labelled_rows(tmp_path / "held.csv", 3000, of_softer_model)
    made = pack.pack(spec, KEY)
    note = next(note for note in made.notes if "ECE" in note)
    text = re.search(r"ECE (\S+) before, (\S+) after", note)
    assert text is not None
    before, after = map(float, text.groups())
    assert before > 0.15
    assert after < 0.05
    head = json.loads(made.files["manifest.json"])
    if how == "temperature":
        assert head["output"]["temperature"] == pytest.approx(4, rel=0.1)
    else:
        assert head["output"]["isotonic"]["accuracy"] == sorted(head["output"]["isotonic"]["accuracy"])
    pack.write_bundle(made, tmp_path / "out")
    activation.activate(tmp_path / "out", [KEY.public])


def test_scores_that_are_right_already_stay_as_they_are(tmp_path: Path) -> None:
    def drawn(rows: Floats) -> list[str]:
        random = np.random.default_rng(1)
        return [LABELS[random.choice(3, p=item)] for item in softmax(rows @ CENTRES.T + BIAS)]

    spec = write_spec(
        tmp_path,
        replace(SUMS["float32"], output=f'{SOFTMAX}\ncalibration_data = "held.csv"\ncalibration_method = "isotonic"'),
    )
    labelled_rows(tmp_path / "held.csv", 300, drawn)
    made = pack.pack(spec, KEY)
    assert any("does not help" in warning for warning in made.warnings)
    assert "isotonic" not in json.loads(made.files["manifest.json"])["output"]


def test_labels_of_a_model_that_says_several_calibrate_it_too(tmp_path: Path) -> None:
    def drawn(rows: Floats) -> list[str]:
        message = np.random.default_rng(2).random((len(rows), 3)) < sigmoid((rows @ CENTRES.T + BIAS) / 3)
        return ["|".join(name for name, yes in zip(EACH, row, strict=True) if yes) or "-" for row in message]

    spec = write_spec(tmp_path, replace(SEVERAL, output='multi_label = true\ncalibration_data = "held.csv"'))
    labelled_rows(tmp_path / "held.csv", 2000, drawn)
    head = json.loads(pack.pack(spec, KEY).files["manifest.json"])
    assert 1.5 < head["output"]["temperature"] < 5


def test_windows_without_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, HELD)
    labelled_rows(tmp_path / "held.csv", 1000, lambda rows: [*of_softer_model(rows[:900]), *[""] * 100])
    made = pack.pack(spec, KEY)
    assert "left out 100 of 1000 windows of held.csv without a label" in made.notes


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda p: labelled_rows(p, 300, lambda rows: ["rest"] * len(rows)), "the data have only one class, 'rest'"),
        (lambda p: labelled_rows(p, 30, of_softer_model), "30 labelled results; at least 40 are needed"),
        (lambda p: labelled_rows(p, 300, lambda rows: ["up"] * len(rows)), "this is no label of this model"),
        (lambda p: write_csv(p, ("a", "b", "c", "d"), readings(50)), "no column label; there is t, a, b, c, d; "),
        (lambda p: write_csv(p, ("a", "b", "c"), readings(50)[:, :3]), "no column d; there is t, a, b, c"),
        (lambda p: p.write_text(""), "the file is empty"),
        (lambda p: p.write_text("a,b,c,d,label\n"), "0 labelled results"),
        (lambda p: None, "cannot be read: No such file or directory"),
    ],
)
def test_data_that_cannot_calibrate_are_refused_in_one_sentence(
    tmp_path: Path, write: Callable[[Path], Any], why: str
) -> None:
    spec = write_spec(tmp_path, HELD)
    write(tmp_path / "held.csv")
    with pytest.raises(ConfigError) as problem:
        pack.pack(spec, KEY)
    assert why in str(problem.value)
    assert "output.calibration_data" in str(problem.value)
    assert "\n" not in str(problem.value)


def test_the_references_own_data_do_not_calibrate(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, replace(SUMS["float32"], output=f'{SOFTMAX}\ncalibration_data = "reference.csv"'))
    with pytest.raises(ConfigError, match="calibrate on data held out from training"):
        pack.pack(spec, KEY)


# --- the SPEC, the manifest and its format ---


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (replace(SEVERAL, labels=("a|b", "c", "d")), "contains '|', which separates labels"),
        (replace(SEVERAL, labels=("a", "b"), output="multi_label = true"), "3 outputs, the manifest names 2 labels"),
        (replace(SEVERAL, output=f"multi_label = true\n{SOFTMAX}"), "gives one label"),
        (replace(SEVERAL, output="thresholds = [0.1, 0.2, 0.3]"), "thresholds are for multi_label"),
        (replace(SEVERAL, output="multi_label = true\nthresholds = [0.1]"), "thresholds has 1 entries for 3 labels"),
        (replace(NAMED, output=""), "2 outputs, kind regress reports one value; name each output in [output] names"),
        (replace(NAMED, output='names = ["a", "a"]'), "a value is named twice"),
        (
            replace(CHOSEN, output=""),
            "2 outputs; select one with [output] tensor, of 0: 'each' [1, 3]",
        ),
        (replace(CHOSEN, output='tensor = "none"'), "no output 'none'"),
        (replace(CHOSEN, output="tensor = 2"), "no output 2"),
        (replace(HISTORY, input="scaling = 'window'"), "scaling by the window needs a window"),
        (replace(HISTORY, input=""), "the model takes 4 values [4], the manifest's input has 1 rows x 2 fields"),
        (replace(SUMS["int8"], input="std = [1.0, nan, 1.0, 1.0]"), "std"),
    ],
)
def test_a_spec_that_does_not_fit_its_model_is_refused_in_one_sentence(
    tmp_path: Path, recipe: Recipe, why: str
) -> None:
    with pytest.raises((ConfigError, BadBundle)) as problem:
        pack.pack(write_spec(tmp_path, recipe), KEY)
    assert why in str(problem.value)
    assert "\n" not in str(problem.value)


def reread(path: Path, key: SigningKey) -> Bundle:
    return bundle.read(path, [key.public])


def test_numbered_fields_stand_for_a_list_of_them(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, replace(SUMS["float32"], fields=("x0", "x1", "x2", "x3")))
    spec.write_text(spec.read_text().replace('["x0", "x1", "x2", "x3"]', '{ prefix = "x", count = 4 }'))
    pack.write_bundle(pack.pack(spec, KEY), tmp_path / "out")
    assert reread(tmp_path / "out", KEY).manifest.input.fields == ["x0", "x1", "x2", "x3"]


# --- data ---


def test_parquet_says_what_csv_says(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labelled_rows(tmp_path / "d.csv", 50, of_softer_model)
    from pyarrow import csv

    table = csv.read_csv(tmp_path / "d.csv")
    parquet.write_table(table, tmp_path / "d.parquet")
    stamps = arrow.array((np.asarray(table["t"]) * 1e6).astype(np.int64), arrow.timestamp("us"))
    parquet.write_table(table.set_column(0, "t", stamps), tmp_path / "stamps.parquet")
    spec = bundle.read(packed(tmp_path / "b", SUMS["float32"]), None).manifest
    item, *others = (
        training_data.read(tmp_path / name, spec.input, LabelParser.from_manifest(spec))
        for name in ("d.csv", "d.parquet", "stamps.parquet")
    )
    for other in others:
        np.testing.assert_array_equal(item.features, other.features)
        np.testing.assert_array_equal(item.t, other.t)
        np.testing.assert_array_equal(np.asarray(item.label), np.asarray(other.label))


@pytest.mark.parametrize("damage", ["a text column", "no column", "no parquet", "no rows"])
def test_parquet_that_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, spec = tmp_path / "d.parquet", write_spec(tmp_path, SUMS["float32"])
    columns: dict[str, Any] = {name: [1.0, 2.0] for name in "abcd"}
    if damage == "no parquet":
        path.write_bytes(b"PAR1, or so it says")
    else:
        if damage == "a text column":
            columns["b"] = ["item", "two"]
        if damage == "no column":
            del columns["b"]
        if damage == "no rows":
            columns = {name: arrow.array([], arrow.float32()) for name in "abcd"}
        parquet.write_table(arrow.table(columns), path)
    spec.write_text(spec.read_text().replace("golden.csv", "d.parquet"))
    why = {
        "a text column": "column b holds string, not numbers",
        "no column": "no column b; there is a, c, d",
        "no parquet": "not readable as Parquet",
        "no rows": "no rows in it, so nothing to run the model on",
    }[damage]
    with pytest.raises(UsageError) as problem:
        pack.pack(spec, KEY)
    assert why in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("member", ["score", "extra_columns", "outputs"])
def test_results_of_different_models_are_not_joined(member: str) -> None:
    value = np.zeros(2)
    part = Scores(None, None, value, extra_columns={"value_b": value}, outputs={"wear": Scores(None, None, value)})
    others: dict[str, Any] = {"score": value, "extra_columns": {"value_c": value}, "outputs": {}}
    assert len(scores.concatenate([part, part])) == 4
    for parts in ((part, replace(part, **{member: others[member]})), (replace(part, **{member: others[member]}), part)):
        with pytest.raises(ValueError, match=f"{member}: they are results of different models"):
            scores.concatenate(parts)

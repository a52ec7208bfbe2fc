"""`outstation model pack`: bundles from a SPEC, signed and checked; every error names file, key and fix."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle, ConfigError, OutstationError, UsageError
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model.bundle import bundle, golden_vectors
from outstation.ml.model.bundle.manifest import FurtherOutput, ModelOutput
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.workbench.authoring import calibration, pack
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation import gate
from scripts.kit.bundles import (
    ANOMALY,
    CLASSIFY,
    KEY,
    RECIPES,
    REGRESS,
    Recipe,
    activated,
    change,
    model,
    npz,
    packed,
    readings,
    waves,
    write_csv,
    write_spec,
)
from tests.kit.evaluations import evaluated

# --- packing ---


def write_labelled(path: Path, rows: int = 400) -> Path:
    """Write readings with a column `label`: what the model answers, every fifth one wrong."""
    values = CLASSIFY.rows(rows, seed=2)
    active = activated()
    answers = Inference(active.bundle.manifest, active.model).run(values, np.arange(rows) * 10_000).scores.label
    assert answers is not None
    wrong = np.arange(rows) % 5 == 0
    labels = [CLASSIFY.labels[index] for index in np.where(wrong, (answers + 1) % len(CLASSIFY.labels), answers)]
    lines = [",".join(["t", *CLASSIFY.fields, "label"])]
    lines += [
        ",".join([f"{i * 0.01:.3f}", *(f"{v:.6g}" for v in row), labels[i]]) for i, row in enumerate(values.tolist())
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_held_out_data_tell_how_often_scores_are_right(tmp_path: Path) -> None:
    spec = change(write_spec(tmp_path), "[output]", '[output]\nheld_out = "held-out.csv"')
    write_labelled(tmp_path / "held-out.csv")
    made = pack.pack(spec, KEY)
    assert made.warnings == []
    reference = Reference.from_json(made.files["reference.json"])
    assert reference.score_correct is not None
    assert (int(reference.score_n.sum()), int(reference.score_correct.sum())) == (400, 320)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [(0, "held-out.csv: no column label; there is t, "), (60, "60 labelled windows; an estimate takes 100")],
)
def test_held_out_data_without_enough_labels_are_refused(tmp_path: Path, rows: int, problem: str) -> None:
    spec = change(write_spec(tmp_path), "[output]", '[output]\nheld_out = "held-out.csv"')
    if rows:
        write_labelled(tmp_path / "held-out.csv", rows)
    else:
        (tmp_path / "held-out.csv").write_bytes((tmp_path / "golden.csv").read_bytes())
    assert problem in mistake(spec)
    assert mistake(spec).startswith(f"{spec}: output.held_out: ")


def test_labels_that_nothing_uses_are_a_warning(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    write_labelled(tmp_path / "reference.csv", 1600)
    [warning] = pack.pack(spec, KEY).warnings
    assert warning.startswith("labels are not used to estimate accuracy: [output] held_out names ")


def test_a_reference_of_few_values_is_a_warning(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    lines = (tmp_path / "reference.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    for i, row in enumerate(cells[1:]):
        row[2] = row[2] if i % 10 == 0 else ""
    (tmp_path / "reference.csv").write_text("\n".join(",".join(row) for row in cells) + "\n")
    change(spec, "[input]", "[input]\nmax_missing = 0.5")
    [warning] = [w for w in pack.pack(spec, KEY).warnings if "empty" in w]
    assert warning.startswith(f"{CLASSIFY.fields[1]}: 90% of the reference's values are empty")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_bundle_is_packed_from_csv_for_every_kind(tmp_path: Path, recipe: Recipe) -> None:
    loaded = bundle.read(packed(tmp_path, recipe), [KEY.public])
    assert loaded.manifest.kind == recipe.kind
    assert loaded.manifest.input.fields == list(recipe.fields)
    assert loaded.files["model.tflite"] == model(recipe.model)
    assert set(loaded.files) == {
        *("manifest.json", "manifest.jws", "model.tflite", "reference.json", "golden.npz"),
        *("MODEL_CARD.md", "DATA_CARD.md"),
    }
    vectors = golden_vectors.decode(loaded.files["golden.npz"])
    assert vectors.inputs.shape == ((32, 8, 2) if recipe is ANOMALY else (32, 4))
    assert vectors.runtime == runtime_name()
    reference = Reference.from_json(loaded.files["reference.json"])
    assert reference.labels == recipe.labels
    assert reference.drift_windows >= 39


def test_a_bundle_is_packed_from_recordings(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, ANOMALY)
    rows, starts = waves(3200), [0, 1000, 1003, 3200]
    (tmp_path / "reference.npz").write_bytes(
        npz(rows=np.round(rows / 0.01), fields=["v", "u"], scale=0.01, starts=starts, rate=100.0)
    )
    np.savez(tmp_path / "golden.npz", windows=rows[:320].reshape(40, 8, 2))
    change(spec, "reference.csv", "reference.npz")
    change(spec, "golden.csv", "golden.npz")
    made = pack.pack(spec, KEY)
    vectors = golden_vectors.decode(made.files["golden.npz"])
    np.testing.assert_array_equal(vectors.inputs, rows[:320].reshape(40, 8, 2))
    reference = Reference.from_json(made.files["reference.json"])
    # Windows of 8 rows, 4 apart, none across the short recording in the middle.
    assert reference.drift_windows == (249 + 548) // 10
    assert reference.mean == pytest.approx(rows[:, ::-1].mean(axis=0), abs=0.1)


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    item, other = (pack.pack(write_spec(folder(tmp_path, name)), KEY) for name in ("a", "b"))
    assert item.files == other.files
    assert item.digest == other.digest
    pack.write_bundle(item, tmp_path / "a.zip")
    pack.write_bundle(other, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_without_a_time_the_bundle_says_when_it_was_packed(tmp_path: Path) -> None:
    made = pack.pack(change(write_spec(tmp_path), 'created = "2026-11-24T00:00:00Z"', ""), KEY)
    created = json.loads(made.files["manifest.json"])["created"]
    assert created.endswith("Z")
    assert created > "2026"


def test_a_scale_is_the_std_of_every_field(tmp_path: Path) -> None:
    spec = change(write_spec(tmp_path), "[input]", "[input]\nscale = 0.5\nmean = [1, 2, 3, 4]")
    made = pack.pack(spec, KEY)
    message = json.loads(made.files["manifest.json"])["input"]
    assert (message["mean"], message["std"]) == ([1, 2, 3, 4], [2, 2, 2, 2])
    first = golden_vectors.decode(made.files["golden.npz"]).inputs[0]
    np.testing.assert_allclose(first, (readings(400, seed=1)[0] - [1, 2, 3, 4]) * 0.5, atol=1e-5)


def test_golden_data_are_spread_over_what_is_given_and_few_are_enough(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    lines = (tmp_path / "golden.csv").read_text().splitlines()
    (tmp_path / "golden.csv").write_text("\n".join(lines[:4]))
    vectors = golden_vectors.decode(pack.pack(spec, KEY).files["golden.npz"])
    np.testing.assert_allclose(vectors.inputs, readings(400, seed=1)[:3], rtol=1e-5)


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        (['reference = "reference.csv"'], "no reference data: devices will not monitor this model for drift"),
        (
            ['golden = "golden.csv"'],
            "no golden data: a device cannot check that its CPU computes the same outputs as yours",
        ),
        (['card = { model = "CARD.md", data = "DATA.md" }'], "no data card ([card] data)"),
        ([', data = "DATA.md"'], "no data card ([card] data)"),
    ],
)
def test_what_a_bundle_lacks_is_a_warning(tmp_path: Path, lines: list[str], warning: str) -> None:
    spec = write_spec(tmp_path)
    for line in lines:
        change(spec, line, "")
    made = pack.pack(spec, KEY)
    assert any(w.startswith(warning) for w in made.warnings)
    pack.write_bundle(made, tmp_path / "out")
    assert bundle.read(tmp_path / "out", [KEY.public]).digest == made.digest


def test_a_complete_bundle_has_no_warnings_but_that_it_is_unsigned(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    assert pack.pack(spec, KEY).warnings == []
    assert pack.pack(spec, None).warnings == [
        "not signed (--sign-with): devices refuse it until `outstation model sign`"
    ]


def test_a_threshold_of_three_labels_and_a_second_softmax_are_warnings(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    spec.write_text(spec.read_text().replace("[output]", "[output]\nthreshold = 0.5"))
    assert pack.pack(spec, KEY).warnings == [
        "output.threshold has no effect on 3 labels, of which the likeliest is named; remove it"
    ]
    draft = activated().bundle.manifest
    logits, shares = np.array([[2, -1, 5]], np.float32), np.array([[0.2, 0.3, 0.5], [1, 0, 0]], np.float32)
    softmax = replace(draft, output=replace(draft.output, activation="softmax"))
    none = replace(draft, output=replace(draft.output, activation="none"))
    warnings = [pack._find_second_softmax(*each) for each in ((softmax, shares), (softmax, logits), (none, shares))]
    assert [len(each) for each in warnings] == [1, 0, 0]


def test_lines_of_the_runtime_are_hidden_but_its_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = runtime.load_model

    def write_lines(*args: Any) -> runtime.TfliteModel:
        os.write(2, b"INFO: Created delegate\nWARNING: no memory\n")
        return load(*args)

    monkeypatch.setattr(runtime, "load_model", write_lines)
    pack.pack(write_spec(tmp_path), KEY)
    assert capfd.readouterr().err == "WARNING: no memory\n"


def test_few_reference_data_are_a_warning_and_very_few_a_mistake(tmp_path: Path) -> None:
    few = pack.pack(write_spec(folder(tmp_path, "few"), reference_rows=600), KEY)
    assert few.warnings == ["only 30 drift windows: alarms are less reliable than with 40"]
    spec = write_spec(folder(tmp_path, "fewer"), reference_rows=200)
    assert mistake(spec) == (
        f"{spec}: reference: no drift reference: 10 drift windows, and fewer than 20 tell nothing; add data"
    )


def test_a_card_may_be_one_path(tmp_path: Path) -> None:
    spec = change(write_spec(tmp_path), 'card = { model = "CARD.md", data = "DATA.md" }', 'card = "CARD.md"')
    assert pack.pack(spec, KEY).files["MODEL_CARD.md"] == b"# A tiny model\n"


def test_a_score_table_replaces_what_the_reference_knows_of_scores(tmp_path: Path) -> None:
    spec = change(write_spec(tmp_path), "[output]", '[output]\nscore_table = "scores.json"')
    table = {"edges": np.linspace(0, 1, 33).tolist(), "count": [10] * 32, "correct": list(range(10)) + [9] * 22}
    (tmp_path / "scores.json").write_text(json.dumps(table))
    reference = Reference.from_json(pack.pack(spec, KEY).files["reference.json"])
    assert reference.score_correct is not None
    assert reference.score_correct.tolist() == table["correct"]
    assert len(reference.score_edges) == 31


@pytest.mark.parametrize("table", ["", "[]", '{"edges": [], "count": [1], "correct": [1]}'])
def test_a_score_table_that_is_none_is_refused(tmp_path: Path, table: str) -> None:
    spec = change(write_spec(tmp_path), "[output]", '[output]\nscore_table = "scores.json"')
    (tmp_path / "scores.json").write_text(table)
    assert f"{spec}: output.score_table: {tmp_path / 'scores.json'}: no score table" in mistake(spec)


# --- mistakes in a SPEC ---


def mistake(spec: Path, kind: type[OutstationError] = ConfigError) -> str:
    with pytest.raises(kind) as problem:
        pack.pack(spec, KEY)
    return str(problem.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', "", "name: this key is required; add it"),
        ('name = "tiny"', 'name = "Tiny One"', "name: name 'Tiny One' must be 1-64 of a-z 0-9 . _ -"),
        ('kind = "classify"', 'kind = "classification"', "kind: "),
        ("golden =", "goldn =", "goldn: unknown key; did you mean 'golden'?"),
        ("[drift]", "[drfit]", "drfit: unknown key; did you mean 'drift'?"),
        ("[drift]", "[drift]\nwindows = 3", "drift.windows: unknown key; did you mean 'window'?"),
        ('["left", "right", "rest"]', "[]", "labels: a classifier needs at least two output.labels"),
        ('["left", "right", "rest"]', '["a", "a", "b"]', "labels: a label is named twice"),
        ('["left", "right", "rest"]', '["a", "b", ""]', "labels: Expected `str` of length >= 1"),
        ('["left", "right", "rest"]', '["a", "b", 3]', "must be a text in \"quotes\", not a whole number"),
        ("[input]", "[input]\nmean = [1, 2]", "input: mean has 2 entries for 4 fields"),
        ("[input]", "[input]\nunits = ['g']", "input: units has 1 entries for 4 fields"),
        ("[input]", "[input]\nstd = [1, 1, 1, -1]", "input: every std must be above 0"),
        ("[input]", "[input]\nscale = 0", "input.scale: "),
        ("[input]", "[input]\nscale = 2\nstd = [1, 1, 1, 1]", "input.scale: scale and std say the same; give one"),
        ("[input]", "[input]\nwindow = { rows = 4, step = 5 }", "input.window: step 5 above rows 4"),
        ("[input]", "[input]\nwindow = { rows = 4 }", "input.window.step: this key is required; add it"),
        ("[output]", '[output]\nactivation = "relu"', "output.activation: "),
        ("[output]", "[output]\ntemperature = 0", "output.temperature: "),
        ("memory_mib = 512", "memory_mib = 1", "limits.memory_mib: "),
        ('model = "model.tflite"', 'model = "no.tflite"', "no.tflite: No such file or directory; give a path relative"),
        ('model = "CARD.md"', 'model = "NO.md"', "NO.md: No such file or directory; give a path relative to this file"),
        ('golden = "golden.csv"', 'golden = "no.csv"', "no.csv: cannot be read: No such file or directory"),
        ('golden = "golden.csv"', 'golden = "no.npz"', "no.npz: cannot be read: No such file or directory"),
        ('reference = "reference.csv"', 'reference = "CARD.md"', "CARD.md: .md is not read; use one of .csv"),
        ('reference = "reference.csv"', 'reference = "."', "cannot be read: Is a directory"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_spec_is_named_with_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    spec = change(write_spec(tmp_path), old, new)
    values = mistake(spec)
    assert values.startswith(f"{spec}: ")
    assert message in values


def test_a_missing_or_malformed_spec_is_one_error(tmp_path: Path) -> None:
    assert "no such file; SPEC is the TOML file that describes the bundle" in mistake(tmp_path / "bundle.toml")
    assert "no such file" in mistake(tmp_path)
    (tmp_path / "bundle.toml").write_text("name = tiny")
    assert "not valid TOML" in mistake(tmp_path / "bundle.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"d"]', '"d", "e"]', "shapes: the model takes 4 values [4], the manifest's input has 1 rows x 5 fields = 5"),
        ("[input]", "[input]\nwindow = { rows = 2, step = 2 }", "shapes: the model takes 4 values [4]"),
        ('"left", ', "", "shapes: the model has 3 outputs, the manifest names 2 labels; name each class"),
        ('kind = "classify"', 'kind = "regress"', "shapes: the model has 3 outputs, kind regress reports one value"),
    ],
)
def test_a_model_that_does_not_fit_the_spec_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    values = mistake(change(write_spec(tmp_path), old, new), BadBundle)
    assert values.startswith(f"{tmp_path / 'model.tflite'}: {message}")


@pytest.mark.parametrize("name", ["stateful", "flex", "two_inputs", "no_rows"])
def test_a_model_that_cannot_be_run_is_not_packed(tmp_path: Path, name: str) -> None:
    spec = write_spec(tmp_path)
    (tmp_path / "model.tflite").write_bytes(model(name))
    assert mistake(spec, BadBundle).startswith(f"{tmp_path / 'model.tflite'}: load: ")


def test_a_damaged_model_does_not_end_the_packer(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    (tmp_path / "model.tflite").write_bytes(model("classify_int8")[:800])
    assert mistake(spec, BadBundle).startswith(f"{tmp_path / 'model.tflite'}: load: ")


# --- data that do not do ---


@pytest.mark.parametrize("shape", [(3, 2), (3, 8, 3), (3, 7, 2), (24, 2)])
def test_golden_windows_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    spec = change(write_spec(tmp_path, ANOMALY), "golden.csv", "golden.npz")
    np.savez(tmp_path / "golden.npz", windows=np.zeros(shape, np.float32))
    assert f"windows has shape {shape}, the input needs (any number, 8, 2)" in mistake(spec)


@pytest.mark.parametrize("key", ["golden", "reference"])
def test_data_without_one_whole_window_are_refused(tmp_path: Path, key: str) -> None:
    spec = write_spec(tmp_path, ANOMALY)
    (tmp_path / f"{key}.csv").write_text("t,u,v\n" + "".join(f"{i},0,0\n" for i in range(20)))
    assert f"{spec}: {key}: {tmp_path / key}.csv: no 8 rows without a gap in it" in mistake(spec)


def test_a_field_without_any_value_makes_no_reference(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    (tmp_path / "reference.csv").write_text("a,b,c,d\n" + "1,2,,4\n" * 900)
    assert f"{spec}: reference: no drift reference: (almost) no values of c in" in mistake(spec)


# --- writing ---


def test_an_old_bundle_is_replaced_as_a_whole_and_nothing_is_left_over(tmp_path: Path) -> None:
    spec = write_spec(folder(tmp_path, "source"))
    out = tmp_path / "made" / "here"
    pack.write_bundle(pack.pack(spec, KEY), out)
    change(spec, 'card = { model = "CARD.md", data = "DATA.md" }', "")
    made = pack.pack(spec, None)
    pack.write_bundle(made, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == made.files
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["here"]


def test_a_zip_is_the_same_bundle(tmp_path: Path) -> None:
    made = pack.pack(write_spec(tmp_path), KEY)
    pack.write_bundle(made, tmp_path / "tiny.zip")
    pack.write_bundle(made, tmp_path / "tiny.zip")
    assert bundle.read(tmp_path / "tiny.zip", [KEY.public]).files == made.files


def test_a_folder_with_anything_else_in_it_is_never_deleted(tmp_path: Path) -> None:
    made = pack.pack(write_spec(tmp_path), KEY)
    with pytest.raises(UsageError, match=r"holds CARD\.md, which is no bundle file and would be deleted"):
        pack.write_bundle(made, tmp_path)
    home = folder(tmp_path, "home")
    pack.write_bundle(made, home)
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        pack.write_bundle(made, home)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_never_deleted(tmp_path: Path) -> None:
    made = pack.pack(write_spec(tmp_path), KEY)
    with pytest.raises(UsageError, match="exists and is no folder"):
        pack.write_bundle(made, tmp_path / "CARD.md")
    (tmp_path / "notes.zip").write_text("notes")
    with pytest.raises(UsageError, match=r"exists and is no \.zip"):
        pack.write_bundle(made, tmp_path / "notes.zip")
    with pytest.raises(UsageError, match="cannot be written: File exists"):
        pack.write_bundle(made, tmp_path / "CARD.md" / "below")


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
@pytest.mark.parametrize("further", [1, 4])
def test_further_outputs_do_not_change_the_calibration_of_the_first(method: str, further: int) -> None:
    random = np.random.default_rng(0)
    truth = random.permutation(np.repeat(np.arange(4), 50))
    outputs = (3 * np.eye(4)[truth] + random.standard_normal((200, 4))).astype(np.float32)
    head = activated().bundle.manifest
    alone = replace(head, output=ModelOutput(labels=["a", "b", "c", "d"], activation="softmax"))
    several = replace(alone, outputs={"wear": FurtherOutput(kind="regress", size=further)})
    calibrated = calibration.calibrate_scores(outputs, truth, several, method)
    assert calibrated == calibration.calibrate_scores(outputs, truth, alone, method)
    assert calibrated.notes


def test_a_value_named_like_a_residual_bound_is_refused_with_the_bounds(tmp_path: Path) -> None:
    recipe = Recipe("regress", "two_values", output='held_out = "heldout.csv"\nnames = ["power", "low"]')
    spec = write_spec(tmp_path, recipe)
    rows = readings(1500, 7)
    write_csv(tmp_path / "heldout.csv", (*recipe.fields, "label"), np.column_stack([rows, rows[:, 0]]))
    assert mistake(spec).startswith(f"{spec}: output.held_out: names: low and high are the bounds")


def test_held_out_values_tell_the_error_to_expect_of_a_regression(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, REGRESS)
    random, rows = np.random.default_rng(4), readings(1500, 7)
    truth = rows @ np.array([0.5, -1.0, 0.25, 2.0]) + random.normal(0, 1, len(rows)) * np.exp(rows[:, 0])
    write_csv(tmp_path / "heldout.csv", (*REGRESS.fields, "label"), np.column_stack([rows, truth]))
    spec.write_text(spec.read_text().replace("[output]", '[output]\nheld_out = "heldout.csv"'))
    packed = pack.pack(spec, KEY)
    assert "devices estimate the mean absolute error without labels, from the inputs" in packed.notes
    assert pack.pack(spec, KEY).digest == packed.digest
    error = Reference.from_json(packed.files["reference.json"]).error
    assert error is not None
    pack.write_bundle(packed, tmp_path / "bundle")
    for name, seed, scale in (("fresh", 8, 1.0), ("other", 9, 3.0)):
        more = readings(1500, seed)
        fresh = more @ np.array([0.5, -1.0, 0.25, 2.0]) + scale * random.normal(0, 1, len(more)) * np.exp(more[:, 0])
        write_csv(tmp_path / f"{name}.csv", (*REGRESS.fields, "label"), np.column_stack([more, fresh]))
    evaluation = evaluated(tmp_path / "bundle", tmp_path / "fresh.csv")
    measured = {m.metric: m for m in evaluation.metrics}
    assert measured["expected_mae"].value == pytest.approx(measured["mae"].value, rel=0.15)
    expected, true, share = (measured[name] for name in ("expected_mae", "mae", "expected_mae_share"))
    assert share.value == pytest.approx((expected.value or 0.0) / (true.value or 1.0), rel=1e-4)
    assert (share.low or 9.0) < (share.value or 0.0) < (share.high or 0.0)
    assert not any("without labels" in warning for warning in evaluation.warnings)
    result = gate.check(gate.read_gate(["expected_mae_share.low >= 0.7", "expected_mae <= 9"]), evaluation)
    assert [entry.state for entry in result] == ["passed", "passed"]
    misled = evaluated(tmp_path / "bundle", tmp_path / "other.csv")
    assert any(w.startswith("without labels devices expect 0.3") for w in misled.warnings), misled.warnings
    assert error.mean == pytest.approx(float(np.abs(truth - rows @ np.array([0.5, -1.0, 0.25, 2.0])).mean()), rel=0.1)


def test_the_error_to_expect_is_of_the_fields_that_derived_features_are_computed_from(tmp_path: Path) -> None:
    derived = '[[input.derived]]\nname = "change"\nfunction = "difference"\nfield = "a"\nrows = 1\n'
    recipe = Recipe("regress", "regress_int8", fields=("a", "b", "c"), output='held_out = "heldout.csv"')
    spec = write_spec(tmp_path, recipe)
    spec.write_text(spec.read_text().replace("[output]", f"{derived}\n[output]"))
    random = np.random.default_rng(4)
    for name, seed in (("heldout", 7), ("fresh", 8)):
        rows = readings(1500, seed)[:, :3]
        truth = random.normal(0, 5, len(rows)) * np.exp(rows[:, 0])
        write_csv(tmp_path / f"{name}.csv", (*recipe.fields, "label"), np.column_stack([rows, truth]))
    pack.write_bundle(pack.pack(spec, KEY), tmp_path / "bundle")
    measured = {m.metric: m.value for m in evaluated(tmp_path / "bundle", tmp_path / "fresh.csv").metrics}
    ready = bundle.read(tmp_path / "bundle", [KEY.public])
    error = Reference.from_json(ready.files["reference.json"]).error
    assert error is not None
    model = Inference(ready.manifest, runtime.load_model(ready.manifest, ready.model_bytes))
    answers = model.run(rows, np.arange(len(rows)) * 10_000).scores.value
    assert answers is not None
    assert measured["expected_mae"] == pytest.approx(
        float(error.bin_error[error.find_bins(rows, answers)].mean()), rel=1e-3
    )
    mistaken = error.bin_error[error.find_bins(rows, np.diff(rows[:, 0], prepend=rows[:1, 0]))].mean()
    assert measured["expected_mae"] != pytest.approx(float(mistaken), rel=1e-3), "the answer is no derived feature"


def test_held_out_values_bound_the_residuals_of_a_regression_and_evaluate_measures_them(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, REGRESS)
    random = np.random.default_rng(4)
    for name, seed in (("heldout", 7), ("fresh", 8)):
        rows = readings(1500, seed)
        truth = rows @ np.array([0.5, -1.0, 0.25, 2.0]) + random.normal(0.3, 0.5, len(rows))
        write_csv(tmp_path / f"{name}.csv", (*REGRESS.fields, "label"), np.column_stack([rows, truth]))
    spec.write_text(spec.read_text().replace("[output]", '[output]\nheld_out = "heldout.csv"'))
    packed = pack.pack(spec, KEY)
    assert "devices cannot estimate the error without labels: the inputs explain" in " ".join(packed.warnings)
    pack.write_bundle(packed, tmp_path / "bundle")
    low, high = bundle.read(tmp_path / "bundle", [KEY.public]).manifest.output.residual_bounds or (0.0, 0.0)
    assert [low, high] == pytest.approx([0.3 - 1.96 * 0.5, 0.3 + 1.96 * 0.5], abs=0.15)
    measured = {m.metric: m for m in evaluated(tmp_path / "bundle", tmp_path / "fresh.csv").metrics}
    assert measured["coverage"].value == pytest.approx(0.95, abs=0.02)
    out = tmp_path / "out.csv"
    arguments = ["run", str(tmp_path / "bundle"), str(tmp_path / "fresh.csv"), "-o", str(out)]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert out.read_text().splitlines()[0] == "row,value,value_low,value_high"

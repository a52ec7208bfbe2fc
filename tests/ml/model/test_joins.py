"""Models of several inputs and outputs: joins by time, and the same bits from a plain interpreter and in pieces."""

from __future__ import annotations

import csv
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from outstation.foundation.errors import BadBundle, UsageError
from outstation.ml.datasets import joined_rows
from outstation.ml.model.bundle import bundle
from outstation.ml.model.bundle.manifest import JoinedInput
from outstation.ml.model.inference import joins, runtime
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.joins import JoinedRows
from outstation.ml.model.inference.runtime import Interpreter  # type: ignore[attr-defined]
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation import cards
from outstation.workbench.evaluation.predict.run import BatchPredictor
from scripts.kit.bundles import KEY, LABELS, WINDOW, WINDOWED, model, waves, write_csv, write_joined_spec
from tests.kit.evaluations import evaluated


def expected_rows(spec: JoinedInput, rows: JoinedRows, end_us: int) -> list[list[float]]:
    """Return what a loop over all rows joins: for each place the newest row up to its time, if not too old."""
    own = [(int(t), v) for t, v in zip(rows.t, rows.values.tolist(), strict=True) if np.isfinite(v).any()]
    taken = []
    for age in reversed(range(spec.rows)):
        at = end_us if spec.period_s is None else end_us - round(age * spec.period_s * 1e6)
        places = [i for i, (t, _) in enumerate(own) if t <= at]
        index = max(places, default=-1) - (age if spec.period_s is None else 0)
        t, values = own[index] if index >= 0 else (0, [np.nan] * len(spec.fields))
        is_known = index >= 0 and 0 <= end_us - t <= spec.max_age_s * 1e6
        taken.append(values if is_known else [np.nan] * len(spec.fields))
    return taken


@pytest.mark.parametrize("period_s", [None, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_window_gets_the_newest_rows_up_to_its_time(period_s: float | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    t = np.cumsum(random.integers(1, 800_000, 60))
    # The clock steps back twice.
    t[20:] -= 3_000_000
    t[45:] -= 500_000
    values = random.normal(0, 1, (60, 2)).astype(np.float32)
    values[random.random((60, 2)) < 0.3] = np.nan
    rows = JoinedRows(values, t)
    spec = JoinedInput(fields=["a", "b"], rows=4, period_s=period_s, max_age_s=3.0)
    ends = random.integers(0, int(t.max()) + 5_000_000, 50)
    taken = joins.take_rows(spec, rows, ends).reshape(50, 4, 2)
    for window, end_us in zip(taken, ends.tolist(), strict=True):
        np.testing.assert_array_equal(window, np.array(expected_rows(spec, rows, end_us), np.float32))


def test_rows_of_no_stream_are_missing_and_count_so() -> None:
    spec = JoinedInput(fields=["a"], rows=2, max_age_s=1.0, mean=[5.0], std=[2.0])
    nothing = JoinedRows(np.empty((0, 1), np.float32), np.empty(0, np.int64))
    joined = joins.join({"w": spec}, {"w": nothing}, np.array([1, 2]))
    assert joined is not None
    assert joined.values.tolist() == [[0.0, 0.0]] * 2
    assert joined.missing.tolist() == [2, 2]
    with pytest.raises(BadBundle, match="input 'w' has no data"):
        joins.join({"w": spec}, {}, np.array([1]))


def plain_outputs(content: bytes, first: NDArray[Any], second: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs by their names, window by window, with nothing of ours but the rounding rule."""
    interpreter: Any = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    names = interpreter._get_full_signature_list()["serving_default"]
    details = {d["index"]: d for d in (*interpreter.get_input_details(), *interpreter.get_output_details())}
    results: dict[str, list[NDArray[Any]]] = {name: [] for name in names["outputs"]}
    for window in zip(first, second, strict=True):
        for name, values in zip(("rows", "weather"), window, strict=True):
            tensor = details[names["inputs"][name]]
            scale, zero = tensor["quantization"]
            if tensor["dtype"] == np.int8:
                values = np.clip(np.rint(values / np.float32(scale)) + zero, -128, 127).astype(np.int8)
            interpreter.set_tensor(tensor["index"], values.reshape(tensor["shape"]))
        interpreter.invoke()
        for name, index in names["outputs"].items():
            results[name].append(interpreter.get_tensor(index)[0])
    outputs = {}
    for name, index in names["outputs"].items():
        scale, zero = details[index]["quantization"]
        raw = np.stack(results[name]).astype(np.float32)
        outputs[name] = (raw - zero) * np.float32(scale) if details[index]["dtype"] == np.int8 else raw
    return outputs


@pytest.mark.parametrize("name", ["joined_int8", "joined_float32"])
def test_a_model_of_two_inputs_and_three_outputs_answers_as_a_plain_interpreter_does(tmp_path: Path, name: str) -> None:
    packed = pack.pack(write_joined_spec(tmp_path, name), KEY)
    pack.write_bundle(packed, tmp_path / "bundle")
    loaded = bundle.read(tmp_path / "bundle", [KEY.public])
    inference = Inference(loaded.manifest, runtime.load_model(loaded.manifest, loaded.model_bytes))
    rows, t = waves(400, seed=5), np.arange(400) * 10_000
    weather = joined_rows.read(loaded.manifest, tmp_path / "x.csv", {"weather": tmp_path / "weather.csv"})
    result = inference.run(rows, t, with_outputs=True, joined=weather)
    windows = np.stack([rows[start : start + WINDOW] for start in result.cut.starts])
    taken = joins.take_rows(loaded.manifest.joined["weather"], weather["weather"], t[result.cut.starts + WINDOW - 1])
    air = np.nan_to_num((taken - np.float32(0.5)) / np.float32(2.0))
    assert np.isnan(taken).any()
    expected = plain_outputs(loaded.model_bytes, windows, air)
    outputs = np.concatenate([expected[part] for part in ("state", "flags", "wear")], axis=1)
    assert result.outputs is not None
    np.testing.assert_allclose(result.outputs, outputs, atol=0 if name == "joined_int8" else 1e-5)
    columns = result.scores.extra_columns
    np.testing.assert_allclose(columns["value_wear"], result.outputs[:, 5])
    np.testing.assert_allclose(columns["score_flags_wet"], result.outputs[:, 4], atol=1e-5)
    assert set(result.scores.label_columns["label_flags"].tolist()) <= {"hot", "wet", "hot|wet", "-"}
    missing = np.isnan(taken).sum(axis=1) / (3 + WINDOW * len(WINDOWED))
    np.testing.assert_allclose(result.missing_share, missing, rtol=1e-6)


def test_files_are_joined_alike_in_blocks_and_whole_and_evaluated(tmp_path: Path) -> None:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    loaded = bundle.read(tmp_path / "bundle", [KEY.public])
    inference = Inference(loaded.manifest, runtime.load_model(loaded.manifest, loaded.model_bytes))
    data, files = write_csv(tmp_path / "rows.csv", WINDOWED, waves(300, seed=6)), {"weather": tmp_path / "weather.csv"}
    for out, block in (("whole.csv", 1 << 20), ("pieces.csv", 1500)):
        predictor = BatchPredictor(loaded, inference, block_bytes=block, joined=files)
        predictor.predict_file(data, tmp_path / out, lambda *_: None)
    whole = (tmp_path / "whole.csv").read_text()
    assert whole == (tmp_path / "pieces.csv").read_text()
    answers = list(csv.DictReader(whole.splitlines()))
    labels = {int(answer["row"]): answer["label"] for answer in answers}
    lines = data.read_text().splitlines()
    labelled = [f"{lines[0]},label", *(f"{line},{labels.get(i, '')}" for i, line in enumerate(lines[1:], 1))]
    (tmp_path / "labelled.csv").write_text("\n".join(labelled) + "\n")
    measured = evaluated(tmp_path / "bundle", tmp_path / "labelled.csv", joined=files, robustness=True)
    assert {m.metric: m.value for m in measured.metrics}["accuracy"] == 1.0
    card, data_card = (card.to_markdown() for card in cards.build_cards(measured, cards.CardTexts()).values())
    assert "| Joined inputs | weather: air |" in card
    assert "| Further outputs | flags (classify), wear (regress) |" in card
    assert "| weather | air |" in data_card
    with pytest.raises(UsageError, match=r"input weather: .*no column air.* --join weather=FILE"):
        evaluated(tmp_path / "bundle", tmp_path / "labelled.csv")
    with pytest.raises(UsageError, match="no such further input, it has weather"):
        evaluated(tmp_path / "bundle", tmp_path / "labelled.csv", joined={"wether": data})


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('tensor = "rows"', "", "input 'weather'|select one"),
        ("rows = 3", "rows = 4", "takes 3 values, .inputs.weather. has 4 rows x 1 fields"),
        ('labels = ["hot", "wet"]', 'labels = ["hot", "wet", "cold"]', "output 'flags' has 2 values"),
        ('[outputs.wear]\n        kind = "regress"', "", "."),
        ("[outputs.wear]", "[outputs.tear]", "no output 'tear'"),
        ("max_age_s = 2.0", "max_age_s = 0", "max_age_s"),
    ],
)
def test_a_spec_that_does_not_fit_the_inputs_or_outputs_says_which(
    tmp_path: Path, old: str, new: str, why: str
) -> None:
    spec = write_joined_spec(tmp_path)
    text = spec.read_text()
    assert old in text
    spec.write_text(text.replace(old, new))
    if why == "." or old.startswith("tensor"):
        # A model may have more outputs than are used, and the only input left is the first.
        pack.pack(spec, KEY)
        return
    with pytest.raises(Exception, match=why) as problem:
        pack.pack(spec, KEY)
    assert re.search(r"^\S+bundle.toml|model.tflite", str(problem.value))


def test_a_window_without_recent_rows_keeps_the_row_it_counts_from() -> None:
    # After the step of the clock, the row of 12 s is the newest up to 28 s and too old; that of 20 s is not.
    t = np.array([1, 5, 17, 20, 6, 7, 12, 12, 37]) * 1_000_000
    ends = np.array([1, 3, 6, 28]) * 1_000_000
    values = np.arange(len(t), dtype=np.float32)[:, None]
    spec = JoinedInput(fields=["a"], rows=2, max_age_s=11.0)
    used, whole = joins.find_used_range(spec, t, ends), joins.take_rows(spec, JoinedRows(values, t), ends)
    assert used == (0, 7)
    np.testing.assert_array_equal(joins.take_rows(spec, JoinedRows(values[:8], t[:8]), ends), whole)
    assert np.isnan(whole[3]).all()


@pytest.mark.parametrize("period_s", [None, 0.4])
@pytest.mark.parametrize("seed", range(6))
def test_a_join_over_the_rows_that_a_message_names_gives_the_same_values(period_s: float | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    t = np.cumsum(random.integers(0, 900_000, 80))
    t[30:] -= 4_000_000
    t[50:] += 9_000_000
    rows = JoinedRows(random.normal(0, 1, (80, 1)).astype(np.float32), t)
    spec = JoinedInput(fields=["a"], rows=4, period_s=period_s, max_age_s=2.0)
    for _ in range(40):
        ends = random.integers(0, int(t.max()) + 3_000_000, 3)
        used, whole = joins.find_used_range(spec, t, ends), joins.take_rows(spec, rows, ends)
        part = slice(0, 0) if used is None else slice(used[0], used[1] + 1)
        np.testing.assert_array_equal(joins.take_rows(spec, JoinedRows(rows.values[part], t[part]), ends), whole)


@pytest.fixture
def joined_bundle(tmp_path: Path) -> Path:
    pack.write_bundle(pack.pack(write_joined_spec(tmp_path), KEY), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_labels_of_further_outputs_are_texts_in_parquet(joined_bundle: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    options = ("--join", f"weather={tmp_path / 'weather.csv'}", "-o")
    for name in ("out.parquet", "out.csv"):
        arguments = ["run", joined_bundle, tmp_path / "reference.csv", *options, tmp_path / name]
        assert CliRunner().invoke(command, [str(each) for each in arguments]).exit_code == 0
    with (tmp_path / "out.csv").open() as file:
        expected = [row["label_flags"].removeprefix("'") for row in csv.DictReader(file)]
    assert parquet.read_table(tmp_path / "out.parquet")["label_flags"].to_pylist() == expected != []


def test_the_file_of_a_further_input_is_not_overwritten(joined_bundle: Path, tmp_path: Path) -> None:
    weather, data = tmp_path / "weather.csv", tmp_path / "reference.csv"
    before = weather.read_bytes()
    join = ["--join", f"weather={weather}"]
    for rest in (["run", "-o", weather], ["evaluate", "--html", weather], ["evaluate", "--html", data]):
        result = CliRunner().invoke(command, [str(each) for each in (*rest, joined_bundle, data, *join)])
        assert isinstance(result.exception, UsageError)
        assert "overwr" in str(result.exception)
    assert weather.read_bytes() == before


def test_the_float_model_of_a_model_with_a_signature_is_compared(joined_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "float.tflite").write_bytes(model("joined_float32"))
    head, *rows = (tmp_path / "reference.csv").read_text().splitlines()
    rows = [f"{row},{LABELS[i // 40 % 3]}" for i, row in enumerate(rows)]
    (tmp_path / "labelled.csv").write_text("\n".join([f"{head},label", *rows]) + "\n")
    options: dict[str, Any] = {"joined": {"weather": tmp_path / "weather.csv"}}
    report = evaluated(joined_bundle, tmp_path / "labelled.csv", float_model=tmp_path / "float.tflite", **options)
    assert report.float_comparison is not None
    assert report.float_comparison.max_output_difference < 0.5


def test_a_reference_takes_the_rows_of_further_inputs_from_the_spec_or_a_file(
    joined_bundle: Path, tmp_path: Path
) -> None:
    spec, data, out = tmp_path / "bundle.toml", tmp_path / "reference.csv", tmp_path / "made.json"
    sources = (["--spec", spec], ["--bundle", joined_bundle, "--join", f"weather={tmp_path / 'weather.csv'}"])
    for source in sources:
        result = CliRunner().invoke(command, ["reference", *map(str, (data, *source, "-o", out))])
        assert result.exit_code == 0, result.output
        assert out.read_bytes() == (joined_bundle / "reference.json").read_bytes()
    for file in (spec, spec.parent / tomllib.loads(spec.read_text())["model"]):
        before = file.read_bytes()
        result = CliRunner().invoke(command, ["reference", *map(str, (data, "--spec", spec, "-o", file))])
        assert "would overwrite it" in str(result.exception)
        assert file.read_bytes() == before

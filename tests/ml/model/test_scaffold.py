"""SPEC from any `.tflite`: it packs as it is and predicts as a plain loop, or is refused with a reason."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from outstation.foundation.errors import OutstationError
from outstation.ml.datasets import training_data
from outstation.ml.datasets.training_data import ColumnScale, TableSummary
from outstation.ml.model import activation
from outstation.ml.model.bundle.manifest import ResourceLimits
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.runtime import Interpreter  # type: ignore[attr-defined]
from outstation.ml.model.inference.tensors import ModelInspection, OutputStats, Tensor
from outstation.ml.model.sandbox import probe
from outstation.workbench.authoring import pack, scaffold
from outstation.workbench.cli.model.group import model as command
from scripts.kit.bundles import KEY, MODELS, THIRD_PARTY, readings, write_csv

Floats = NDArray[np.float32]
OTHERS = {
    "mlperf_ad01_int8": ("anomaly", 1, 640),
    "mlperf_kws_int8": ("classify", 49, 10),
    "mlperf_resnet8_cifar_int8": ("classify", 32, 96),
    "mlperf_vww96_int8": ("classify", 96, 288),
    "coral_mobilenet_v1_0.25_128_quant": ("classify", 128, 384),
    # Of the same shapes, and in every clone.
    "foreign_autoencoder": ("anomaly", 1, 160),
    "foreign_keywords": ("classify", 49, 10),
    "foreign_image": ("classify", 32, 96),
}


def others(name: str) -> Path:
    if (own := MODELS / f"{name}.tflite").exists():
        return own
    if not THIRD_PARTY.exists():
        pytest.skip("models that others made are not there (OUTSTATION_THIRDPARTY_MODELS)")
    return THIRD_PARTY / f"{name}.tflite"


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)


def refused(*args: object) -> str:
    """Return the one-line error."""
    with pytest.raises(OutstationError) as problem:
        run(*args)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def plain(content: bytes, rows: Floats) -> Floats:
    """Return quantized outputs, one row at a time, with nothing of ours but the rounding rule."""
    interpreter: Any = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (into,), (out,) = interpreter.get_input_details(), interpreter.get_output_details()
    (scale, zero), (step, middle) = into["quantization"], out["quantization"]
    limits = np.iinfo(into["dtype"])
    result = []
    for row in rows.reshape(len(rows), *into["shape"]):
        raw = np.clip(np.rint(row / np.float32(scale)) + zero, limits.min, limits.max).astype(into["dtype"])
        interpreter.set_tensor(into["index"], raw)
        interpreter.invoke()
        result.append(interpreter.get_tensor(out["index"]).reshape(-1))
    values: Floats = (np.stack(result).astype(np.float32) - middle) * np.float32(step)
    return values


@pytest.mark.parametrize("name", OTHERS)
def test_a_third_party_model_packs_from_its_scaffold_and_predicts_alike(tmp_path: Path, name: str) -> None:
    model, (kind, rows, fields) = others(name), OTHERS[name]
    assert run("pack", "--from", model, "-o", tmp_path / "spec.toml").exit_code == 0
    message = tomllib.loads((tmp_path / "spec.toml").read_text())
    assert message["kind"] == kind
    image = message["input"].get("image")
    assert (image["height"] if image else message["input"].get("window", {"rows": 1})["rows"]) == rows
    names = [f"{'pixel' if image else 'x'}{i}" for i in range(fields)]
    low, high = input_range(model)
    given = np.random.default_rng(0).uniform(low, high, (40 * rows, fields)).astype(np.float32)
    np.savez(tmp_path / "data.npz", rows=given, fields=names)
    text = (tmp_path / "spec.toml").read_text()
    text = text.replace('# reference = "readings.csv"', 'reference = "data.npz"' if kind == "anomaly" else "#")
    text = text.replace('# golden = "readings.csv"', 'golden = "data.npz"')
    (tmp_path / "spec.toml").write_text(re.sub(r"(?m)^window = \d+ .*", "window = 2", text))
    pack.write_bundle(pack.pack(tmp_path / "spec.toml", KEY), tmp_path / "bundle")
    result = activation.activate(tmp_path / "bundle", [KEY.public])
    answers = Inference(result.bundle.manifest, result.model).run(
        given, np.arange(len(given)) * 1000, with_outputs=True
    )
    expected = plain(model.read_bytes(), given.reshape(40, rows * fields))
    assert answers.outputs is not None
    assert answers.outputs.tobytes() == expected.tobytes()
    if kind == "anomaly":
        errors = np.square(expected.astype(np.float64) - given.reshape(40, -1)).mean(axis=1)
        np.testing.assert_allclose(np.asarray(answers.scores.value), errors)
        assert answers.scores.anomaly is not None


@pytest.mark.parametrize(("name", "side"), [("coral_mobilenet_v1_0.25_128_quant", 128), ("foreign_image", 32)])
def test_an_image_input_gets_the_scale_of_its_quantization(name: str, side: int) -> None:
    text = run("pack", "--from", others(name)).output
    image = tomllib.loads(text)["input"]["image"]
    assert (image["width"], image["height"], image["channels"]) == (side, side, 3)
    assert (image["scale"], image["offset"]) == (pytest.approx(1 / 128), -1)


def input_range(model: Path) -> tuple[float, float]:
    interpreter: Any = Interpreter(model_content=model.read_bytes())
    ((scale, zero),) = [item["quantization"] for item in interpreter.get_input_details()]
    limits = np.iinfo(interpreter.get_input_details()[0]["dtype"])
    return (limits.min - zero) * scale, (limits.max - zero) * scale


@pytest.mark.parametrize(
    ("name", "why", "fix"),
    [
        ("pymicro_okay_nabu_int8stream", "keeps state between inferences (ASSIGN_VARIABLE", "export it without state"),
        ("stateful", "keeps state between inferences (ASSIGN_VARIABLE", "export it without state"),
        ("flex", "TensorFlow operations, which it lacks", "convert it with TFLITE_BUILTINS only"),
        ("flex_model_selfmade", "TensorFlow operations, which it lacks", "convert it with TFLITE_BUILTINS only"),
        ("tflm_person_detect_int8", "its quantization does not follow the format", "convert the model again"),
    ],
)
@pytest.mark.parametrize("by", ["--from", "SPEC"])
def test_a_model_that_cannot_run_is_refused_with_reason_and_fix(
    tmp_path: Path, name: str, why: str, fix: str, by: str
) -> None:
    model = others(name)
    arguments: list[object] = ["--from", model]
    if by == "SPEC":
        text = f'name = "x"\nversion = "1"\nkind = "regress"\nmodel = "{model}"\n[input]\nfields = ["a"]\n'
        (tmp_path / "spec.toml").write_text(text)
        arguments = [tmp_path / "spec.toml", "-o", tmp_path / "out"]
    message = refused("pack", *arguments)
    assert why in message
    assert fix in message
    assert name in message


@pytest.mark.parametrize("name", ["flex", "stateful", "endless", "not a model", "empty"])
def test_a_model_that_would_crash_hang_or_lie_writes_no_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(probe, "ResourceLimits", lambda: ResourceLimits(cpu_seconds=2))
    path = MODELS / f"{name}.tflite"
    if name in ("not a model", "empty"):
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(b"" if name == "empty" else b"1234TFL3 and more that is none")
    assert str(path) in refused("pack", "--from", path, "-o", tmp_path / "spec.toml")
    assert not (tmp_path / "spec.toml").exists()


# --- what a model is taken for ---


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("classify_int8", "classify", {"activation": "none"}),
        ("classify_float32", "classify", {"activation": "none"}),
        ("sums_float32", "classify", {"activation": "softmax"}),
        ("sums_int16", "classify", {"activation": "softmax"}),
        ("each_label", "classify", {"activation": "none", "multi_label": True}),
        ("each_label_and_sums", "classify", {"tensor": "each"}),
        ("regress_int8", "regress", {}),
        ("anomaly_int8", "anomaly", {"quantile": 0.99}),
    ],
)
def test_the_kind_is_guessed_and_the_spec_packs_as_it_is(
    tmp_path: Path, name: str, kind: str, more: dict[str, Any]
) -> None:
    (tmp_path / "model.tflite").write_bytes((MODELS / f"{name}.tflite").read_bytes())
    document = json.loads(
        run("pack", "--from", tmp_path / "model.tflite", "-o", tmp_path / "spec.toml", "--json").output
    )
    assert (document["kind"], document["spec"]) == (kind, str(tmp_path / "spec.toml"))
    message = tomllib.loads((tmp_path / "spec.toml").read_text())
    assert message["output"].items() >= more.items()
    assert run("pack", tmp_path / "spec.toml", "-o", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("columns", "driving"), [(("a", "b"), 0), (("a", "b", "c", "label_wear"), 1), ((*"abcd", "label_wear"), 1)]
)
def test_the_input_that_the_data_are_for_drives_the_task(
    tmp_path: Path, columns: tuple[str, ...], driving: int
) -> None:
    write_csv(tmp_path / "data.csv", columns, np.ones((5, len(columns)), np.float32))
    table = training_data.summarize_table(tmp_path / "data.csv")
    tensors = [Tensor("slow", (4, 2), 0, "float32", None), Tensor("fast", (50, 3), 0, "float32", None)]
    unit = OutputStats(0.1, 0.9, (0.1, 0.9), (0.1, 0.9))
    inspection = ModelInspection(tensors, [Tensor("y", (1,), 0, "float32", None)], [unit])
    spec = tomllib.loads(scaffold.render_spec(inspection, "model.tflite", "rig", table))
    assert spec["input"]["tensor"] == driving
    assert (spec["input"]["fields"] == [*columns[:3]]) == (len(columns) != 5)
    assert [each["tensor"] for each in spec["inputs"].values()] == [1 - driving]


def looks(outputs: int, answers: OutputStats, limits: tuple[float, float] | None = None) -> str:
    tensors = [Tensor("x", (4,), 0, "float32", None)], [Tensor("y", (outputs,), 0, "int8", limits)]
    return scaffold.guess_kind(ModelInspection(*tensors, [answers])).kind


def test_kinds_are_guessed_from_the_range_and_norm_of_outputs() -> None:
    unit = OutputStats(0.1, 0.9, (0.1, 0.9), (0.1, 0.9))
    assert looks(1, unit, (0, 0.996)) == "classify"
    assert looks(1, unit) == "regress"
    assert looks(8, OutputStats(-0.7, 0.8, (-1, 1), (0.999, 1.001))) == "embedding"


def test_a_table_names_the_fields_and_labels(tmp_path: Path) -> None:
    text = write_csv(tmp_path / "data.csv", ("a", "b", "c", "d"), readings(600)).read_text().splitlines()
    labelled = [f"{line},{('wet', 'dry', 'hot')[i % 3]},note" for i, line in enumerate(text[1:])]
    (tmp_path / "data.csv").write_text("\n".join([f"{text[0]},label,remark", *labelled]) + "\n")
    (tmp_path / "specs").mkdir()
    out = tmp_path / "specs" / "spec.toml"
    assert run("pack", "--from", MODELS / "sums_int8.tflite", "--data", tmp_path / "data.csv", "-o", out).exit_code == 0
    message = tomllib.loads(out.read_text())
    assert message["input"]["fields"] == ["a", "b", "c", "d"]
    assert message["labels"] == ["dry", "hot", "wet"]
    assert message["reference"] == message["golden"] == "../data.csv"
    assert run("pack", out, "-o", tmp_path / "bundle").exit_code == 0


def test_numbered_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    lines = [",".join([*("0" for _ in range(490)), f"class {i % 12}"]) for i in range(24)]
    (tmp_path / "data.csv").write_text("\n".join([",".join([*(f"x{i}" for i in range(490)), "label"]), *lines]) + "\n")
    text = run("pack", "--from", others("foreign_keywords"), "--data", tmp_path / "data.csv").stdout
    assert tomllib.loads(text)["labels"] == [f"class {i}" for i in range(12)]


def test_data_that_the_input_cannot_hold_get_a_scaling_that_it_can(tmp_path: Path) -> None:
    scaled = readings(600) * [1, 1, 1000, 0] + [0, 0, 5e6, 7]
    write_csv(tmp_path / "data.csv", ("a", "b", "c", "d"), scaled.astype(np.float32))
    result = run("pack", "--from", MODELS / "sums_int8.tflite", "--data", tmp_path / "data.csv")
    assert "clips other values, but c has" in result.stderr
    proposed = tomllib.loads(result.stdout)
    assert proposed["input"]["mean"][2] == pytest.approx(5e6, rel=0.01)
    assert proposed["input"]["std"][3] == 1.0


def test_each_input_of_several_gets_a_section_and_the_spec_packs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes((MODELS / "joined_int8.tflite").read_bytes())
    assert run("pack", "--from", tmp_path / "model.tflite", "-o", tmp_path / "spec.toml").exit_code == 0
    message = tomllib.loads((tmp_path / "spec.toml").read_text())
    assert [message["input"]["tensor"], message["inputs"]["input-1"]["tensor"]] == [0, 1]
    assert run("pack", tmp_path / "spec.toml", "-o", tmp_path / "out").exit_code == 0
    config = run("config", tmp_path / "out", "--name", "pump").output
    assert tomllib.loads(config)["tasks"]["pump"]["inputs"]["input-1"] == {"stream": "input-1"}


@pytest.mark.parametrize("limits", [(0.0, 1.0), (-1.0, 1.0), (-4.0, 4.0)])
def test_the_proposed_scaling_maps_the_data_into_the_input(limits: tuple[float, float]) -> None:
    scales = [ColumnScale(10.0, 50.0, (11.0, 49.0), 20.0, 10.0), ColumnScale(7.0, 7.0, (7.0, 7.0), 7.0, 0.0)]
    table = TableSummary("data.csv", ["a", "b"], scales, 100, [])
    scaling = scaffold.propose_scaling(Tensor("x", (2,), 0, "int8", limits), table)
    assert scaling is not None
    for scale, mean, std in zip(scales, scaling.mean, scaling.std, strict=True):
        assert limits[0] <= (scale.usual[0] - mean) / std <= (scale.usual[1] - mean) / std <= limits[1]
    assert (scaling.mean[0] == 20.0) == (limits == (-4.0, 4.0))


def test_data_of_other_columns_than_the_model_has_values_are_listed(tmp_path: Path) -> None:
    write_csv(tmp_path / "data.csv", ("a", "b", "c"), readings(5)[:, :3])
    result = run("pack", "--from", MODELS / "sums_int8.tflite", "--data", tmp_path / "data.csv")
    assert 'has 3 numeric columns: ["a", "b", "c"]' in result.stdout
    assert tomllib.loads(result.stdout)["input"]["fields"] == ["x0", "x1", "x2", "x3"]
    assert "data.csv has 3 numeric columns, the model's input takes 4: complete fields" in result.stderr


def test_columns_left_out_as_labels_of_further_outputs_are_named(tmp_path: Path) -> None:
    columns = np.concatenate([readings(5), readings(5)[:, :1]], axis=1)
    write_csv(tmp_path / "data.csv", ("a", "b", "c", "d", "label_wear"), columns)
    result = run("pack", "--from", MODELS / "sums_int8.tflite", "--data", tmp_path / "data.csv")
    assert tomllib.loads(result.stdout)["input"]["fields"] == ["a", "b", "c", "d"]
    for shown in (result.stdout, result.stderr):
        assert "left out of the fields as labels of further outputs: label_wear; rename what the model reads" in shown


def test_windows_of_slow_readings_may_span_the_time_between_two_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "data.csv", [f"x{i}" for i in range(10)], np.zeros((60, 10), np.float32), step_s=60.0)
    out = tmp_path / "spec.toml"
    run("pack", "--from", others("foreign_keywords"), "--data", tmp_path / "data.csv", "-o", out)
    assert tomllib.loads(out.read_text())["input"]["window"]["max_gap_s"] == 180.0


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"t,a,a,c,d", "column a is there twice"),
        ("t,a,é,c,d".encode("latin-1"), "is not UTF-8; save the table as UTF-8"),
    ],
)
def test_columns_that_no_field_can_name_are_refused(tmp_path: Path, header: bytes, why: str) -> None:
    (tmp_path / "data.csv").write_bytes(header + b"\n1,1,2,3,4\n")
    assert why in refused("pack", "--from", MODELS / "sums_int8.tflite", "--data", tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--from", "none.tflite"], "none.tflite: cannot be read: No such file or directory"),
        (["--from", "m.tflite", "-o", "there.toml"], "there.toml: exists already"),
        (["--from", "m.tflite", "spec.toml"], "--from writes a SPEC and packs nothing"),
        (["--from", "m.tflite", "--data", "empty.csv"], "empty.csv: not a table: there is no row in it"),
        (["--from", "m.tflite", "--data", "none.csv"], "none.csv: cannot be read"),
        ([], "give SPEC and -o"),
        (["spec.toml", "-o", "out", "--data", "empty.csv"], "give SPEC and -o"),
    ],
)
def test_wrong_use_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.tflite").write_bytes((MODELS / "sums_int8.tflite").read_bytes())
    Path("there.toml").write_text("mine")
    Path("empty.csv").write_text("a,b\n")
    assert why in refused("pack", *arguments)
    assert Path("there.toml").read_text() == "mine"


@pytest.mark.parametrize(("offset", "spread"), [(5e6, 1000.0), (0.5, 1e-6)])
def test_pack_warns_of_fields_that_the_quantized_input_clips_or_merges(
    tmp_path: Path, offset: float, spread: float
) -> None:
    rows = readings(5000) * [1, 1, spread, 1] + [0, 0, offset, 0]
    write_csv(tmp_path / "data.csv", ("a", "b", "c", "d"), rows.astype(np.float32))
    model = MODELS / "sums_int8.tflite"
    out = tmp_path / "spec.toml"
    run("pack", "--from", model, "--data", tmp_path / "data.csv", "-o", out)
    text = re.sub(r"(?m)^(mean|std) = .*$", "", out.read_text())
    out.write_text(text)
    [warning] = [each for each in pack.pack(out, None).warnings if "of its training in [input]" in each]
    assert ("c 100%" if spread > 1 else "c: all values lie within one step") in warning
    out.write_text(text.replace("[input]", f"[input]\nmean = [0, 0, {offset}, 0]\nstd = [1, 1, {spread}, 1]"))
    assert not [each for each in pack.pack(out, None).warnings if "of its training in [input]" in each]

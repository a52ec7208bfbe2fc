"""The interpreter gives what a plain loop gives; what it cannot run is refused, in a child that may die of it."""

from __future__ import annotations

import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle import builtin
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.tuning import DEFAULT_BATCH
from outstation.ml.model.sandbox import probe
from scripts.kit.bundles import (
    ANOMALY,
    CLASSIFY,
    FLOAT,
    REGRESS,
    THIRD_PARTY,
    UINT8,
    Recipe,
    around,
    model,
    readings,
    waves,
)

Floats = NDArray[np.float32]
Interpreter: Any = vars(runtime)["Interpreter"]
COUNTS = [0, 1, 4, 5, 31, 32, 33, 100]
OURS = ["classify_int8", "classify_uint8", "classify_float32", "regress_int8", "anomaly_int8", "fixed_batch"]
# As other tools export them: convolutions, weights quantized per channel or per tensor, nothing that describes them.
FOREIGN = ["foreign_keywords", "foreign_autoencoder", "foreign_image"]


def content(name: str) -> bytes:
    if name == "exercise":
        return (builtin.bundles_dir() / "exercise" / "model.tflite").read_bytes()
    if name in (*OURS, *FOREIGN):
        return model(name)
    if not THIRD_PARTY.exists():
        pytest.skip("models that others made are not beside this repository")
    return (THIRD_PARTY / f"{name}.tflite").read_bytes()


def plain(data: bytes, rows: Floats) -> Floats:
    """One row at a time, straight through the interpreter, quantized and back as TFLite's documentation says."""
    interpreter: Any = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    entry, leave = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    out = []
    for row in rows:
        scale, zero = entry["quantization"]
        if scale:
            limits = np.iinfo(entry["dtype"])
            row = np.clip(np.round(row / np.float32(scale)) + zero, limits.min, limits.max)
        interpreter.set_tensor(entry["index"], row.astype(entry["dtype"])[None])
        interpreter.invoke()
        raw = interpreter.get_tensor(leave["index"]).reshape(-1)
        scale, zero = leave["quantization"]
        out.append((raw.astype(np.float32) - zero) * np.float32(scale) if scale else raw)
    return np.array(out, np.float32).reshape(len(rows), -1)


def noise(loaded: TfliteModel, count: int) -> Floats:
    """Over a little more than the range of the input, so that some values saturate."""
    low, high = loaded.input_range
    part = np.random.default_rng(count).uniform(low * 1.1, high * 1.1, (count, *loaded.input_shape))
    return part.astype(np.float32)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", [*OURS, *FOREIGN, "exercise", "mlperf_ad01_int8", "mlperf_kws_int8"])
def test_any_number_of_rows_gives_the_bits_of_a_plain_loop(name: str, count: int) -> None:
    loaded = TfliteModel(content(name))
    rows = noise(loaded, count)
    outputs = loaded.invoke(rows)
    assert outputs.dtype == np.float32
    assert outputs.shape == (count, loaded.outputs)
    if count:
        np.testing.assert_array_equal(outputs, plain(content(name), rows))


@pytest.mark.parametrize("batch", [1, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize(
    "name",
    [
        *("exercise", "foreign_keywords", "foreign_autoencoder"),
        *("mlperf_ad01_int8", "mlperf_kws_int8", "mlperf_resnet8_cifar_int8", "mlperf_vww96_int8"),
    ],
)
def test_any_size_of_batch_gives_the_bits_of_a_plain_loop(name: str, batch: int) -> None:
    loaded = TfliteModel(content(name), batch)
    rows = noise(loaded, 150)
    assert loaded.batch == batch
    np.testing.assert_array_equal(loaded.invoke(rows), plain(content(name), rows))


def test_calls_of_different_sizes_do_not_disturb_each_other() -> None:
    loaded = TfliteModel(content("classify_int8"))
    rows = readings(100)
    whole = loaded.invoke(rows)
    for first, last in ((0, 1), (1, 40), (40, 42), (42, 100), (0, 3), (0, 100)):
        np.testing.assert_array_equal(loaded.invoke(rows[first:last]), whole[first:last])


def test_a_free_batch_size_is_used_and_a_fixed_one_stays() -> None:
    assert TfliteModel(content("classify_int8")).batch == DEFAULT_BATCH
    assert TfliteModel(content("fixed_batch")).batch == 1


@pytest.mark.parametrize("name", ["coral_mobilenet_v1_0.25_128_quant", "foreign_image"])
def test_a_fixed_image_model_runs_row_by_row_and_as_the_plain_loop(name: str) -> None:
    data = content(name)
    loaded = TfliteModel(data)
    rows = noise(loaded, 5)
    assert loaded.batch == 1
    np.testing.assert_array_equal(loaded.invoke(rows), plain(data, rows))


def test_a_model_that_loses_rows_in_a_batch_is_run_row_by_row() -> None:
    loaded = TfliteModel(model("loses_rows"))
    rows = readings(40)
    assert loaded.batch == 1
    np.testing.assert_array_equal(loaded.invoke(rows), rows)


def test_rows_may_come_in_another_shape_of_the_same_size() -> None:
    loaded = TfliteModel(content("anomaly_int8"))
    rows = waves(80).reshape(10, 8, 2)
    np.testing.assert_array_equal(loaded.invoke(rows.reshape(10, 16)), loaded.invoke(rows))


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(BadBundle, match=r"the model takes \[4\] values, got \[3\]"):
        TfliteModel(content("classify_int8")).invoke(np.zeros((2, 3), np.float32))


# --- quantization ---


@pytest.mark.parametrize("name", ["classify_int8", "classify_uint8", "regress_int8"])
def test_values_beyond_the_input_saturate_and_missing_ones_count_as_zero(name: str) -> None:
    loaded = TfliteModel(content(name))
    low, high = loaded.input_range
    rows = np.array(
        [[3e38, -3e38, np.inf, -np.inf], [np.nan, 1, np.nan, -1], [high * 5, low * 5, high * 1.01, low * 1.01]],
        np.float32,
    )
    same = np.array([[high, low, high, low], [0, 1, 0, -1], [high, low, high, low]], np.float32)
    np.testing.assert_array_equal(loaded.invoke(rows), loaded.invoke(same))
    assert np.isnan(rows[1, 0])


def test_outputs_are_in_the_units_of_the_model() -> None:
    """Compare with x·w, up to the rounding of input, weights and output."""
    rows = readings(50)
    loaded = TfliteModel(content("regress_int8"))
    expected = rows @ np.array([0.5, -1, 0.25, 2], np.float32)
    np.testing.assert_allclose(loaded.invoke(rows)[:, 0], expected, atol=2 * loaded.output_steps[0])


def test_an_integer_input_and_a_float_input_agree() -> None:
    rows = np.round(readings(60), 1)
    exact = TfliteModel(content("classify_float32")).invoke(rows)
    for name in ("classify_int8", "classify_uint8"):
        np.testing.assert_allclose(TfliteModel(content(name)).invoke(rows), exact, atol=0.06)


# --- what is refused, and how the probe says so ---


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("two_inputs", "2 inputs, of 0: 'serving_default_b:0' [1, 2], 1: "),
        ("two_outputs", "2 outputs; select one with [output] tensor, of 0: "),
        ("stateful", "keeps state between inferences (ASSIGN_VARIABLE, READ_VARIABLE, VAR_HANDLE)"),
        ("flex", "uses TensorFlow operations, which it lacks; convert it with TFLITE_BUILTINS only"),
        ("no_rows", "the model returns [0, 4] for a batch of 1; its first dimension must count rows"),
        ("greedy", "memory"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_with_its_reason(name: str, why: str) -> None:
    report = probe.probe(around(model(name), memory_mib=256))
    ((check, ok, detail),) = report.checks
    assert (check, ok, report.ok) == ("load", False, False)
    assert why in detail


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pymicro_okay_nabu_int8stream", "keeps state between inferences"),
        ("flex_model_selfmade", "convert it with TFLITE_BUILTINS only"),
        ("tflm_person_detect_int8", "quantized_dimension must be in range"),
    ],
)
def test_a_model_of_others_that_cannot_be_run_is_refused_with_its_reason(name: str, why: str) -> None:
    assert why in probe.probe(around(content(name))).checks[0][2]


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused() -> None:
    report = probe.probe(around(model("mixes_rows"), Recipe("classify", "", labels=("a", "b", "c", "d"))))
    assert report.checks[-1][:2] == ("batch", False)
    assert "depends on other rows" in report.checks[-1][2]


@pytest.mark.parametrize(
    ("name", "recipe", "why"),
    [
        ("classify_int8", ANOMALY, "takes 4 values [4], the manifest's input has 8 rows x 2 fields = 16"),
        ("anomaly_int8", CLASSIFY, "takes 16 values [8, 2], the manifest's input has 1 rows x 4 fields = 4"),
        ("classify_int8", Recipe("classify", "", labels=("a", "b")), "has 3 outputs, the manifest names 2 labels"),
        ("regress_int8", CLASSIFY, "has 1 outputs, the manifest names 3 labels"),
        ("classify_int8", REGRESS, "has 3 outputs, kind regress reports one value"),
        (
            "classify_int8",
            Recipe("anomaly", ""),
            "has 3 outputs; kind anomaly needs one score, or 4 outputs for its 4 inputs",
        ),
    ],
)
def test_a_model_that_does_not_fit_its_manifest_is_refused(name: str, recipe: Recipe, why: str) -> None:
    report = probe.probe(around(model(name), recipe))
    assert report.checks[-1][:2] == ("shapes", False)
    assert why in report.checks[-1][2]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("classify_int8", CLASSIFY), ("classify_uint8", UINT8), ("classify_float32", FLOAT), ("anomaly_int8", ANOMALY)],
)
def test_a_model_without_golden_vectors_is_tried_on_noise(name: str, recipe: Recipe) -> None:
    report = probe.probe(around(model(name), recipe))
    assert report.ok
    assert report.runtime == runtime_name()
    assert [check for check, _, _ in report.checks] == ["load", "shapes", "batch"]


# --- damage, crashes and hangs ---


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99])
def test_a_truncated_model_may_kill_the_child_but_not_us(percent: int) -> None:
    whole = content("exercise")
    report = probe.probe(around(whole[: len(whole) * percent // 100]))
    assert [ok for _, ok, _ in report.checks] == [False]
    assert report.checks[0][2]


@pytest.mark.parametrize("seed", range(10))
def test_a_model_with_bits_flipped_is_run_or_refused_but_never_ends_us(seed: int) -> None:
    data, dice = bytearray(content("classify_int8")), random.Random(seed)
    for _ in range(3):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    report = probe.probe(around(bytes(data), seconds=5))
    assert report.checks
    assert all(detail for _, _, detail in report.checks)


@pytest.mark.parametrize("data", [b"", b"\0", b"TFL3", b"\x1c\0\0\0TFL3" + bytes(200), b"GIF89a" * 50], ids=str)
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    assert not probe.probe(around(data)).ok


def test_a_model_that_never_ends_is_ended_by_its_seconds() -> None:
    report = probe.probe(around(model("endless"), seconds=1), grace_s=150)
    assert report.checks == [("load", False, "used more than its 1 s of CPU and was killed ([limits] cpu_seconds)")]


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`child(script)`: the probe starts that in place of Python."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr("outstation.ml.model.sandbox.probe.sys.executable", str(path))

    return replace


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("kill -SEGV $$", "the runtime crashed on it (SIGSEGV); the model is damaged or not for this runtime"),
        ("kill -ABRT $$", "the runtime crashed on it (SIGABRT)"),
        ("kill -KILL $$", "ran out of memory, the limit is 512 MiB"),
        ("echo terminate: std::bad_alloc >&2; kill -ABRT $$", "ran out of memory, the limit is 512 MiB"),
        ("echo no such module >&2; exit 3", "the child process failed (3): no such module"),
        ("echo hello", "the child process returned invalid output"),
        ("", "the child process returned invalid output"),
        (r"""printf '["\377", [], 1]\n'""", "the child process returned invalid output"),
        ("""echo '["x", [["load", true, "fine"]]]'; kill -SEGV $$""", "the runtime crashed on it (SIGSEGV)"),
    ],
)
def test_however_the_child_dies_it_is_reported(child: Any, script: str, why: str) -> None:
    child(script)
    report = probe.probe(around(model("classify_int8")))
    assert [(name, ok) for name, ok, _ in report.checks] == [("load", False)]
    assert why in report.checks[0][2]


@pytest.mark.parametrize("script", ["echo hello", r"""printf '"\377"'"""])
def test_invalid_output_of_an_inspection_is_no_inspection(child: Any, script: str) -> None:
    child(script)
    with pytest.raises(BadBundle, match="the child process returned invalid output"):
        probe.inspect_model(model("classify_int8"))


def test_a_child_that_stands_still_is_ended(child: Any) -> None:
    child("kill -STOP $$")
    report = probe.probe(around(model("classify_int8"), seconds=1), grace_s=0.5)
    assert report.checks == [("load", False, "did not finish within 1.5 s and was killed")]


def test_a_folder_named_like_us_where_we_happen_to_run_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outstation").mkdir()
    (tmp_path / "outstation" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    assert probe.probe(around(model("classify_int8"))).ok


def test_the_runtime_says_whether_its_fast_kernels_run_a_model() -> None:
    content = model("classify_float32")
    assert TfliteModel(content).kernels == "XNNPACK"


@pytest.mark.parametrize(("path", "folder"), [("/sys/no/such/cpu", "/sys"), ("/proc/no/cpuinfo", "/proc")])
def test_a_refusal_names_the_file_for_want_of_which_the_fast_kernels_did_not_run(
    monkeypatch: pytest.MonkeyPatch, path: str, folder: str
) -> None:
    monkeypatch.setattr(runtime, "_PROCESSOR_FILES", (path,))
    slow = TfliteModel(model("classify_float32"))
    runtime.detect_processor(b"")
    assert runtime.explain_kernels(slow) == ""
    monkeypatch.setattr(slow, "_uses_xnnpack", False)
    assert f"{path} names the processor's features" in runtime.explain_kernels(slow)
    assert f"make {folder} visible" in runtime.explain_kernels(slow)
    monkeypatch.undo()
    runtime.detect_processor(b"")

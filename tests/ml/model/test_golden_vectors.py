"""Golden vectors: a CPU that computes something else is found, another runtime's rounding is let through."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle import builtin, bundle, golden_vectors
from outstation.ml.model.bundle.golden_vectors import GoldenVectors
from outstation.ml.model.inference.runtime import TfliteModel
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.sandbox import probe
from scripts.kit.bundles import ANOMALY, CLASSIFY, KEY, RECIPES, Recipe, model, npz, packed, readings

LITERT, OTHER = "ai-edge-litert 2.3.0", "tflite-runtime 2.14.0"
STEP = 1 / 256
INPUTS = readings(32)
OUTPUTS = (np.random.default_rng(3).dirichlet([0.3] * 3, 32) / STEP).round().astype(np.float32) * np.float32(STEP)


def made(runtime: str = LITERT) -> GoldenVectors:
    return golden_vectors.from_outputs(INPUTS, OUTPUTS, [STEP], [OUTPUTS.shape[1]], runtime)


def test_the_same_outputs_pass_and_are_counted() -> None:
    assert made().compare(OUTPUTS, LITERT, classes=True) == "32 vectors, largest difference 0 of 0.0078 allowed"


def test_two_steps_off_pass_where_the_runtime_is_the_same_and_three_do_not() -> None:
    off = OUTPUTS.copy()
    off[3, 1] += 2 * STEP
    assert "0.0078 of 0.0078" in made().compare(off, "ai-edge-litert 9.9", classes=True)
    off[3, 1] += STEP
    with pytest.raises(BadBundle, match=r"off by 0\.01172, 0\.007812 is allowed on ai-edge-litert"):
        made().compare(off, "ai-edge-litert 9.9", classes=True)
    assert "0.012 of 0.25" in made().compare(off, OTHER, classes=True)


def test_a_runtime_that_differs_between_cpus_has_its_own_tolerance() -> None:
    vectors = made(OTHER)
    assert vectors.tolerance == vectors.other_runtime_tolerance == pytest.approx(0.25 * np.ptp(OUTPUTS))


def test_another_runtime_that_is_a_little_off_everywhere_is_refused() -> None:
    with pytest.raises(BadBundle, match="root mean square"):
        made().compare(OUTPUTS + np.float32(0.1), OTHER, classes=True)


def test_another_runtime_that_names_other_classes_is_refused() -> None:
    close = np.tile(np.array([[0.34, 0.33, 0.33]], np.float32), (32, 1))
    vectors = replace(made(), expected=close)
    with pytest.raises(BadBundle, match="32 of 32 vectors get another class"):
        vectors.compare(np.roll(close, 1, axis=1), OTHER, classes=True)
    few = close.copy()
    few[:3] = np.roll(close[:3], 1, axis=1)
    assert vectors.compare(few, OTHER, classes=True).endswith("3 with another class")
    assert "class" not in vectors.compare(few, OTHER, classes=False)


def test_rows_swapped_or_not_a_number_are_refused_on_any_runtime() -> None:
    broken = OUTPUTS.copy()
    broken[0, 0] = np.nan
    for runtime in (LITERT, OTHER):
        for wrong in (OUTPUTS[::-1], broken, np.zeros_like(OUTPUTS), OUTPUTS[:, :2], OUTPUTS[:31]):
            with pytest.raises(BadBundle):
                made().compare(wrong, runtime, classes=True)


def test_outputs_of_floats_may_differ_by_the_order_of_their_sums() -> None:
    outputs = np.linspace(-4000, 4000, 32, dtype=np.float32)[:, None]
    vectors = golden_vectors.from_outputs(INPUTS, outputs, [0.0], [outputs.shape[1]], LITERT)
    assert vectors.tolerance == pytest.approx(0.4)
    vectors.compare(outputs + np.float32(0.05), LITERT, classes=False)
    with pytest.raises(BadBundle, match="is allowed on"):
        vectors.compare(outputs * np.float32(1.001), LITERT, classes=False)


def test_outputs_that_are_all_alike_still_have_a_tolerance() -> None:
    vectors = golden_vectors.from_outputs(INPUTS, np.zeros((32, 1), np.float32), [0.0], [1], LITERT)
    assert "of 1e-06 allowed" in vectors.compare(np.zeros((32, 1), np.float32), LITERT, classes=False)


def test_a_model_that_answers_no_number_makes_no_golden_vectors() -> None:
    with pytest.raises(BadBundle, match="not finite"):
        golden_vectors.from_outputs(INPUTS, np.full((32, 1), np.inf, np.float32), [0.0], [1], LITERT)


def test_golden_vectors_come_back_and_have_one_spelling() -> None:
    data = golden_vectors.encode(made())
    back = golden_vectors.decode(data)
    np.testing.assert_array_equal(back.inputs, INPUTS)
    np.testing.assert_array_equal(back.expected, OUTPUTS)
    assert (back.runtime, float(back.tolerance)) == (LITERT, 2 * STEP)
    assert golden_vectors.encode(back) == data


@given(st.binary(max_size=100))
def test_bytes_that_are_no_golden_file_are_refused(data: bytes) -> None:
    with pytest.raises(BadBundle, match=r"golden\.npz"):
        golden_vectors.decode(data)


@given(st.integers(0, len(golden_vectors.encode(made())) - 1), st.integers(1, 255))
def test_a_golden_file_with_a_byte_changed_is_refused_or_read_as_something(at: int, change: int) -> None:
    data = bytearray(golden_vectors.encode(made()))
    data[at] ^= change
    try:
        outcome = golden_vectors.decode(bytes(data)).expected.shape[0]
    except BadBundle as refused:
        outcome = str(refused).count("golden.npz")
    assert outcome in (1, 32)


@pytest.mark.attack("files")
def test_a_zip_bomb_of_golden_vectors_is_refused_before_it_is_decoded() -> None:
    out = io.BytesIO()
    zeros = np.zeros((1 << 20, 8), np.float32)
    np.savez_compressed(out, inputs=zeros, expected=zeros, runtime=LITERT, tolerance=[0.1, 0.2])
    data = out.getvalue()
    assert len(data) < zeros.nbytes // 100
    tracemalloc.start()
    try:
        with pytest.raises(BadBundle, match="its members are compressed"):
            golden_vectors.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def file_of(**arrays: object) -> bytes:
    good = {"inputs": INPUTS, "expected": OUTPUTS, "runtime": LITERT, "tolerance": [0.1, 0.2]}
    return npz(**(good | arrays))


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param({"inputs": INPUTS[:0], "expected": OUTPUTS[:0]}, id="no vectors"),
        pytest.param({"inputs": INPUTS[:5]}, id="fewer inputs than outputs"),
        pytest.param({"inputs": INPUTS.astype(np.float64)}, id="inputs of another type"),
        pytest.param({"inputs": np.array("text")}, id="inputs in words"),
        pytest.param({"expected": OUTPUTS[:, :, None]}, id="outputs of another shape"),
        pytest.param({"tolerance": np.array([np.inf, 1])}, id="anything goes"),
        pytest.param({"tolerance": np.array([np.nan, 1])}, id="a tolerance that is no number"),
        pytest.param({"tolerance": np.array([0.1])}, id="one tolerance"),
        pytest.param({"tolerance": np.array(0.1)}, id="a tolerance without dimensions"),
        pytest.param({"runtime": np.array("")}, id="no runtime"),
        pytest.param({"runtime": np.array([LITERT, LITERT])}, id="two runtimes"),
        pytest.param({"runtime": np.array(LITERT.encode())}, id="a runtime in bytes"),
        pytest.param({"runtime": np.frombuffer(b"\xff" * 8, "<U2")[0:1].reshape(())}, id="numbers beyond characters"),
        pytest.param({"inputs": np.array([{}], object)}, id="a pickle"),
    ],
)
def test_a_golden_file_that_proves_nothing_is_refused(arrays: dict[str, object]) -> None:
    assert golden_vectors.decode(file_of()).runtime == LITERT
    with pytest.raises(BadBundle, match=r"golden\.npz"):
        golden_vectors.decode(file_of(**arrays))


NPY = b"\x93NUMPY\x01\x00\x76\x00"


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no array", id="no array"),
        pytest.param(NPY + (b"{'descr': '<f4', " + b"'" * 3 + b"shape': (1,)").ljust(118), id="an open quote"),
        pytest.param(NPY + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9L, 4L), }".ljust(118), id="Python 2"),
        pytest.param(
            NPY + b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999999999999, 4), }".ljust(118),
            id="a shape beyond 64 bits",
        ),
        pytest.param(
            NPY + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 4), }".ljust(118), id="400 GB"
        ),
        pytest.param(NPY + b"(" * 118, id="nested"),
    ],
)
@pytest.mark.parametrize("name", ["inputs", "expected", "runtime", "tolerance"])
def test_a_golden_file_with_a_member_that_is_no_array_is_refused(name: str, member: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file_of())) as source, zipfile.ZipFile(out, "w") as archive:
        for entry in source.namelist():
            archive.writestr(entry, member if entry == f"{name}.npy" else source.read(entry))
    with pytest.raises(BadBundle, match=r"golden\.npz"):
        golden_vectors.decode(out.getvalue())


def test_a_golden_file_without_one_of_its_arrays_is_refused() -> None:
    source = zipfile.ZipFile(io.BytesIO(file_of()))
    for missing in source.namelist():
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name in source.namelist():
                if name != missing:
                    archive.writestr(name, source.read(name))
        with pytest.raises(BadBundle, match=missing.removesuffix(".npy")):
            golden_vectors.decode(out.getvalue())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_packed_bundle_proves_itself_in_the_probe(tmp_path: Path, recipe: Recipe) -> None:
    report = probe.probe(bundle.read(packed(tmp_path, recipe), [KEY.public]))
    assert [(name, ok) for name, ok, _ in report.checks] == [
        ("load", True),
        ("shapes", True),
        ("batch", True),
        ("golden", True),
    ]
    assert report.runtime == runtime_name()


@pytest.mark.parametrize("damage", ["altered", "emptied", "of another model"])
def test_golden_vectors_that_do_not_come_out_fail_the_probe(tmp_path: Path, damage: str) -> None:
    content = bundle.read(packed(tmp_path), [KEY.public])
    vectors = golden_vectors.decode(content.files["golden.npz"])
    wrong = {
        "altered": golden_vectors.encode(replace(vectors, expected=vectors.expected[::-1])),
        "emptied": b"",
        "of another model": golden_vectors.encode(replace(vectors, inputs=np.zeros((32, 8, 2), np.float32))),
    }[damage]
    report = probe.probe(replace(content, files=content.files | {"golden.npz": wrong}))
    name, ok, detail = report.checks[-1]
    assert (name, ok, report.ok) == ("golden", False, False)
    assert detail


def test_the_shipped_bundle_proves_itself_on_this_runtime() -> None:
    content = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    report = probe.probe(content)
    assert report.ok, report.checks
    assert report.checks[-1][0] == "golden"


def test_golden_vectors_of_the_other_runtime_pass_here() -> None:
    """Outputs of the tiny models as the two runtimes gave them: they differ in one step."""
    inputs = readings(40, seed=5)
    for recipe in (CLASSIFY, replace(ANOMALY, model="regress_int8")):
        loaded = TfliteModel(model(recipe.model))
        outputs = loaded.invoke(inputs)
        off = outputs + np.float32(loaded.output_steps[0]) * (np.arange(outputs.size).reshape(outputs.shape) % 5 == 0)
        vectors = golden_vectors.from_outputs(
            inputs,
            off,
            loaded.output_steps,
            loaded.output_sizes,
            OTHER if runtime_name().startswith("ai-edge") else LITERT,
        )
        vectors.compare(outputs, runtime_name(), classes=recipe.kind == "classify")

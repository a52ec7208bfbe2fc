"""Errors of `model pack`: one sentence with the file and the key of the SPEC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outstation.foundation.errors import BadBundle, ConfigError
from outstation.workbench.authoring import pack
from scripts.kit.bundles import KEY, LABELS, change, write_spec


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("[input]\nstd = [nan, 1, 1, 1]", "input.std[0]: is nan"),
        ("[input]\nmean = [0, inf, 1, 1]", "input.mean[1]: is inf"),
        ("[input]\nscale = inf", "input.scale: is inf"),
        ("[output]\nthreshold = nan", "output.threshold: is nan"),
        ("[output]\ncentroid = [-inf]", "output.centroid[0]: is -inf"),
    ],
)
def test_a_number_that_is_none_is_named_and_is_not_taken_for_left_out(tmp_path: Path, given: str, key: str) -> None:
    section = given.partition("\n")[0]
    spec = change(write_spec(tmp_path), section, given)
    with pytest.raises(ConfigError) as problem:
        pack.pack(spec, KEY)
    assert str(problem.value) == f"{spec}: {key}; give a finite number"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a,b,c,d\n", "no rows in it, so nothing to run the model on; give more data"),
        ("", "the file is empty"),
        ("a,b,c\n1,2,3\n", "no column d; there is a, b, c"),
        ("a,b,c,d\n1,x,3,4\n", "line 2: b: 'x' is no number"),
    ],
)
@pytest.mark.parametrize("name", ["reference", "golden"])
def test_data_that_are_none_are_named_with_the_key_of_the_spec(
    tmp_path: Path, name: str, content: str, why: str
) -> None:
    spec = write_spec(tmp_path)
    (tmp_path / f"{name}.csv").write_text(content)
    with pytest.raises(ConfigError) as problem:
        pack.pack(spec, KEY)
    assert str(problem.value).startswith(f"{spec}: {name}: {tmp_path / name}.csv: ")
    assert why in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a,b,c,d,label\n" + "2,0,0,-1,left\n" * 100, "only one class, 'left'"),
        ("a,b,c,d,label\n", "0 labelled results; at least 40 are needed"),
        ("a,b,c,d\n1,2,3,4\n", "no column label; there is a, b, c, d; calibration needs the true label"),
        ("a,b,c,d,label\n1,2,3,4,up\n", "this is no label of this model; it knows left, right, rest"),
    ],
)
def test_labels_without_calibration_data_are_one_sentence(tmp_path: Path, content: str, why: str) -> None:
    spec = change(write_spec(tmp_path), "[output]", '[output]\ncalibration_data = "labels.csv"')
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(ConfigError) as problem:
        pack.pack(spec, KEY)
    assert str(problem.value).startswith(f"{spec}: output.calibration_data: ")
    assert why in str(problem.value)


def test_a_wrong_number_of_labels_is_reported_with_both_numbers(tmp_path: Path) -> None:
    spec = change(write_spec(tmp_path), json.dumps(LABELS), '["a", "b"]')
    with pytest.raises(BadBundle, match="the model has 3 outputs, the manifest names 2 labels; name each class"):
        pack.pack(spec, KEY)

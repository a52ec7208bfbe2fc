"""Feature sets: bundles pin the set that they were packed with, and another one is refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outstation.foundation.errors import BadBundle, ConfigError
from outstation.ml.model.bundle import bundle
from outstation.ml.model.bundle import feature_set as feature_sets
from outstation.ml.model.inference import features
from outstation.workbench.authoring import pack
from outstation.workbench.authoring import spec as specs
from outstation.workbench.cli.model.group import model
from scripts.kit.bundles import KEY, change_manifest, resign
from tests.kit.feature_sets import FEATURES, write_feature_spec


def refused(file: Path, *, raises: type[Exception] = ConfigError) -> str:
    with pytest.raises(raises) as problem:
        pack.pack(file, KEY)
    return str(problem.value)


def test_two_bundles_pin_the_same_set_and_hold_its_features(tmp_path: Path) -> None:
    loaded = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        pack.write_bundle(pack.pack(write_feature_spec(tmp_path / name), KEY), tmp_path / name / "bundle")
        loaded.append(bundle.read(tmp_path / name / "bundle", [KEY.public]).manifest.input)
    feature_set = feature_sets.read(tmp_path / "first" / "motion.toml")
    assert [each.features for each in loaded] == [feature_set.reference] * 2
    assert loaded[0].derived == feature_set.derived
    assert (loaded[0].fields, loaded[0].max_gap_s) == (["a", "b"], 0.5)
    # Features that the model does not take need no history.
    assert loaded[0].history_rows == 4


def test_comments_and_layout_change_no_digest_and_every_member_does(tmp_path: Path) -> None:
    file = tmp_path / "motion.toml"
    digests = []
    for text in (
        FEATURES,
        "# A comment\n\n" + FEATURES.replace(" = ", "="),
        FEATURES.replace("rows = 5", "rows = 6"),
        FEATURES.replace('version = "1.0.0"', 'version = "1.0.1"'),
        FEATURES.replace("max_gap_s = 0.5", "max_gap_s = 0.6"),
        FEATURES.replace('"a", "b"]', '"b", "a"]'),
    ):
        file.write_text(text)
        digests.append(feature_sets.read(file).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


@pytest.mark.parametrize(
    ("old", "new", "key", "why"),
    [
        ('version = "1.0.0" }', 'version = "1.1.0" }', "input.features.version", "restore the file of that version"),
        (
            'version = "1.0.0" }',
            'version = "1.0.0", digest = "sha256:ab" }',
            "input.features.digest",
            "has digest sha256",
        ),
        ('version = "1.0.0" }', 'version = "1.0.0" }\nfields = ["a"]', "input.fields", "remove this key"),
        ('version = "1.0.0" }', 'version = "1.0.0" }\nmax_gap_s = 2.0', "input.max_gap_s", "remove this key"),
        (
            'version = "1.0.0" }',
            'version = "1.0.0" }\nwindow = { rows = 2, step = 2, max_gap_s = 9.0 }',
            "input.window.max_gap_s",
            "that of the feature file 0.5",
        ),
        ("motion.toml", "motoin.toml", "", "motoin.toml: no such file; give the TOML file of a feature set"),
    ],
)
def test_a_spec_that_does_not_fit_its_feature_file_names_the_key(
    tmp_path: Path, old: str, new: str, key: str, why: str
) -> None:
    spec = write_feature_spec(tmp_path)
    text = spec.read_text()
    assert old in text
    spec.write_text(text.replace(old, new))
    problem = refused(spec)
    assert f"{spec}: {key}" in problem or not key
    assert why in problem


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('field = "b"', 'field = "z"', "names 'z', which is not a field"),
        ('name = "b_step"', 'name = "a"', "a name is used twice"),
        ('name = "b_step"', 'name = "b\\nstep"', "has a line break"),
        ('name = "b_step"', 'name = "=HYPERLINK(1)"', "a spreadsheet would run it"),
        ('"a", "b"]', '"a", "b", "@x"]', "field '@x' begins with = + - or @"),
        ("rows = 5", "rows = -5", "rows"),
        ("max_gap_s = 0.5", "max_gap_s = inf", "give a finite number"),
        ("rows = 5", "rows = 5, rate = inf", "rate: is inf; give a finite number"),
        (
            '"mean", field = "a", rows = 5',
            '"band", field = "a", rows = 5, band = [0.0, inf], rate = inf',
            "band[1]: is inf",
        ),
        ('name = "motion"', 'name = "Motion x"', "must be 1-64"),
        ('version = "1.0.0"', 'version = "\\u001b[31m1"', "must be printable"),
        ("max_gap_s = 0.5", "definition = 2", "update outstation"),
        ("max_gap_s", "max_gap", "max_gap"),
    ],
)
def test_a_feature_file_that_cannot_be_computed_is_named(tmp_path: Path, old: str, new: str, why: str) -> None:
    file = tmp_path / "motion.toml"
    assert old in FEATURES
    file.write_text(FEATURES.replace(old, new))
    with pytest.raises(ConfigError) as problem:
        feature_sets.read(file)
    assert str(file) in str(problem.value)
    assert why in str(problem.value)


def change_rows(manifest: dict[str, Any]) -> None:
    manifest["input"]["derived"][0]["rows"] = 4


def change_version(manifest: dict[str, Any]) -> None:
    manifest["input"]["features"]["version"] = "1.0.1"


@pytest.mark.parametrize("change", [change_rows, change_version])
def test_a_signed_bundle_with_other_features_than_it_pins_is_refused(tmp_path: Path, change: Any) -> None:
    pack.write_bundle(pack.pack(write_feature_spec(tmp_path), KEY), tmp_path / "bundle")
    change_manifest(tmp_path / "bundle", change)
    resign(tmp_path / "bundle")
    with pytest.raises(BadBundle, match=r"features: motion .* pack the bundle again from its feature file"):
        bundle.read(tmp_path / "bundle", [KEY.public])


def test_a_window_gets_the_gap_of_the_set_and_media_a_shorter_one(tmp_path: Path) -> None:
    spec = write_feature_spec(tmp_path)
    spec.write_text(spec.read_text().replace('1.0.0" }', '1.0.0" }\nwindow = { rows = 2, step = 1 }'))
    manifest = specs.to_manifest(spec, specs.read(spec))
    assert manifest.input.gap_s == 0.5
    assert manifest.input.features is not None
    limited = features.limit_gap(manifest, 0.1).input
    assert (limited.gap_s, limited.features) == (0.1, None)


def test_data_that_were_exported_with_another_edition_of_the_set_are_refused(tmp_path: Path) -> None:
    spec = write_feature_spec(tmp_path)
    pinned = feature_sets.read(tmp_path / "motion.toml").reference
    head = {"format": "outstation-dataset-1", "features": {"name": "motion", "version": "0.9", "digest": pinned.digest}}
    (tmp_path / "manifest.json").write_text(json.dumps(head))
    pack.pack(spec, KEY)
    head["features"] = {"name": "motion", "version": "0.9", "digest": f"sha256:{'0' * 64}"}
    (tmp_path / "manifest.json").write_text(json.dumps(head))
    problem = refused(spec)
    assert f"{spec}: reference" in problem
    assert "was exported with features motion 0.9" in problem
    assert "fleet dataset export --features" in problem


def test_the_command_prints_the_line_for_a_spec(tmp_path: Path) -> None:
    (tmp_path / "motion.toml").write_text(FEATURES)
    shown = CliRunner().invoke(model, ["features", str(tmp_path / "motion.toml"), "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    assert document["columns"] == ["a_mean", "b_step", "a_last", "day_sin", "day_cos", "a_long"]
    assert document["history_rows"] == 39
    spec = write_feature_spec(tmp_path)
    spec.write_text(
        spec.read_text().replace('features = { file = "motion.toml", version = "1.0.0" }', document["spec"])
    )
    assert specs.to_manifest(spec, specs.read(spec)).input.features is not None

"""Smaller exercise models: table and figure match the measurements, and the weights produce these models."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.kit.tensorflow_python import find_tensorflow
from tests.project.test_build_models import ROOT, SOURCE

FIGURES: dict[str, Any] = json.loads((SOURCE / "small.json").read_text(encoding="utf-8"))
VARIANTS: list[dict[str, Any]] = FIGURES["variants"]
README = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs" / "images" / "small.svg").read_text(encoding="utf-8")
NAMES = [each["name"] for each in VARIANTS]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script that writes table and figure; it imports its other half from its own folder."""
    monkeypatch.syspath_prepend(SOURCE)
    return import_module("show_small")


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_the_table_names_a_model_with_its_size_and_accuracy(variant: dict[str, Any]) -> None:
    rows = [line for line in README.splitlines() if line.strip("|* ").startswith(variant["name"])]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[2] == f"{variant['bytes']:,}"
    assert cells[3].startswith(f"{variant['accuracy'][0]:.3f}<br>(")


def test_the_picture_names_the_models_of_the_table_with_their_sizes() -> None:
    texts = [element for element in ElementTree.fromstring(PICTURE).iter() if element.tag.endswith("text")]
    assert [text.text for text in texts if text.get("class") == "name"] == NAMES
    sizes = [text.text for text in texts if text.get("class") == "value"][::3]
    assert sizes == [f"{variant['bytes'] / 1000:.1f}" for variant in VARIANTS]


def test_the_picture_has_colours_for_light_and_dark_only_in_its_style() -> None:
    body = re.sub(r"<style>.*?</style>", "", PICTURE, flags=re.DOTALL)
    assert "prefers-color-scheme:dark" in PICTURE
    assert re.findall(r"#[0-9a-f]{6}", body) == []


def test_table_and_picture_are_what_the_measured_figures_make(show: ModuleType) -> None:
    assert show.replaced(README, show.section(FIGURES)) == README
    assert show.draw_small.picture(FIGURES) == PICTURE


def test_other_figures_make_another_table_and_leave_the_rest_of_the_file(show: ModuleType) -> None:
    changed = FIGURES | {"variants": [variant | {"bytes": variant["bytes"] + 1} for variant in VARIANTS]}
    text = show.replaced(README, show.section(changed))
    assert f"{VARIANTS[0]['bytes'] + 1:,}" in text
    assert text.partition(show.BEGIN)[0] == README.partition(show.BEGIN)[0]
    assert text.partition(show.END)[2] == README.partition(show.END)[2]


def test_a_file_without_the_marks_is_left_alone_with_a_sentence(show: ModuleType) -> None:
    with pytest.raises(SystemExit, match="the marks are gone"):
        show.replaced("# Models\n", "table")


def test_what_the_table_calls_shipped_is_the_model_of_the_bundle() -> None:
    model = (ROOT / "models" / "exercise" / "model.tflite").read_bytes()
    [ships] = [variant for variant in VARIANTS if "shipped" in variant["name"]]
    assert (ships["bytes"], ships["sha256"]) == (len(model), hashlib.sha256(model).hexdigest())


def test_the_small_network_was_trained_with_each_seed_both_ways() -> None:
    accuracy = FIGURES["seeds"]["accuracy"]
    assert len(accuracy["alone"]) == len(accuracy["distilled"]) > 1
    assert FIGURES["seeds"] == json.loads((SOURCE / "small_seeds.json").read_text())


@pytest.mark.timeout(300)
def test_converting_the_committed_weights_gives_each_model_of_the_table(tmp_path: Path) -> None:
    run = subprocess.run(
        [find_tensorflow(), str(SOURCE / "variants.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    made = json.loads((tmp_path / "variants.json").read_text())
    digests = [hashlib.sha256((tmp_path / f"{variant['file']}.tflite").read_bytes()).hexdigest() for variant in made]
    assert digests == [variant["sha256"] for variant in VARIANTS]

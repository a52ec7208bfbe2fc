"""Folders of images and sounds in `model run` and `model evaluate`, one file at a time; other files are rejected."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from outstation.ml.datasets import training_data
from outstation.ml.datasets.media import MediaReader
from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from outstation.workbench.authoring import pack
from outstation.workbench.cli.model.group import model as command
from outstation.workbench.evaluation.document import Evaluation
from scripts.kit.bundles import KEY, MODELS
from tests.kit.evaluations import evaluated
from tests.ml.model.test_media import SOUND_FORMAT, picture, tone, write_wav

SOUND = ModelInput(fields=SOUND_FORMAT.columns, window=WindowSpec(rows=5, step=5, max_gap_s=0.5), sound=SOUND_FORMAT)
SPEC = """
name = "vww"
version = "1"
kind = "classify"
model = "model.tflite"
labels = ["none", "person"]
[input]
image = { width = 32, height = 32 }
[output]
"""


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


def test_sounds_are_read_a_file_at_a_time_with_their_folder_as_label(tmp_path: Path) -> None:
    for i, label in enumerate(("fan", "fan", "pump")):
        write_wav(tmp_path / label / f"{i}.wav", tone(440 * (i + 1)))
    (tmp_path / "fan" / "1.wav").write_bytes(b"RIFF is not enough")
    blocks = list(MediaReader(tmp_path, SOUND, ["label"]).blocks())
    assert [set(block.text_columns["file"].tolist()) for block in blocks] == [{"fan/0.wav"}, set(), {"pump/2.wav"}]
    assert [set(block.text_columns["label"].tolist()) for block in blocks] == [{"fan"}, set(), {"pump"}]
    [rejection] = blocks[1].rejected
    assert "1.wav: not a readable WAV file" in rejection.reason
    assert rejection.file == "fan/1.wav"
    whole = training_data.read(tmp_path / "pump" / "2.wav", SOUND)
    assert blocks[2].rows.tobytes() == whole.features.tobytes()
    assert blocks[2].t[0] - blocks[0].t[-1] > 500_000 * 10  # no window reaches from one file into the next
    again = list(MediaReader(tmp_path, SOUND, ["label"]).blocks(blocks[1].next_position))
    assert again[0].row_numbers.tolist() == blocks[2].row_numbers.tolist()
    assert again[0].t.tobytes() == blocks[2].t.tobytes()


@pytest.fixture
def looking(tmp_path: Path) -> Path:
    """A bundle for images, and a folder of 40."""
    (tmp_path / "model.tflite").write_bytes((MODELS / "foreign_image.tflite").read_bytes())
    for i in range(40):
        path = tmp_path / "images" / ("person" if i % 2 else "none") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture((32, 32, 3), seed=i))
    (tmp_path / "spec.toml").write_text(SPEC)
    pack.write_bundle(pack.pack(tmp_path / "spec.toml", KEY), tmp_path / "bundle")
    return tmp_path


def test_each_image_gets_a_named_result_and_a_broken_one_is_rejected(looking: Path) -> None:
    (looking / "images" / "none" / "broken.png").write_bytes(b"no image")
    result = run("run", looking / "bundle", looking / "images", "-o", looking / "out.csv", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["results"], document["rejected"]) == (1, 40, 1)
    assert document["rejected_rows"][0]["file"] == "none/broken.png"
    with (looking / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "file", "label", "score"]
    assert sorted(row["file"] for row in rows)[:2] == ["none/00.png", "none/02.png"]


def test_recordings_for_an_image_model_are_predicted_as_one_named_file(looking: Path) -> None:
    pixels = np.zeros((64, 96), np.float32)
    np.savez(looking / "rows.npz", rows=pixels, fields=[f"pixel{i}" for i in range(96)])
    result = run("run", looking / "bundle", looking / "rows.npz", "-o", looking / "out.csv", "--json")
    assert (result.exit_code, json.loads(result.stdout)["results"]) == (0, 2)
    with (looking / "out.csv").open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["rows.npz", "rows.npz"]


def test_a_folder_of_images_is_evaluated_by_the_folders_within(looking: Path) -> None:
    evaluation: Evaluation = evaluated(looking / "bundle", looking / "images")
    assert evaluation.data.counts == {"none": 20, "person": 20}
    assert np.sum(evaluation.confusion) == 40

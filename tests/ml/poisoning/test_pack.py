"""Poisoned training data given to `outstation model pack`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from outstation.foundation.errors import UsageError
from outstation.workbench.cli.model.group import model as command
from scripts.kit.bundles import CLASSIFY, LABELS, REGRESS, readings, write_spec

ROWS = 1200
pytestmark = pytest.mark.process


def write_training(path: Path, flipped: float = 0.0) -> Path:
    rows = readings(ROWS, seed=3)
    label = np.arange(ROWS) // 7 % 3
    draw = np.random.default_rng(0)
    label[(label == 0) & (draw.random(ROWS) < flipped)] = 1
    lines = [",".join(["t", *CLASSIFY.fields, "label", "device"])]
    for i, (row, code) in enumerate(zip(rows.tolist(), label.tolist(), strict=True)):
        lines.append(",".join([f"{i / 100:.2f}", *(f"{value:.6g}" for value in row), LABELS[code], f"pi-{i % 5}"]))
    path.write_text("\n".join(lines) + "\n")
    return path


def pack(folder: Path, train: Path, *options: str, held_out: str = "") -> tuple[int, str]:
    spec = write_spec(folder)
    spec.write_text(spec.read_text().replace("[output]", f"[output]\n{held_out}"))
    arguments = ["pack", str(spec), "-o", str(folder / "out"), "--train", str(train), *options]
    result = CliRunner().invoke(command, arguments)
    return result.exit_code, result.stdout


def test_flipped_labels_are_reported_with_rows_and_stand_in_the_data_card(tmp_path: Path) -> None:
    code, text = pack(tmp_path, write_training(tmp_path / "train.csv", 0.35), "--json")
    [checked] = json.loads(text)["training"]
    assert code == 0
    assert checked["report"]["state"] == "warning"
    assert checked["report"]["findings"][0]["subject"] == f"{LABELS[0]} → {LABELS[1]}"
    truth = np.arange(ROWS) // 7 % 3
    assert all(truth[row - 1] == 0 for row in checked["report"]["findings"][0]["rows"])
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "## Poisoning checks" in card
    assert "look at" not in card


def test_a_poisoned_set_is_not_packed_with_require_clean(tmp_path: Path) -> None:
    code, text = pack(tmp_path, write_training(tmp_path / "train.csv", 0.35), "--require-clean")
    assert code == 1
    assert "not written" in text
    assert not (tmp_path / "out").exists()


def test_a_clean_set_is_packed_with_require_clean_and_the_card_is_the_authors(tmp_path: Path) -> None:
    code, text = pack(tmp_path, write_training(tmp_path / "train.csv"), "--require-clean")
    assert (code, "nothing found" in text) == (0, True)
    assert (tmp_path / "out" / "DATA_CARD.md").read_bytes() == (tmp_path / "DATA.md").read_bytes()


@pytest.mark.parametrize("held_out", ["", 'held_out = "held-out.csv"'])
def test_too_few_labels_do_not_count_as_clean_even_with_clean_held_out_data(tmp_path: Path, held_out: str) -> None:
    train = write_training(tmp_path / "train.csv")
    write_training(tmp_path / "held-out.csv")
    train.write_text("\n".join(train.read_text().splitlines()[:40]) + "\n")
    code, text = pack(tmp_path, train, "--require-clean", held_out=held_out)
    assert code == 1
    assert "not checked for poisoning: 39 labelled windows, the checks take 100" in text


def test_a_reference_with_labels_of_something_else_is_named_once(tmp_path: Path) -> None:
    train = write_training(tmp_path / "train.csv")
    spec = write_spec(tmp_path)
    reference = tmp_path / tomllib.loads(spec.read_text())["reference"]
    reference.write_text(train.read_text().replace(LABELS[1], "elsewhere"))
    result = CliRunner().invoke(command, ["pack", str(spec), "-o", str(tmp_path / "out")])
    assert f"{reference.name}: not checked for poisoning: column label: 'elsewhere'" in result.stdout


def test_the_bundle_does_not_depend_on_how_the_training_data_is_named(tmp_path: Path) -> None:
    train = write_training(tmp_path / "train.csv", 0.35)
    assert pack(tmp_path, train)[0] == 0
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "- train.csv: " in card
    assert str(tmp_path) not in card


def test_training_data_of_a_model_without_classes_is_refused(tmp_path: Path) -> None:
    arguments = ["pack", str(write_spec(tmp_path, REGRESS)), "-o", str(tmp_path / "out"), "--train", "missing.csv"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code != 0
    assert "--train is for models that give one class" in f"{result.output}{result.exception}"


def test_labellers_as_bytes_that_are_no_text_are_refused_with_the_array_named(tmp_path: Path) -> None:
    recordings = {
        "rows": readings(ROWS, seed=3).astype(np.float32),
        "fields": np.array(CLASSIFY.fields),
        "starts": np.arange(0, ROWS + 1, 20),
        "label": np.arange(ROWS // 20) % 3,
        "labels": np.array(LABELS),
        "rate": np.float64(100),
        "labeller": np.array([b"\xff"] * (ROWS // 20)),
    }
    np.savez(tmp_path / "train.npz", **recordings)  # type: ignore[arg-type]
    arguments = ["pack", str(write_spec(tmp_path)), "-o", str(tmp_path / "out"), "--train", str(tmp_path / "train.npz")]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, UsageError)
    assert "array labeller holds bytes that are not ASCII" in str(result.exception)

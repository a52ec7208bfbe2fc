"""Every kind of bundle in `model run` and `model evaluate`: blocks of any size, metrics of known labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from outstation.ml.datasets.tables import BLOCK_BYTES
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import Inference
from outstation.workbench.evaluation import (
    bootstrap,
    evaluation_metrics,
    evaluation_report,
    examples,
    predictions,
    sensitivity,
)
from outstation.workbench.evaluation.predict.run import BatchPredictor
from scripts.kit.bundles import SEVERAL, VECTORS, Recipe, packed
from tests.kit.evaluations import evaluated, loaded
from tests.ml.model.test_kinds import HISTORY, KINDS

ALL = {**KINDS, "history": HISTORY}
N = 700


def write(path: Path, recipe: Recipe, inference: Inference, wrong: int = 0) -> Path:
    """Write rows labelled with the model's own predictions, the first `wrong` of them with other labels."""
    rows = recipe.rows(N, seed=3).astype(np.float32)
    rows = np.array([[float(f"{v:.5f}") for v in row] for row in rows], np.float32)
    t = np.arange(N) * 10_000
    result = inference.run(rows, t).scores
    predicted = scores.to_texts(result, inference.manifest)
    if predicted is None:
        assert result.value is not None
        predicted = [f"{v:.6f}" for v in result.value]
    predicted = [*predicted[1 : wrong + 1], *predicted[wrong:]]
    lines = [",".join(["t", *recipe.fields, "label"])]
    lines += [
        ",".join([f"{us / 1e6:.2f}", *(f"{v:.5f}" for v in row), label])
        for us, row, label in zip(t, rows, predicted, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ALL)
def test_block_size_changes_nothing_and_own_predictions_are_right(kind: str, tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", ALL[kind])
    result, inference = loaded(bundle)
    data = write(tmp_path / "rows.csv", ALL[kind], inference)
    for name, block in (("whole.csv", BLOCK_BYTES), ("pieces.csv", 1500)):
        BatchPredictor(result, inference, raw=True, block_bytes=block).predict_file(
            data, tmp_path / name, lambda *_: None
        )
    with (tmp_path / "whole.csv").open(newline="") as first, (tmp_path / "pieces.csv").open(newline="") as second:
        whole, pieces = list(csv.DictReader(first)), list(csv.DictReader(second))
    assert len(whole) == len(pieces) == N
    for a, b in zip(whole, pieces, strict=True):
        assert (a["row"], a.get("label")) == (b["row"], b.get("label"))
        numbers = [name for name in a if name not in ("row", "label")]
        # Batches of another size may differ in the last bit of a float.
        assert [float(a[name]) for name in numbers] == pytest.approx([float(b[name]) for name in numbers], abs=1e-5)
    if result.manifest.label_kind != "anomaly" or result.manifest.output.threshold is not None:
        judged = evaluated(bundle, data, ablate=True, robustness=True, adversarial=True, max_invocations=2000)
        figures = {m.metric: m.value for m in judged.metrics}
        perfect = {
            "classify": ("accuracy", 1.0),
            "several": ("accuracy", 1.0),
            "regress": ("mae", 0.0),
            "anomaly": ("accuracy", 1.0),
        }
        name, value = perfect[result.manifest.label_kind]
        assert figures[name] == pytest.approx(value, abs=1e-5)
        assert evaluation_report.render_html(judged).startswith("<!doctype html>")


def test_a_multilabel_model_is_measured_by_label_and_as_a_whole(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", SEVERAL)
    _, inference = loaded(bundle)
    result = evaluated(bundle, write(tmp_path / "rows.csv", SEVERAL, inference, wrong=200))
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    values = np.array([[row[name] for name in SEVERAL.fields] for row in rows], np.float64).astype(np.float32)
    predicted = inference.run(values, np.arange(N) * 10_000).scores.predicted
    assert predicted is not None
    meant = np.array([[label in row["label"].split("|") for label in SEVERAL.labels] for row in rows])
    figures = {m.metric: m.value for m in result.metrics}
    assert figures["accuracy"] == pytest.approx((predicted == meant).all(axis=1).mean(), rel=1e-5)
    assert figures["accuracy"] != 1.0
    for i, item in enumerate(result.classes):
        assert item.n == meant[:, i].sum()
        assert item.recall.value == pytest.approx((predicted & meant)[:, i].sum() / meant[:, i].sum(), rel=1e-5)
        assert item.precision.value == pytest.approx((predicted & meant)[:, i].sum() / predicted[:, i].sum(), rel=1e-5)
    assert result.confusion == []


def test_sampled_windows_get_the_predictions_they_get_in_the_stream(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", HISTORY)
    result, inference = loaded(bundle)
    data = write(tmp_path / "rows.csv", HISTORY, inference, wrong=200)
    source = examples.read(data, inference, ["label"])
    windows = examples.label_windows(source, inference, "label", ["label"], None)
    units = bootstrap.build_units(np.zeros(len(windows)), None, None, 0)
    table = sensitivity.draw_sample(inference, windows, units)
    late = np.flatnonzero(windows.starts >= inference.history_rows)
    whole = predictions.pair_with_truth(
        result.manifest, examples.predict(inference, source, windows.starts), windows.truth, None
    )[late]
    assert len(table.labelled) == len(late) == N - inference.history_rows > 0
    assert table.baseline[0] == evaluation_metrics.primary_metric("classify", whole, units.subset(late))[0] < 1.0
    assert result.manifest.input.history_rows == 19


def test_an_embedding_is_evaluated_by_its_distance(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", VECTORS)
    _, inference = loaded(bundle)
    result = evaluated(bundle, write(tmp_path / "rows.csv", VECTORS, inference))
    figures = {m.metric: m.value for m in result.metrics}
    assert (figures["auc"], figures["precision"], figures["recall"]) == (1.0, 1.0, 1.0)
    assert [sum(row) for row in result.confusion] == list(result.data.counts.values())

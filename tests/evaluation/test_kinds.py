"""Every kind of bundle through `model run` and `model evaluate`: rows in blocks, labels as they are told."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from agent.datasets.tables import BLOCK_BYTES
from agent.evaluation import bootstrap, examples, metrics, predictions, report, sensitivity
from agent.evaluation.predict.run import BatchPredictor
from agent.evaluation.predictions import LabelledPredictor
from agent.model.inference import scores
from agent.model.inference.inference import Inference
from scripts.kit.bundles import SEVERAL, VECTORS, Recipe, packed
from tests.kit.evaluations import evaluated, loaded
from tests.model.test_kinds import HISTORY, KINDS

ALL = {**KINDS, "history": HISTORY}
N = 700


def write(path: Path, recipe: Recipe, inference: Inference, wrong: int = 0) -> Path:
    """Rows with what the model says of them as their label; of the first `wrong` of them another's."""
    rows = recipe.rows(N, seed=3).astype(np.float32)
    rows = np.array([[float(f"{v:.5f}") for v in row] for row in rows], np.float32)
    t = np.arange(N) * 10_000
    found = inference.run(rows, t).scores
    said = scores.to_texts(found, inference.manifest)
    if said is None:
        assert found.value is not None
        said = [f"{v:.6f}" for v in found.value]
    said = [*said[1 : wrong + 1], *said[wrong:]]
    lines = [",".join(["t", *recipe.fields, "label"])]
    lines += [
        ",".join([f"{us / 1e6:.2f}", *(f"{v:.5f}" for v in row), label])
        for us, row, label in zip(t, rows, said, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ALL)
def test_blocks_change_nothing_and_the_models_own_answers_are_right(kind: str, tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", ALL[kind])
    found, inference = loaded(bundle)
    data = write(tmp_path / "rows.csv", ALL[kind], inference)
    for name, block in (("whole.csv", BLOCK_BYTES), ("pieces.csv", 1500)):
        BatchPredictor(found, inference, raw=True, block_bytes=block).predict_file(
            data, tmp_path / name, lambda *_: None
        )
    with (tmp_path / "whole.csv").open(newline="") as one, (tmp_path / "pieces.csv").open(newline="") as other:
        whole, pieces = list(csv.DictReader(one)), list(csv.DictReader(other))
    assert len(whole) == len(pieces) == N
    for a, b in zip(whole, pieces, strict=True):
        assert (a["row"], a.get("label")) == (b["row"], b.get("label"))
        numbers = [name for name in a if name not in ("row", "label")]
        # Batches of another size may differ in the last bit of a float.
        assert [float(a[name]) for name in numbers] == pytest.approx([float(b[name]) for name in numbers], abs=1e-5)
    if found.manifest.label_kind != "anomaly" or found.manifest.output.threshold is not None:
        judged = evaluated(bundle, data, ablate=True, robustness=True)
        figures = {m.metric: m.value for m in judged.metrics}
        perfect = {
            "classify": ("accuracy", 1.0),
            "several": ("accuracy", 1.0),
            "regress": ("mae", 0.0),
            "anomaly": ("accuracy", 1.0),
        }
        name, value = perfect[found.manifest.label_kind]
        assert figures[name] == pytest.approx(value, abs=1e-5)
        assert report.render_html(judged).startswith("<!doctype html>")


def test_of_several_labels_each_is_measured_and_answers_as_a_whole(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", SEVERAL)
    _, inference = loaded(bundle)
    found = evaluated(bundle, write(tmp_path / "rows.csv", SEVERAL, inference, wrong=200))
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    values = np.array([[row[name] for name in SEVERAL.fields] for row in rows], np.float64).astype(np.float32)
    said = inference.run(values, np.arange(N) * 10_000).scores.predicted
    assert said is not None
    meant = np.array([[label in row["label"].split("|") for label in SEVERAL.labels] for row in rows])
    figures = {m.metric: m.value for m in found.metrics}
    assert figures["accuracy"] == pytest.approx((said == meant).all(axis=1).mean(), rel=1e-5)
    assert figures["accuracy"] != 1.0
    for i, one in enumerate(found.classes):
        assert one.n == meant[:, i].sum()
        assert one.recall.value == pytest.approx((said & meant)[:, i].sum() / meant[:, i].sum(), rel=1e-5)
        assert one.precision.value == pytest.approx((said & meant)[:, i].sum() / said[:, i].sum(), rel=1e-5)
    assert found.confusion == []


def test_windows_cut_out_for_themselves_get_the_answers_they_get_in_the_stream(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", HISTORY)
    found, inference = loaded(bundle)
    data = write(tmp_path / "rows.csv", HISTORY, inference, wrong=200)
    source = examples.read(data, inference, ["label"])
    some = examples.label_windows(source, inference, "label", ["label"], None)
    units = bootstrap.build_units(np.zeros(len(some)), None, None, 0)
    table = sensitivity.draw_sample(LabelledPredictor(inference), some, units)
    late = np.flatnonzero(some.starts >= inference.history_rows)
    whole = predictions.pair_with_truth(
        found.manifest, examples.predict(inference, source, some.starts), some.truth, None
    )[late]
    assert len(table.labelled) == len(late) == N - inference.history_rows > 0
    assert table.baseline[0] == metrics.primary_metric("classify", whole, units.subset(late))[0] < 1.0
    assert found.manifest.input.history_rows == 19


def test_an_embedding_is_judged_by_its_distance(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "b", VECTORS)
    _, inference = loaded(bundle)
    found = evaluated(bundle, write(tmp_path / "rows.csv", VECTORS, inference))
    figures = {m.metric: m.value for m in found.metrics}
    assert (figures["auc"], figures["precision"], figures["recall"]) == (1.0, 1.0, 1.0)
    assert [sum(row) for row in found.confusion] == list(found.data.counts.values())

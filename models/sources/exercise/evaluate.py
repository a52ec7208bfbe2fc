"""Print every figure of the model card from the committed files.

python evaluate.py            # as a table for people
python evaluate.py --json     # the same as one JSON document
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import calibration
import network
import numpy as np
import recordings
from ai_edge_litert.interpreter import Interpreter
from calibration import Predictions
from convert import MODEL, WEIGHTS
from numpy.typing import NDArray
from recordings import LABELS, Recordings
from train import CROSSVAL, LEAVE_ONE_OUT, SCORE_TABLE, SPEC

T_9 = 2.262  # Student's t, 97.5 %, 9 degrees of freedom: ten subjects


def run_int8(path: Path, scaled: NDArray[np.float32], batch: int) -> NDArray[np.float64]:
    """Scaled windows (n, 100, 6) through the int8 model, `batch` at a time: probabilities (n, 7)."""
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    entry, leave = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    (step, zero), (out_step, out_zero) = entry["quantization"], leave["quantization"]
    counts = np.clip(np.round(scaled / step) + zero, -128, 127).astype(np.int8)
    out = []
    for i in range(0, len(counts), batch):
        part = counts[i : i + batch]
        interpreter.resize_tensor_input(entry["index"], part.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry["index"], part)
        interpreter.invoke()
        out.append((interpreter.get_tensor(leave["index"]).astype(np.float64) - out_zero) * out_step)
    return np.concatenate(out)


def wilson(right: NDArray[np.bool_]) -> list[float]:
    """95 % interval of a proportion, as if windows were independent (Wilson 1927)."""
    n, p, z = len(right), right.mean(), 1.96
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))]


def bootstrap(right: NDArray[np.bool_], group: NDArray[Any], draws: int = 10_000) -> list[float]:
    """95 % interval from drawing whole groups (subjects, recordings) with replacement."""
    rng = np.random.default_rng(0)
    _, which = np.unique(group, return_inverse=True)
    hits, sizes = np.bincount(which, right), np.bincount(which)
    drawn = rng.integers(len(sizes), size=(draws, len(sizes)))
    return np.quantile(hits[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975]).tolist()


def share(right: NDArray[np.bool_], group: NDArray[Any]) -> dict[str, list[float]]:
    """Accuracy and number of windows of each group."""
    return {str(g): [float(right[group == g].mean()), int((group == g).sum())] for g in np.unique(group)}


def over_subjects(predictions: Predictions) -> dict[str, Any]:
    """Accuracy of each subject and, for ten of them, the t interval of the mean subject's."""
    each = share(predictions.right, predictions.subject)
    values = np.array([a for a, _ in each.values()])
    half = T_9 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) == 10 else np.nan
    return {
        "mean": float(values.mean()),
        "interval": [float(values.mean() - half), float(values.mean() + half)],
        "spread": float(values.std(ddof=1)),
        "windows": float(predictions.right.mean()),
        "subjects": each,
    }


def calibration_figures(predictions: Predictions, temperature: float) -> dict[str, float]:
    p = predictions.probability
    after = calibration.calibrated(p, temperature)
    return {
        "ece_before": calibration.calibration_error(p.max(1), predictions.right),
        "ece_after": calibration.calibration_error(after.max(1), predictions.right),
        "mean_score_before": float(p.max(1).mean()),
        "mean_score_after": float(after.max(1).mean()),
    }


def estimated(predictions: Predictions, temperature: float) -> float:
    """Accuracy as the score table expects it, without looking at a label."""
    table = json.loads(SCORE_TABLE.read_text())
    top = calibration.calibrated(predictions.probability, temperature).max(1)
    which = np.clip(np.searchsorted(table["edges"], top, side="right") - 1, 0, len(table["count"]) - 1)
    rate = np.array(table["correct"]) / np.array(table["count"])
    return float(rate[which].mean())


def held_out() -> tuple[Recordings, NDArray[np.float32], NDArray[np.int64], Predictions, Predictions]:
    """The held-out recordings, their scaled windows and sources, and the float and int8 predictions."""
    test = recordings.load(recordings.HELD_OUT)
    windows, source = test.windows()
    model = network.build(softmax=True)
    mean, std = network.load_weights(WEIGHTS, model)
    scaled = network.scale(windows, mean, std)
    label, subject = test.label[source].astype(int), test.subject[source].astype(int)
    float32 = Predictions(model.predict(scaled, verbose=0).astype(float), label, subject)
    return test, scaled, source, float32, Predictions(run_int8(MODEL, scaled, 64), label, subject)


def figures() -> dict[str, Any]:
    test, scaled, source, float32, int8 = held_out()
    temperature = tomllib.loads(SPEC.read_text())["output"]["temperature"]
    confusion = np.zeros((len(LABELS), len(LABELS)), int)
    np.add.at(confusion, (int8.label, int8.probability.argmax(1)), 1)
    return {
        "model": {"bytes": MODEL.stat().st_size, "parameters": network.build().count_params()},
        "held_out": {
            "windows": len(scaled),
            "recordings": len(test),
            "float": float(float32.right.mean()),
            "int8": float(int8.right.mean()),
            "same_answer": float((float32.probability.argmax(1) == int8.probability.argmax(1)).mean()),
            "wilson": wilson(int8.right),
            "by_recording": bootstrap(int8.right, source),
            "by_subject": bootstrap(int8.right, int8.subject),
            "subjects": share(int8.right, int8.subject),
            "sides": share(int8.right, test.side[source]),
            "exercises": share(int8.right, np.array(LABELS)[int8.label]),
            "confusion": confusion.tolist(),
            "batch_equals_single": bool((run_int8(MODEL, scaled, 1) == int8.probability).all()),
        },
        "leave_one_out": over_subjects(calibration.load(LEAVE_ONE_OUT)),
        "crossval": over_subjects(calibration.load(CROSSVAL)),
        "calibration": {
            "temperature": temperature,
            "held_out": calibration_figures(int8, temperature),
            "crossval": calibration_figures(in_int8(calibration.load(CROSSVAL)), temperature),
            "estimated_accuracy": estimated(int8, temperature),
        },
    }


def in_int8(predictions: Predictions) -> Predictions:
    return Predictions(calibration.as_int8(predictions.probability), predictions.label, predictions.subject)


def report(f: dict[str, Any]) -> None:
    def line(name: str, value: float, interval: list[float] | None = None, note: str = "") -> None:
        span = f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        print(f"  {name:<34}{value:.4f}{span}  {note}".rstrip())

    test, loo, cv, cal = f["held_out"], f["leave_one_out"], f["crossval"], f["calibration"]
    print(f"Model: {f['model']['parameters']:,} parameters, {f['model']['bytes']:,} bytes")
    print(f"Held-out subjects: {test['windows']} windows of {test['recordings']} recordings")
    line("float accuracy", test["float"])
    line("int8 accuracy", test["int8"], test["wilson"], "Wilson, as if windows were independent")
    line("", test["int8"], test["by_recording"], "bootstrap over recordings")
    line("", test["int8"], test["by_subject"], "bootstrap over the three subjects")
    line("int8 and float agree", test["same_answer"])
    print(f"  batch of 64 equals one by one     {test['batch_equals_single']}")
    for name in ("subjects", "sides", "exercises"):
        print(f"  by {name[:-1]}: " + ", ".join(f"{k} {a:.3f} ({n})" for k, (a, n) in test[name].items()))
    print("  confusion, a row per exercise done, a column per answer: " + " ".join(LABELS))
    for label, row in zip(LABELS, test["confusion"], strict=True):
        print(f"    {label:<5}" + "".join(f"{n:5}" for n in row))
    print("Leave one subject out, all ten, the same recipe (float)")
    line("mean over subjects", loo["mean"], loo["interval"], "t interval over subjects")
    line("standard deviation", loo["spread"])
    line("over windows", loo["windows"])
    print("  " + ", ".join(f"{k} {a:.3f}" for k, (a, _) in loo["subjects"].items()))
    print("Cross-validation on the seven training subjects (float)")
    line("mean over subjects", cv["mean"])
    line("over windows", cv["windows"])
    print(f"Calibration, temperature {cal['temperature']}")
    for name in ("held_out", "crossval"):
        c = cal[name]
        print(f"  {name:<10} ECE {c['ece_before']:.4f} before, {c['ece_after']:.4f} after", end="")
        print(f"; mean score {c['mean_score_before']:.4f} before, {c['mean_score_after']:.4f} after")
    line("held-out accuracy, estimated", cal["estimated_accuracy"], None, "score table, no labels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    found = figures()
    if as_json:
        print(json.dumps(found))
    else:
        report(found)


if __name__ == "__main__":
    main()

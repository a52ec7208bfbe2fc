"""Reference values from SciPy, scikit-learn, Evidently and NannyML, written to tests/kit/reference_values.json.

Nothing else needs these libraries, which take 2 GB; so the values are committed. To compute them again:

    python -m venv /tmp/reference
    /tmp/reference/bin/pip install "pandas<3" scipy scikit-learn statsmodels nannyml evidently
    NML_DISABLE_USAGE_LOGGING=1 /tmp/reference/bin/python -m scripts.reference_values

tests/ml/drift/test_reference_values.py compares our results and defines the tolerances. The inputs come from
scripts/kit/reference_data.py.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nannyml
import numpy as np
import pandas as pd
from evidently.legacy.calculations.stattests import jensenshannon as evidently_js
from evidently.legacy.calculations.stattests import psi as evidently_psi
from evidently.legacy.calculations.stattests import wasserstein_distance_norm as evidently_w1
from evidently.legacy.core import ColumnType
from nannyml.calibration import _calculate_expected_calibration_error, _get_bin_index_edges
from scipy import stats
from scipy.spatial import distance
from sklearn.metrics import brier_score_loss

from scripts.kit import reference_data as data

FILE = Path(__file__).parents[1] / "tests" / "kit" / "reference_values.json"
SEEDS = 20
LIBRARIES = ("scipy", "scikit-learn", "evidently", "nannyml", "numpy", "pandas")


def sizes() -> dict[str, Any]:
    reference, others = data.samples()
    edges = data.edges(reference)
    bins = data.binned(reference, edges)
    p = np.bincount(bins, minlength=data.BINS) / len(bins)
    sizes_by_name = {}
    for name, values in others.items():
        its = data.binned(values, edges)
        q = np.bincount(its, minlength=data.BINS) / len(its)
        # One category per bin, so that Evidently uses the same bins.
        pair = (pd.Series(bins).astype(str), pd.Series(its).astype(str), ColumnType.Categorical)
        sizes_by_name[name] = {
            "psi_evidently": evidently_psi._psi(*pair, 0.1)[0],
            "js_scipy": distance.jensenshannon(p, q, base=2),
            "js_evidently_base_e": evidently_js._jensenshannon(*pair, 0.1)[0],
            "ks_scipy_exact": stats.ks_2samp(reference, values).statistic,
            "w1_scipy": stats.wasserstein_distance(reference, values),
            "w1_evidently_sd": evidently_w1._wasserstein_distance_norm(
                pd.Series(reference), pd.Series(values), ColumnType.Numerical, 0.1
            )[0],
        }
    return sizes_by_name


def calibration() -> dict[str, Any]:
    few = data.answers(7, 1000)
    scores, truth = data.read_exercise("crossval")
    edges = _get_bin_index_edges(1000, 10)
    return {
        "ece_nannyml": _calculate_expected_calibration_error(few.right.astype(float), few.top, edges),
        "brier_top_sklearn": brier_score_loss(few.right, few.top),
        "brier_sklearn": brier_score_loss(truth, scores, labels=list(range(scores.shape[1])), scale_by_half=False),
    }


def cbpe(known: data.Answers, current: data.Answers) -> float:
    frames = [pd.DataFrame({"p": a.p, "y": a.named, "t": a.truth}) for a in (known, current)]
    return _cbpe(frames, "p", "classification_binary")


def cbpe_named(known: data.Answers, current: data.Answers) -> float:
    """Return NannyML's CBPE of the top scores as a binary problem, so that only calibration differs."""
    frames = [pd.DataFrame({"p": a.top, "y": 1, "t": a.right.astype(int)}) for a in (known, current)]
    return _cbpe(frames, "p", "classification_binary")


def cbpe_exercise() -> float:
    frames = []
    for name in ("crossval", "leave_one_out"):
        scores, truth = data.read_exercise(name)
        frame = pd.DataFrame({f"p{i}": column for i, column in enumerate(scores.T)})
        frames.append(frame.assign(y=[f"c{i}" for i in scores.argmax(1)], t=[f"c{i}" for i in truth]))
    return _cbpe(frames, {f"c{i}": f"p{i}" for i in range(7)}, "classification_multiclass")


def _cbpe(frames: list[Any], proba: Any, kind: str) -> float:
    reference, analysis = frames
    how = {"y_pred": "y", "y_true": "t", "y_pred_proba": proba, "metrics": ["accuracy"], "problem_type": kind}
    estimator = nannyml.CBPE(**how, chunk_number=1)
    estimator.fit(pd.concat([reference, reference.iloc[:0]]))
    frame = estimator.estimate(analysis.drop(columns="t")).filter(period="analysis").to_df()
    return float(frame[("accuracy", "value")].iloc[0])


def main() -> None:
    many = [data.answers(seed, 40_000) for seed in range(3)]
    few = [data.answers(seed, 1620) for seed in range(SEEDS)]
    later = [data.less_sure(seed) for seed in range(SEEDS)]
    document = {
        "versions": {name: version(name) for name in LIBRARIES},
        "sizes": sizes(),
        "calibration": calibration(),
        "cbpe": {
            "40000": [cbpe(a, b) for a, b in zip(many, later, strict=False)],
            "40000_named": [cbpe_named(a, b) for a, b in zip(many, later, strict=False)],
            "1620": [cbpe(a, b) for a, b in zip(few, later, strict=True)],
            "1620_named": [cbpe_named(a, b) for a, b in zip(few, later, strict=True)],
            "exercise": cbpe_exercise(),
        },
    }
    FILE.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

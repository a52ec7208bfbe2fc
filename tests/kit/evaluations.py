"""Evaluation recordings: as shipped, or with a planted defect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.indices import repeat
from outstation.ml.model.bundle import builtin
from outstation.ml.model.bundle import bundle as bundles
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.inference import Inference
from outstation.workbench.evaluation import evaluate
from outstation.workbench.evaluation.context import EvaluationRequest
from outstation.workbench.evaluation.document import CheckResult, Evaluation
from scripts.kit.bundles import npz


class Recorded(msgspec.Struct, frozen=True):
    """`rows` (n, 6) of all recordings in sequence; each column in `each` has one entry per recording."""

    rows: NDArray[np.float32]
    sizes: NDArray[np.int64]
    each: dict[str, NDArray[Any]]
    fields: tuple[str, ...]
    labels: tuple[str, ...]

    def pick(self, which: NDArray[np.bool_]) -> Recorded:
        each = {name: column[which] for name, column in self.each.items()}
        return replace(self, rows=self.rows[repeat(which, self.sizes)], sizes=self.sizes[which], each=each)

    def also(self, other: Recorded) -> Recorded:
        each = {name: np.concatenate([column, other.each[name]]) for name, column in self.each.items()}
        rows, sizes = np.concatenate([self.rows, other.rows]), np.concatenate([self.sizes, other.sizes])
        return replace(self, rows=rows, sizes=sizes, each=each)

    def with_columns(self, **columns: Any) -> Recorded:
        """Return the recordings with columns added or replaced."""
        return replace(self, each=self.each | {name: np.asarray(column) for name, column in columns.items()})

    def per_row(self, name: str) -> NDArray[Any]:
        return repeat(self.each[name], self.sizes)

    def npz(self, path: Path) -> Path:
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        arrays = {"rows": self.rows, "starts": starts, "rate": 50.0, "fields": self.fields, "labels": self.labels}
        path.write_bytes(npz(**arrays, **self.each))
        return path

    def csv(self, path: Path, *columns: str, begin: float = 1_764_000_000.0) -> Path:
        """Return a CSV file with `t`, the label as text, and other columns; recordings are a minute apart."""
        pause = repeat(np.arange(len(self.sizes)), self.sizes) * 60.0
        t = begin + np.arange(len(self.rows)) / 50 + pause
        labels = np.array(self.labels)[self.per_row("label")]
        more = [self.per_row(name).astype(str) for name in columns]
        head = ",".join(["t", *self.fields, "label", *columns])
        cells = [[f"{x:.2f}" for x in t], *([f"{x:.5f}" for x in column] for column in self.rows.T), labels, *more]
        path.write_text("\n".join([head, *map(",".join, zip(*cells, strict=True))]) + "\n", encoding="utf-8")
        return path


def recorded(file: Path | None = None) -> Recorded:
    """Return the shipped held-out recordings, or others of that shape."""
    with np.load(file or builtin.recordings_dir() / "exercise.npz", allow_pickle=False) as z:
        each = {name: z[name] for name in ("label", "subject", "side")}
        names = (tuple(str(name) for name in z[key]) for key in ("fields", "labels"))
        return Recorded(z["rows"], np.diff(z["starts"]), each, *names)


def loaded(bundle: Path) -> tuple[bundles.Bundle, Inference]:
    content = bundles.read(bundle, None)
    return content, Inference(content.manifest, runtime.load_model(content.manifest, content.model_bytes))


def evaluated(bundle: Path, data: Path, **options: Any) -> Evaluation:
    """Evaluate without a probe and without timing."""
    content, run = loaded(bundle)
    request = EvaluationRequest(data=data, **{"latency": False, **options})
    return evaluate.evaluate(content, run, "not looked at", request, lambda _: None)


def exercise(data: Path, **options: Any) -> Evaluation:
    return evaluated(builtin.bundles_dir() / "exercise", data, **options)


def check_result(evaluation: Evaluation, check: str) -> CheckResult:
    [check_result] = [f for f in (*evaluation.leakage, *evaluation.label_checks) if f.check == check]
    return check_result

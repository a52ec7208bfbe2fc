"""Sites whose readings are forged: models, honest windows, forged ones, and the drift monitor that sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
import msgspec
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from outstation.ml.drift import DriftMonitor, DriftState, MonitorSettings, Reference
from outstation.ml.drift.baseline import window_statistics
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.bundle.manifest import Manifest, ModelInput, ModelOutput, WindowSpec
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference, InferenceResult
from outstation.protocol.alerts.alert import Alert
from outstation.workbench.evaluation.adversarial import noise, patches
from outstation.workbench.evaluation.adversarial.target import SensorLimits, Target
from scripts.kit.bundles import THIRD_PARTY

LEARN = 60  # drift windows that are offered at once while a site learns
MOST_LEARNED = 5  # times as many
POOL = 400  # windows that forged ones are made of
STEP_US = 20_000
BOUNDS = (0.1, 0.25, 0.5, 1.0)  # of the noise, in sd
PATCHES = (0.01, 0.1)  # shares of a window's values
_SEARCH_STEPS, _MIN_FLIPPED = 24, 10

Floats = NDArray[np.float32]
Draw = Callable[[int, Generator], Floats]


class Subject(msgspec.Struct, frozen=True):
    """Model with its shipped reference, and a source of honest windows (n, rows, F)."""

    name: str
    inference: Inference
    reference: Reference
    limits: SensorLimits
    draw: Draw

    def run(self, windows: Floats) -> InferenceResult:
        count, rows, fields = windows.shape
        cut = WindowCut(np.arange(count) * rows, count * rows)
        return self.inference.run_windows(windows.reshape(-1, fields), np.arange(count * rows), cut, with_outputs=True)

    def predict(self, windows: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Return class and score (n, 1), as a device passes them to its drift monitor."""
        scored = self.run(windows).scores
        score = scored.value if scored.score is None else scored.score
        assert score is not None
        label = np.zeros(len(windows), np.int64) if scored.label is None else scored.label
        return label, score[:, None].astype(np.float32)


class Forgery(msgspec.Struct, frozen=True):
    """Attack with its forged windows (n, rows, F), which are used in turn."""

    name: str
    windows: Floats


def load_shipped(name: str) -> Subject:
    """Return a shipped model; windows begin anywhere in its recordings, of machines with nothing wrong."""
    content = bundle.read(builtin.bundles_dir() / name, builtin.publisher_keys())
    inference = Inference(content.manifest, runtime.load_model(content.manifest, content.model_bytes))
    with np.load(builtin.recordings_dir() / f"{name}.npz", allow_pickle=False) as z:
        rows = z["rows"].astype(np.float32) * (z["scale"] if "scale" in z.files else np.float32(1))
        spans = np.stack([z["starts"][:-1], z["starts"][1:]], axis=1)
        if content.manifest.kind == "anomaly":
            spans = spans[z["label"] == 0]
    length = inference.rows

    def draw(count: int, rng: Generator) -> Floats:
        chosen = spans[rng.integers(0, len(spans), count)]
        starts = chosen[:, 0] + (rng.random(count) * (chosen[:, 1] - chosen[:, 0] - length)).astype(np.int64)
        return np.asarray(rows[starts[:, None] + np.arange(length)])

    reference = Reference.from_json(content.files["reference.json"])
    return Subject(name, inference, reference, SensorLimits.from_bundle(content, rows), draw)


def load_keywords() -> Subject:
    """Return the keyword model of MLPerf Tiny, on made-up words: four courses through three points, with slow noise.

    Raises ClickException without the model.
    """
    file = THIRD_PARTY / "mlperf_kws_int8.tflite"
    if not file.exists():
        raise click.ClickException(f"no {file}: set OUTSTATION_THIRDPARTY_MODELS")
    rows, fields, labels = 49, 10, [f"word{i}" for i in range(12)]
    names = [f"f{i}" for i in range(fields)]
    given, out = ModelInput(fields=names, window=WindowSpec(rows, rows)), ModelOutput(labels=labels)
    manifest = Manifest(
        format=1, name="keywords", version="1", created="", kind="classify", input=given, output=out, files={}
    )
    inference = Inference(manifest, runtime.load_model(manifest, file.read_bytes()))
    low, high = inference.model.input_range
    centre, scale = (low + high) / 2, (high - low) / 12
    points = np.random.default_rng(12).normal(0, 1.5, (4, 3, fields)).astype(np.float32)
    at = np.linspace(0, 2, rows)
    below = np.minimum(at.astype(np.int64), 1)
    share = (at - below)[:, None].astype(np.float32)
    courses = (1 - share) * points[:, below] + share * points[:, below + 1]

    def draw(count: int, rng: Generator) -> Floats:
        noisy = rng.normal(0, 0.4, (count, rows, fields)).astype(np.float32)
        for row in range(1, rows):
            noisy[:, row] = 0.9 * noisy[:, row - 1] + np.sqrt(1 - 0.9**2) * noisy[:, row]
        return np.asarray(centre + scale * (courses[rng.integers(0, 4, count)] + noisy), np.float32)

    windows = draw(LEARN * manifest.drift.window, np.random.default_rng(99))
    shipped = Subject("keywords", inference, None, None, draw)  # type: ignore[arg-type]
    label, score = shipped.predict(windows)
    reference = build_reference(
        windows.reshape(-1, fields), np.arange(len(windows)) * rows, rows, label, score, manifest.drift.window,
        fields=tuple(names), labels=tuple(labels),
    )  # fmt: skip
    content = Bundle(manifest, "", {"reference.json": reference.to_json()}, "")
    return Subject("keywords", inference, reference, SensorLimits.from_bundle(content, windows[0]), draw)


def forge(subject: Subject, seed: int) -> Iterator[Forgery]:
    """Yield forged windows of each attack."""
    rng = np.random.default_rng([seed, 1])
    windows, field = subject.draw(POOL, rng), int(np.argmax(subject.limits.movable))
    target = Target(
        subject.inference, subject.limits, windows, np.zeros((POOL, windows.shape[1]), np.int64), None, tolerance=0.0
    )
    index, allowed = np.arange(POOL), np.broadcast_to(subject.limits.movable, (POOL, windows.shape[2]))
    for bound in BOUNDS:
        flipped, changes = noise.search_bound(target, index, allowed, np.float32(bound), _SEARCH_STEPS, rng)
        if flipped.sum() >= _MIN_FLIPPED:
            yield Forgery(f"noise {bound:g} sd", (windows + changes)[flipped])
    yield Forgery("one window replayed", windows[:1])
    yield Forgery("one class replayed", windows[target.codes == target.codes.max()])
    for name, value in (("mean", subject.limits.mean), ("highest", subject.limits.high)):
        yield Forgery(f"spoof {name}", _with_field(windows, field, value[field]))
    yield Forgery("spoof other window", _with_field(windows, field, windows[rng.permutation(POOL)][:, :, field]))
    for share in PATCHES:
        rows, columns = (max(1, round(size * share**0.5)) for size in windows.shape[1:])
        patch = patches.search_patch(target, index[: POOL // 4], rows, columns, rng)
        yield Forgery(f"trigger {share:.0%}", patch.apply(windows))


def _with_field(windows: Floats, field: int, values: Floats | np.float32) -> Floats:
    changed = windows.copy()
    changed[:, :, field] = values
    return changed


class Device:
    """Drift monitor of a device that runs the subject's model."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        manifest = subject.inference.manifest
        self.window = manifest.drift.window
        self.monitor = DriftMonitor(
            MonitorSettings(subject.reference, labels=manifest.output.labels, window=self.window)
        )

    def learn(self, seed: int) -> DriftState:
        rng, state = np.random.default_rng([seed, 2]), self.monitor.start()
        for _ in range(MOST_LEARNED):
            state, _ = self.watch(state, self.subject.draw(LEARN * self.window, rng))
            if state.site_reference is not None:
                return state
        raise click.ClickException(f"{self.subject.name}: the site never learned")

    def watch(self, state: DriftState, windows: Floats) -> tuple[DriftState, list[tuple[int, Alert]]]:
        """Return the state after the windows (n, rows, F), and each raised alert with its drift window, from 1 on."""
        count, rows, fields = windows.shape
        label, score = self.subject.predict(windows)
        first, begin = max(0, state.last_counted_row) + 1, state.index
        t = (first + np.arange(count * rows)) * STEP_US
        after, results = self.monitor.process_batch(
            state, windows.reshape(-1, fields), np.arange(count) * rows, rows, label, score,
            rows=(first, first + count * rows - 1), t=t,
        )  # fmt: skip
        raised = [(r.index - begin + 1, alert) for r in results for alert in r.alerts if alert.state == "raised"]
        return after, raised


class MahalanobisTest:
    """Test of single model windows, to compare with: distance of their statistics from the class that was named.

    Means, covariance and the limit, which one honest window in 1000 exceeds, are learned from honest windows.
    """

    def __init__(self, subject: Subject, windows: Floats, false_alarms: float = 1e-3) -> None:
        self._subject = subject
        values, labels = self._measure(windows)
        count = max(1, len(subject.inference.manifest.output.labels))
        rare = np.bincount(labels, minlength=count) < 16
        own = [slice(None) if rare[label] else labels == label for label in range(count)]
        self._mean = np.array([values[which].mean(0) for which in own])
        self._sd = np.array([values[which].std(0) + 1e-3 for which in own])
        z = self._standardize(values, labels)
        self._inverse = np.linalg.inv(np.cov(z.T) + 0.05 * np.eye(z.shape[1]))
        self._limit = np.quantile(self._distance(values, labels), 1 - false_alarms)

    def flagged_share(self, windows: Floats) -> float:
        return float((self._distance(*self._measure(windows)) > self._limit).mean())

    def _measure(self, windows: Floats) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        count, rows, fields = windows.shape
        flat = np.ascontiguousarray(windows.reshape(-1, fields))
        floor = self._subject.reference.floor
        statistics = window_statistics.compute_statistics(flat, np.arange(count) * rows, rows, floor)
        return np.nan_to_num(np.asarray(statistics.values, np.float64)), self._subject.predict(windows)[0]

    def _standardize(self, values: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.clip((values - self._mean[labels]) / self._sd[labels], -10, 10))

    def _distance(self, values: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        z = self._standardize(values, labels)
        return np.asarray(np.einsum("ij,jk,ik->i", z, self._inverse, z))

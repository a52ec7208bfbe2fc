"""Command `outstation drift`: drift of a task, from the device's own store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from outstation.device.bootstrap import device
from outstation.device.bundles import history
from outstation.device.config import Config
from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.arrays import Ints
from outstation.foundation.cli.options import config_options, dark_option, plot_option
from outstation.foundation.cli.output import echo, emit, print_table, require_plot_format
from outstation.foundation.errors import BadBundle
from outstation.foundation.render import axes
from outstation.foundation.render.drift_model import DriftPlot
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.detectors.detector import JOINT, SCORE
from outstation.ml.drift.reporting import parsed_message
from outstation.ml.drift.reporting.parsed_message import ExpectedPerformance
from outstation.ml.drift.reporting.timeline import EARLIEST_US, Timeline
from outstation.ml.drift.sequential.test_suite import CusumLimits
from outstation.ml.model.bundle import bundle
from outstation.ml.plots import drift_plot
from outstation.ml.plots.drift_plot import FieldScale

MAX_WINDOWS = 5000


@click.command(epilog="Example: outstation drift exercise --plot drift.svg")
@click.argument("task")
@plot_option
@dark_option
@config_options
def drift(task: str, plot: Path | None, dark: bool, config_file: str | None, as_json: bool) -> None:
    """Show how far TASK's readings moved from its site reference, by the drift messages stored here."""
    require_plot_format(plot)
    _, conf = device.load_config(config_file, task)
    with device.open_store_read_only(conf) as store:
        task_drift = _TaskDrift(conf, store, task)
    document = task_drift.to_dict()
    if plot is not None:
        drift_plot.save(task_drift.build_plot(), plot, dark=dark)
        document["plot"] = str(plot)
    emit(document, as_json, lambda: _print(document))


class _TaskDrift:
    def __init__(self, conf: Config, store: Store, task: str) -> None:
        self.task, self.device = task, conf.device.id
        self.bundle = bundle.read(history.locate_bundle(conf, store, task), None)
        data = self.bundle.files.get("reference.json")
        self.shipped = None if data is None else Reference.from_json(data)
        self.site = _load_site(store, task, self.shipped)
        # Windows from before the clock was set would stretch the axis over decades: they count only if there are no
        # others.
        line, undated, unreadable = Timeline(), Timeline(), 0
        for message in store.recent_messages("drift", task, MAX_WINDOWS):
            if not message.intact:
                unreadable += 1
                continue
            try:
                body = json.loads(message.payload)
                t = (clock.parse_rfc3339(body["window"]["from"]), clock.parse_rfc3339(body["window"]["to"]))
                if self.shipped is not None and body["reference"]["shipped"] == self.shipped.digest:
                    (line if t[0] >= EARLIEST_US else undated).add(parsed_message.from_message(body, t))
            except (ValueError, KeyError, TypeError):
                unreadable += 1
        self.timeline, self.unreadable_count = (line if line.points else undated), unreadable
        self.open_alerts = [alert for alert in store.open_alerts(task) if alert["alert"] in ("drift", "fault")]

    def reference_counts(self) -> dict[str, Ints]:
        reference = self.site or self.shipped
        return {} if reference is None else dict(zip(reference.fields, reference.counts, strict=True))

    def limits(self) -> dict[str, float]:
        """Return the CUSUM limit of each field, of the score and of the joint statistics."""
        if self.site is None:
            return {}
        limits = CusumLimits.from_reference(self.site).limit.tolist()
        subjects, task = self.site.layout.subjects.tolist(), self.site.task
        # Messages have no sums of the output.
        numbers = {name: i for i, name in enumerate(self.site.fields)} | {
            name: task.subject(name) for name in (SCORE, JOINT)
        }
        return {name: limits[subjects.index(number)] for name, number in numbers.items() if number in subjects}

    def to_dict(self) -> dict[str, Any]:
        last = self.timeline.points[-1] if self.timeline.points else None
        return {
            "device": self.device,
            "task": self.task,
            "reference": {
                "shipped": self.shipped.digest if self.shipped else None,
                "site": self.site.digest if self.site else None,
            },
            "windows": self.timeline.windows,
            "unreadable": self.unreadable_count,
            "from": clock.to_rfc3339(self.timeline.points[0].t[0]) if last else None,
            "to": clock.to_rfc3339(last.t[1]) if last else None,
            "subjects": [
                self._subject_to_dict(name, report) for name, report in (last.subjects.items() if last else ())
            ],
            "estimate": _estimate_to_dict(last.expected) if last and last.expected else None,
            "outputs": {
                name: {"estimate": _estimate_to_dict(known)}
                for name, known in (last.further_expected.items() if last else ())
            },
            "alerts": [
                {"id": a["id"], "alert": a["alert"], "summary": a["summary"], "time": a["time"]}
                for a in self.open_alerts
            ],
        }

    def _subject_to_dict(self, name: str, reported_subject: parsed_message.SubjectReport) -> dict[str, Any]:
        now, usual = self.timeline.latest(name), self.reference_counts().get(name)
        limit = self.limits().get(name, reported_subject.limit)
        since = [begin for begin, _, is_open in self.timeline.spells(name, "drift") if is_open]
        return {
            "subject": name,
            "state": reported_subject.state,
            "cusum": {"mean": reported_subject.mean, "spread": reported_subject.spread, "limit": limit},
            "since": clock.to_rfc3339(since[0]) if since else None,
            "sizes": parsed_message.effect_sizes(usual, now[1].counts)
            if now is not None and usual is not None
            else None,
        }

    def build_plot(self) -> DriftPlot:
        scale = FieldScale() if self.shipped is None else FieldScale.from_bundle(self.bundle, self.shipped)
        rows, estimates = drift_plot.plot_device(self.timeline, scale, self.reference_counts(), self.limits())
        manifest = self.bundle.manifest
        parts = [f"{manifest.name} {manifest.version}", f"{self.timeline.windows} drift windows"]
        empty = ""
        if self.timeline.points:
            first, last = self.timeline.points[0].t[0], self.timeline.points[-1].t[1]
            parts.append(f"{axes.format_time(first)} to {axes.format_time(last)} UTC")
        else:
            empty = "No drift window yet: one closes after the number of model windows in the bundle, usually 20."
            if self.shipped is None:
                empty = "This bundle has no drift reference: drift is not tested."
        return DriftPlot(
            title=f"Drift of {self.task} at {self.device}",
            subtitle=" · ".join(parts),
            alerts=[(alert["alert"], alert["summary"]) for alert in self.open_alerts],
            series_names=["mean"],
            dashed_label="spread",
            reference_label="this site's reference" if self.site else "the bundle's reference",
            rows=rows,
            estimates=estimates,
            empty_message=empty,
        )


def _estimate_to_dict(expected: ExpectedPerformance) -> dict[str, Any]:
    """Return the accuracy or the mean absolute error to expect, with its interval."""
    outside = {"outside": True} if expected.is_contradicted else {}
    return {expected.name: expected.value, "low": expected.low, "high": expected.high} | outside


def _load_site(store: Store, task: str, shipped: Reference | None) -> Reference | None:
    """Return the site reference if it has this bundle's bins."""
    stored = store.load_state(task, task_keys.SITE_REFERENCE)
    if stored is None or shipped is None:
        return None
    try:
        site = Reference.from_json(stored)
    except BadBundle:
        return None
    return site if (site.fields, site.edges.tobytes()) == (shipped.fields, shipped.edges.tobytes()) else None


def _print(document: dict[str, Any]) -> None:
    unreadable = f", {document['unreadable']} more that cannot be read" if document["unreadable"] else ""
    echo(f"{document['task']}: {document['windows']} drift windows stored here{unreadable}")
    cells = []
    for subject in document["subjects"]:
        cusum, sizes = subject["cusum"], subject["sizes"] or {}
        limit = f" of {cusum['limit']:.1f}" if cusum["limit"] else ""
        sums = [f"{cusum[name]:.1f}{limit}" for name in ("mean", "spread")]
        divergences = [f"{sizes[name]:.2f}" if name in sizes else "-" for name in ("js", "ks")]
        cells.append([subject["subject"], subject["state"], *sums, *divergences])
    print_table(["", "state", "mean CUSUM", "spread CUSUM", "JS", "KS"], cells, "No drift window yet.")
    if document["estimate"]:
        echo(_format_estimate(document["estimate"]))
    for name, output in document["outputs"].items():
        echo(f"{name}: {_format_estimate(output['estimate'])}")
    for alert in document["alerts"]:
        echo(alert["summary"])
    if "plot" in document:
        echo(f"drawn: {document['plot']}")


def _format_estimate(estimate: dict[str, Any]) -> str:
    if "mae" in estimate:
        name, noun, form = "mae", "mean absolute error", ".4g"
    else:
        name, noun, form = "accuracy", "accuracy", ".2f"
    value, low, high = (format(estimate[part], form) for part in (name, "low", "high"))
    contradicted = "; labels contradict it" if "outside" in estimate else ""
    return f"expected {noun} without labels: {value} ({low} to {high}){contradicted}"

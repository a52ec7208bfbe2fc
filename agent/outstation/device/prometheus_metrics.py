"""Device metrics in Prometheus' text format, for the textfile collector of node_exporter.

Written by a short process from the store, never by the daemon. The names are those of the fleet's metrics where both
know the number; `fleet` and `device` are labels of each sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from outstation.foundation import clock

_SEVERITIES = ("critical", "warning", "info")
_QUALITIES = ("synced", "restored", "unsynced")
_LABEL_KINDS = ("truth", "verdicts", "model")
_NO_QUALITY: dict[str, Any] = {"metrics": []}
_QUALITY_HELP = {
    "value": "Metric of the newest labelled results.",
    "low": "Lower bound of the metric's 95 % interval.",
    "high": "Upper bound of the metric's 95 % interval.",
}
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Family(msgspec.Struct, frozen=True):
    """Samples of one metric, each labels and a value; a value of None is left out."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    samples: list[tuple[dict[str, str], float | int | None]]


def render(status: Mapping[str, Any], now_us: int) -> str:
    """Return the metrics of a status document (see `outstation.device.status`), written at `now_us`."""
    own = {"fleet": str(status["fleet"]), "device": str(status["device"])}
    lines = []
    for family in (*_build_device_families(status, now_us), *_build_task_families(status)):
        samples = [({**own, **labels}, value) for labels, value in family.samples if value is not None]
        if samples:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.type}"]
            lines += [f"{family.name}{{{_format_labels(labels)}}} {value}" for labels, value in samples]
    return "\n".join([*lines, ""])


def _build_device_families(status: Mapping[str, Any], now_us: int) -> Iterator[Family]:
    def single(name: str, help_text: str, value: float | None, kind: Literal["gauge", "counter"] = "gauge") -> Family:
        return Family(f"outstation_device_{name}", kind, help_text, [({}, value)])

    store, outbox, reading = status["store"], status["outbox"], status["clock"]
    hours = store["hours"]
    yield single("metrics_written_timestamp_seconds", "Time of these numbers.", now_us / 1e6)
    yield single("outbox_messages", "Messages that wait for the collector.", outbox["waiting"])
    yield single("messages_total", "Messages that the device wrote.", outbox["last"], "counter")
    yield single("storage_used_bytes", "Size of the store.", store["bytes"])
    yield single("storage_limit_bytes", "Limit of the store.", store["max"])
    yield single(
        "storage_left_seconds", "Time until data is evicted, at the present rate.", hours and float(hours) * 3600
    )
    yield single("temperature_celsius", "Temperature of the hottest sensor.", status["throttle"].get("temperature"))
    yield single("rejected_rows_total", "Rows that intake rejected.", status["rejected"], "counter")
    yield single("refused_connections_total", "Connections refused.", status["refused_connections"], "counter")
    yield single("failed_files_total", "Files that intake could not read.", status["failed_files"], "counter")
    if (metered := status["metered"]) is not None:
        yield single("metered_bytes", "Bytes of the metered connection within 24 h.", metered["used"])
        yield single("metered_limit_bytes", "Budget of the metered connection.", metered["budget"])
        yield single("expired_messages_total", "Messages given up because they waited too long.", metered["expired"],
                     "counter")  # fmt: skip
    yield Family(
        "outstation_device_clock_state", "gauge", "1 for the quality of the clock.",
        [({"state": quality}, int(quality == reading["quality"])) for quality in _QUALITIES],
    )  # fmt: skip
    streams = status["streams"]
    yield Family(
        "outstation_stream_accepted_rows_total", "counter", "Rows that intake accepted.",
        [({"stream": stream["stream"]}, stream["rows"]) for stream in streams],
    )  # fmt: skip
    yield Family(
        "outstation_stream_last_row_timestamp_seconds", "gauge", "Time of the newest row.",
        [({"stream": stream["stream"]}, clock.parse_rfc3339(stream["last"]["time"]) / 1e6) for stream in streams
         if stream["last"] is not None],
    )  # fmt: skip


def _build_task_families(status: Mapping[str, Any]) -> Iterator[Family]:
    tasks: list[Mapping[str, Any]] = status["tasks"]
    outputs = [*_list_outputs(tasks)]

    def each(name: str, help_text: str, key: str, kind: Literal["gauge", "counter"] = "gauge") -> Family:
        return Family(f"outstation_task_{name}", kind, help_text, [({"task": t["task"]}, t[key]) for t in tasks])

    yield each("backlog_rows", "Rows that the task has not consumed.", "backlog")
    yield each("consumed_rows_total", "Rows that the task consumed.", "row", "counter")
    yield each("windows_total", "Model windows that the task answered.", "windows", "counter")
    yield Family(
        "outstation_task_labels", "gauge", "Stored labels: ground truth, verdicts, or the model's own answers.",
        [({**names, "kind": kind}, output["labels"][kind]) for names, output in outputs
         for kind in _LABEL_KINDS],
    )  # fmt: skip
    measured = [({**names, "metric": metric["metric"]}, metric) for names, output in outputs
                for metric in (output["quality"] or _NO_QUALITY)["metrics"] if not metric.get("slice")]  # fmt: skip
    for suffix, member in (("", "value"), ("_low", "low"), ("_high", "high")):
        samples = [(names, metric[member]) for names, metric in measured]
        yield Family(f"outstation_task_quality{suffix}", "gauge", _QUALITY_HELP[member], samples)
    yield Family(
        "outstation_task_alerts_open", "gauge", "Open alerts about the task's data, results and model.",
        [({"task": task["task"], "severity": severity}, count) for task in tasks
         for severity, count in _count_severities(task["open"])],
    )  # fmt: skip


def _list_outputs(tasks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[dict[str, str], Mapping[str, Any]]]:
    """Yield the labels of each output's samples, and what the status document says about it."""
    for task in tasks:
        yield {"task": task["task"]}, task
        for name, output in task["outputs"].items():
            yield {"task": task["task"], "output": name}, output


def _count_severities(alerts: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    severities = [alert.get("severity") for alert in alerts]
    return [(severity, severities.count(severity)) for severity in _SEVERITIES]


def _format_labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())

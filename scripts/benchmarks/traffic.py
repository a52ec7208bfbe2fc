"""Network traffic of a thousand results, compared with one MQTT message per result."""

from __future__ import annotations

import json
import math

import msgspec

from outstation.device.intake.sources.recordings import Playlist
from outstation.device.uplink.mqtt_sink import packet_size
from outstation.ml.datasets.recordings import load
from outstation.protocol.wire.messages import ResultColumns
from outstation.workbench.simulate.scenario import SCENARIOS
from scripts.benchmarks import Result, benchmark, device_task

RESULTS = 1000
_JITTER_US = 2_000
_COLUMNS = ("row", "t", "label", "score")
# TCP over IPv4 with timestamps: header bytes of a segment, maximum payload of a segment, and bytes of a PUBACK.
_HEADERS, _SEGMENT, _PUBACK = 52, 1448, 4


@benchmark("traffic", quick=True)
def traffic_of_results() -> list[Result]:
    """Measure the exercise model on one person's recordings: whole packets both ways, acknowledgements included."""
    recorded = load(SCENARIOS["exercise"].file)
    rows = recorded.rows[Playlist(recorded, int(recorded.subject[0]), 0).source_rows(RESULTS * 100)]
    return [*_compare(rows, 0, "traffic", 0.06), *_compare(rows, _JITTER_US, "traffic, jittered times", 0.075)]


def _compare(rows: device_task.Floats, jitter_us: int, name: str, target: float) -> list[Result]:
    with device_task.device_with_task([name for name, _ in SCENARIOS["exercise"].fields], "exercise") as device:
        device.fill(rows, jitter_us)
        device.work_off()
        sent = [message for message in device.store.unacknowledged_messages(0, 10_000) if "/results/" in message.topic]
        ours = []
        for device.author.compress in (False, True):
            ours.append(sum(_bytes_on_wire(packet_size(device.author.to_outgoing(message))) for message in sent))
        plain = sum(
            _bytes_on_wire(size)
            for message in sent
            for size in _sizes_of_single_results(message.payload, message.topic)
        )
    note = f"{len(sent)} signed messages; reference: unsigned JSON for each; both with TCP headers and PUBACK"
    if jitter_us:
        note = f"each time up to {jitter_us // 1000} of {device.step_us // 1000} ms late; {note}"
    notes = {name: note, f"{name}, compressed": f"with `[broker] compress = true`; {note}"}
    return [
        Result(called, size, plain, "bytes", target, notes[called], less=True)
        for called, size in zip(notes, ours, strict=True)
    ]


def _sizes_of_single_results(payload: bytes, topic: str) -> list[int]:
    """Return the bytes of one PUBLISH per result of a message, each with the shortest equivalent JSON."""
    body = json.loads(payload)
    head = {"device": body["device"], "task": body["task"], "model": body["model"]["version"]}
    columns = msgspec.convert(body["columns"], ResultColumns)
    expanded = (columns.expand_rows(), columns.expand_times(), columns.expand_labels() or [], columns.score or [])
    rows = zip(*expanded, strict=True)
    plain = [json.dumps(head | dict(zip(_COLUMNS, row, strict=True)), separators=(",", ":")) for row in rows]
    return [len(text) + len(topic) + 7 for text in plain]


def _bytes_on_wire(size: int) -> int:
    """Return the bytes on the wire of a PUBLISH of `size` bytes and its acknowledgement."""
    return size + (math.ceil(size / _SEGMENT) + 1) * _HEADERS + _PUBACK

"""Check of a retraining set for poisoning: its labelled windows, with the devices and people that labels come from."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_high, median_low

import numpy as np

from outstation.fleet.dataset.gather import Gathered, Recording
from outstation.fleet.dataset.sample_labels import RowLabel, parse_numbers
from outstation.ml.poisoning.inspect import PoisoningReport, inspect, not_checked
from outstation.ml.poisoning.labelled_windows import LabelledWindows

# The collector does not know the length of model windows; a longer part of a sample is cut.
_MAX_WINDOW_ROWS = 256


_STATES = ("warning", "passed", "not checked")


def check(gathered: Gathered, output: str = "") -> PoisoningReport:
    """Inspect the windows that end at rows with a label of `output`; a window's name is device/log/row.

    If devices leave two lengths of windows open, both are inspected: else one of two devices could choose the length.
    """
    reports = [_check(gathered, output, rows) for rows in _estimate_window_rows(gathered.recordings)]
    return min(reports, key=lambda report: _STATES.index(report.state))


def _check(gathered: Gathered, output: str, window_rows: int) -> PoisoningReport:
    last: list[int] = []
    members: list[tuple[Recording, RowLabel]] = []
    offset = 0
    for recording in gathered.recordings:
        for label in recording.get_output(output).labels:
            place = label.row - recording.first
            if label.label is not None and place + 1 >= window_rows:
                last.append(offset + place)
                members.append((recording, label))
        offset += len(recording.t)
    if not members:
        return not_checked(0, 0, "no labelled windows")
    labels, code = np.unique([label.label or "" for _, label in members], return_inverse=True)
    if parse_numbers(labels.tolist()) is not None:
        return not_checked(len(members), 0, "the labels are numbers, and the checks take classes")
    return inspect(
        LabelledWindows(
            rows=np.concatenate([recording.values.astype(np.float32) for recording in gathered.recordings]),
            last=np.array(last, np.int64),
            window_rows=window_rows,
            fields=gathered.fields,
            label=code.astype(np.int64),
            labels=labels.tolist(),
            names=[f"{recording.device}/{recording.log}/{label.row}" for recording, label in members],
            providers={
                "device": np.array([recording.device for recording, _ in members]),
                "labeller": np.array(["+".join(filter(None, label.by)) or "unknown" for _, label in members]),
            },
        )
    )


def _estimate_window_rows(recordings: Sequence[Recording]) -> list[int]:
    """Return the rows that every sample has up to its result, longest first: a sample holds the result's whole window.

    The median over the devices counts, since one device can send shorter samples than its model's windows. An even
    number of devices can have two.
    """
    shortest: dict[str, int] = {}
    for recording in recordings:
        for sample in recording.samples:
            if sample["rows"][0] <= sample["row"] <= sample["rows"][1]:
                rows = sample["row"] - sample["rows"][0] + 1
                shortest[recording.device] = min(rows, shortest.get(recording.device, _MAX_WINDOW_ROWS))
    lengths = shortest.values() or [1]
    return sorted({median_high(lengths), median_low(lengths)}, reverse=True)

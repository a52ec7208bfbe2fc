"""Labels for a device, as the arguments of commands `label`: each small enough to be one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from agent.performance.labels import Label
from agent.wire.commands import MAX_ARGUMENT_LENGTH

_MAX_LABELS = 200


def split_labels(labels: Sequence[Label]) -> Iterator[tuple[int, int, str]]:
    """(first, end, text) of consecutive labels; text is JSON columns, at most MAX_ARGUMENT characters in ASCII."""
    first = 0
    while first < len(labels):
        end = min(first + _MAX_LABELS, len(labels))
        while len(text := _encode_columns(labels[first:end])) > MAX_ARGUMENT_LENGTH:
            end = first + (end - first) // 2
        yield first, end, text
        first = end


def _encode_columns(labels: Sequence[Label]) -> str:
    columns = {
        "row": [one.row for one in labels],
        "t": [None if one.t is None else one.t / 1e6 for one in labels],
        "label": [one.text for one in labels],
        "source": [one.source for one in labels],
    }
    return json.dumps(columns, separators=(",", ":"))

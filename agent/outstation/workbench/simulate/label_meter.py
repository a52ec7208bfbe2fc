"""Label meter: sends delayed ground-truth labels of a simulated site through the device's intake socket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outstation.device.machine import secret_file
from outstation.protocol.client import Client
from outstation.workbench.simulate.scenario import DelayedLabels


class LabelMeter:
    """Labels of one device: `values` (n,) of rows 1 to n of its stream; NaN is never sent."""

    def __init__(
        self,
        socket: Path,
        task: str,
        measured: DelayedLabels,
        values: NDArray[np.float64],
        client: Callable[[], Client] | None = None,
    ) -> None:
        self._task, self._measured, self._values = task, measured, values
        self._connect = client or (lambda: Client(socket, name="meter", outage_s=30.0))
        self._client: Client | None = None
        self._author: tuple[str, str] | None = None
        self._data_dir = socket.parent if client is None else None
        self._sent_through = 0

    def send_due_labels(self, last_row: int) -> None:
        """Send the labels due after the device has results up to `last_row`. Raises ConnectionError."""
        last = min(last_row - self._measured.delay_rows, len(self._values))
        rows = np.arange(self._sent_through + 1, last + 1, dtype=np.int64)
        rows = rows[(rows % self._measured.every_rows == 0) & ~np.isnan(self._values[rows - 1])]
        self._sent_through = max(self._sent_through, last)
        if not len(rows):
            return
        if self._client is None:
            self._client = self._connect()
            if self._data_dir is not None:
                # The daemon, which is there now, made the key.
                self._author = "meter", secret_file.make_token(secret_file.LABEL_KEY.load(self._data_dir), "meter")
        for row in rows.tolist():
            value = float(self._values[row - 1])
            self._client.label(self._task, value, row=row, source="system", author=self._author)

    def close(self) -> None:
        """Wait until the device has stored all labels. Raises ConnectionError."""
        if self._client is not None:
            with contextlib.closing(self._client) as client:
                client.flush()
            self._client = None

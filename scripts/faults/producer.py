"""Simulated sensor that retries without limit, with a ledger of sent and acknowledged rows."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random

import msgspec

from outstation.protocol.client import Client
from outstation.workbench.testing.patience import Patience

FIELDS = ("a", "b", "c", "d")
# A fixed time in the past: rows carry their own time, which also identifies them.
FIRST_T_US = 1_764_022_680_000_000
STEP_US = 1_000
_PATIENCE_S = 600.0


class Ledger(msgspec.Struct):
    """Row times in epoch µs; `values` maps each to its measured values."""

    values: dict[int, tuple[float, ...]] = msgspec.field(default_factory=dict)
    acknowledged: set[int] = msgspec.field(default_factory=set)
    refused: set[int] = msgspec.field(default_factory=set)


class SensorThread(ABC):
    """Thread that sends to the intake socket while it is resumed; `failure` holds the error that ended it."""

    def __init__(self, socket: Path, stream: str) -> None:
        self.failure: Exception | None = None
        self._socket, self._stream = socket, stream
        self._go, self._idle, self._ended = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._main, name=stream, daemon=True)

    def resume(self) -> None:
        self._idle.clear()
        self._go.set()
        if self._thread.ident is None:
            self._thread.start()

    def pause(self, patience_s: float) -> bool:
        """Stop sending, and return whether all sent rows were answered within `patience_s`."""
        self._go.clear()
        patience = Patience(patience_s)
        while not self._idle.wait(0.1) and not patience.is_over():
            pass
        return self._idle.is_set()

    def close(self) -> None:
        self._ended = True
        self._go.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)

    @abstractmethod
    def send(self, client: Client) -> None:
        """Send once, wait for the answer, and pause until the next rows are due."""

    def _main(self) -> None:
        try:
            client = Client(self._socket, name=self._stream, patience_s=_PATIENCE_S)
            while not self._ended:
                if self._go.is_set():
                    self.send(client)
                else:
                    self._idle.set()
                    self._go.wait(0.1)
            client.close()
        except Exception as error:
            self.failure = error


class Producer(SensorThread):
    """Sensor that sends `rate` rows per second in lines of `line_rows` rows, each after the previous response."""

    def __init__(self, socket: Path, rng: Random, *, rate: float = 250.0, line_rows: int = 25) -> None:
        super().__init__(socket, "rig")
        self.ledger = Ledger()
        self._rng, self._rate, self._line_rows = rng, rate, line_rows

    def send(self, client: Client) -> None:
        started_s = time.monotonic()
        first = len(self.ledger.values)
        times = [FIRST_T_US + (first + i) * STEP_US for i in range(self._line_rows)]
        rows = [tuple(round(self._rng.gauss(0, 1), 3) for _ in FIELDS) for _ in times]
        self.ledger.values.update(zip(times, rows, strict=True))
        columns = dict(zip(FIELDS, map(list, zip(*rows, strict=True)), strict=True))
        client.send_columns(self._stream, {"t": [t / 1e6 for t in times], **columns})
        answer = client.flush()
        (self.ledger.refused if answer.rejected else self.ledger.acknowledged).update(times)
        time.sleep(max(0.0, self._line_rows / self._rate - (time.monotonic() - started_s)))

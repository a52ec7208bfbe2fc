"""Simulated sensor that retries without limit, with a ledger of sent and acknowledged rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from agent.client import Client

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

    @property
    def sent(self) -> int:
        return len(self.values)


class Producer:
    """Thread that sends `rate` rows per second in lines of `lines_of` rows, each after the previous response."""

    def __init__(self, socket: Path, rng: Random, *, rate: float = 250.0, lines_of: int = 25) -> None:
        self.ledger = Ledger()
        self.failure: Exception | None = None
        self._socket, self._rng, self._rate, self._lines_of = socket, rng, rate, lines_of
        self._go, self._idle, self._ended = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._main, name="producer", daemon=True)
        self._thread.start()

    def resume(self) -> None:
        self._idle.clear()
        self._go.set()

    def pause(self, patience_s: float) -> bool:
        """Stop sending, and return whether all sent rows were answered within `patience_s`."""
        self._go.clear()
        return self._idle.wait(patience_s)

    def close(self) -> None:
        self._ended = True
        self._go.set()
        self._thread.join(2.0)

    def _main(self) -> None:
        try:
            client = Client(self._socket, name="rig", patience_s=_PATIENCE_S)
            while not self._ended:
                if not self._go.is_set():
                    self._idle.set()
                    self._go.wait(0.1)
                    continue
                began = time.monotonic()
                self._line(client)
                time.sleep(max(0.0, self._lines_of / self._rate - (time.monotonic() - began)))
            client.close()
        except Exception as error:
            self.failure = error

    def _line(self, client: Client) -> None:
        first = self.ledger.sent
        times = [FIRST_T_US + (first + i) * STEP_US for i in range(self._lines_of)]
        rows = [tuple(round(self._rng.gauss(0, 1), 3) for _ in FIELDS) for _ in times]
        self.ledger.values.update(zip(times, rows, strict=True))
        client.send_columns("rig", {"t": [t / 1e6 for t in times], **_columns(rows)})
        answer = client.flush()
        (self.ledger.refused if answer.rejected else self.ledger.acknowledged).update(times)


def _columns(rows: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(FIELDS)}

"""Our drift monitor with fault detection and all detectors over synthetic rows, with a learned site reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.detectors.detector import JOINT, OUTPUT, SCORE
from scripts.benchmarks.drift_peers import synthetic
from scripts.benchmarks.drift_peers.counting import Flags, Row, raised
from scripts.benchmarks.drift_peers.synthetic import ANSWER, CERTAINTY, FIELDS, ROWS, Change, Kind, Table

NAMES = tuple(f"f{i}" for i in range(FIELDS))
LABELS = tuple("abcd")
SUBJECTS = {name: i for i, name in enumerate((*NAMES, OUTPUT, SCORE, JOINT))}
EVERY_US = 10_000
AT_ONCE = 5  # windows of a trial between checks for a detection


class MonitorRun(msgspec.Struct, frozen=True):
    """A drift monitor of a model that answers every `model_rows` rows."""

    judge: DriftMonitor
    model_rows: int

    @classmethod
    def from_kind(cls, kind: Kind, model_rows: int, window: int = ROWS) -> MonitorRun:
        """Create a monitor for windows of `window` rows; the bundle's reference comes from other rows of that kind."""
        rows = synthetic.training(kind)
        answered = slice(model_rows - 1, None, model_rows)
        shipped = build_reference(
            rows[:, :FIELDS], np.arange(0, len(rows), model_rows), model_rows,
            rows[answered, ANSWER].astype(np.int64), rows[answered, CERTAINTY, None], ROWS // model_rows,
            fields=NAMES, labels=LABELS,
        )  # fmt: skip
        return cls(
            DriftMonitor(
                MonitorSettings(shipped, labels=LABELS, window=window // model_rows, learn_windows=synthetic.LEARN)
            ),
            model_rows,
        )

    def step(
        self, state: DriftState, rows: Table, features: Table | None = None
    ) -> tuple[DriftState, list[DriftWindowResult]]:
        """Process `rows` (n, COLUMNS), a whole number of windows. A device has `features` apart."""
        first = max(0, state.last_counted_row) + 1
        answered = slice(self.model_rows - 1, None, self.model_rows)
        return self.judge.process_batch(
            state, rows[:, :FIELDS] if features is None else features,
            np.arange(0, len(rows), self.model_rows), self.model_rows,
            rows[answered, ANSWER].astype(np.int64), rows[answered, CERTAINTY, None],
            rows=(first, first + len(rows) - 1), t=np.arange(first, first + len(rows)) * EVERY_US,
        )  # fmt: skip


def row(
    name: str, kind: Kind, changes: Sequence[Change], sites: int, quiet: int, trials: int, model_rows: int = 1
) -> Row:
    """Let `sites` learn, watch them for `quiet` windows, and run each change `trials` times."""
    watch, row_result = MonitorRun.from_kind(kind, model_rows), Row(name)
    for site in range(sites):
        learned, _ = watch.step(watch.judge.start(), synthetic.learning(kind, site))
        assert learned.site_reference is not None
        row_result.add_quiet(raised(watch.step(learned, synthetic.quiet(kind, site, quiet))[1], SUBJECTS))
        for change in changes:
            for trial in range(trials):
                rows = synthetic.trial(kind, site, trial, change)
                row_result.add(change.name, run_until_detected(watch, learned, rows, change), change.subjects)
    return row_result


def run_until_detected(watch: MonitorRun, state: DriftState, rows: Table, change: Change) -> Flags:
    """Return the alarms by window, up to the detection or the end of the trial."""
    parts: list[Flags] = []
    for part in pieces(rows):
        state, verdicts = watch.step(state, part)
        parts.append(raised(verdicts, SUBJECTS))
        if parts[-1][:, list(change.subjects)].any():
            break
    return np.concatenate(parts)


def pieces(rows: Table) -> Iterator[Table]:
    for at in range(0, len(rows), AT_ONCE * ROWS):
        yield rows[at : at + AT_ONCE * ROWS]

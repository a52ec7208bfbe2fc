"""One other drift detector, in the environment of `scripts/setup peers`: requests on stdin, answers on stdout, JSON.

    python -P peer.py NAME      {"do": "flags", "data": FILE, "out": FILE, "quiet": N, "trials": N}
                             {"do": "cost", "data": FILE, "windows": N}     {"do": "memory", "data": FILE}
                             {"do": "quiet", "data": FILE, "windows": N}     {"do": "errors", "data": FILE}

`data` is what `peers.write` wrote: tables (n, 18) of 16 fields, the answer's number, its certainty; for `quiet` what
`peers.write_quiet` wrote: tables of any number of columns. Each detector learns from all rows of a table, and flags
columns of windows by its own defaults. Nothing here is ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

KS_ROWS = 10_000  # rows of the reference: up to here SciPy's p-value is exact by default


class Layout:
    """Columns of a table, their names, and the rows of a window. `levels` counts the values of column `category`."""

    def __init__(self, names: list[str], rows: int, category: int | None = None, levels: int = 0) -> None:
        self.names, self.rows, self.category, self.levels = names, rows, category, levels
        self.numeric = [i for i in range(len(names)) if i != category]


PREDICTIONS = Layout([*(f"f{i}" for i in range(16)), "answer", "certainty"], rows=500, category=16, levels=4)


class Library:
    """Other software, imported once its process runs."""

    imports: ClassVar[dict[str, str]] = {}  # attribute to MODULE or MODULE:NAME
    environment: ClassVar[dict[str, str]] = {}  # variables that the imports read

    @classmethod
    def load(cls) -> None:
        """Import the library into the attributes of the class."""
        os.environ.update(cls.environment)
        for attribute, path in cls.imports.items():
            module, _, name = path.partition(":")
            loaded: Any = import_module(module)
            setattr(cls, attribute, staticmethod(getattr(loaded, name) if name else loaded))


class Detector(Library, ABC):
    """Detector that learns from `reference` (n, C) and flags the drifted columns (C,) of each window (rows, C)."""

    remembers = False  # earlier windows that the detector has processed

    def __init__(self, reference: Any, layout: Layout = PREDICTIONS) -> None:
        self.reference, self.layout = reference, layout

    @abstractmethod
    def window(self, rows: Any) -> Any:
        """Return the flags (C,) of one window of rows."""

    def flags(self, rows: Any, until: list[int] | None = None) -> Any:
        """Return the flags (windows, C) of rows, up to the first window that flags one of the columns `until`."""
        out = []
        for at in range(0, len(rows), self.layout.rows):
            out.append(self.window(rows[at : at + self.layout.rows]))
            if until and out[-1][until].any():
                break
        return np.array(out)


class Ks(Detector):
    """Two-sample KS test per number and chi-square test of the answers, at 0.05 with Bonferroni correction."""

    stats: Any = None
    imports: ClassVar = {"stats": "scipy.stats"}

    def __init__(self, reference: Any, layout: Layout = PREDICTIONS) -> None:
        super().__init__(reference[:: max(1, len(reference) // KS_ROWS)], layout)

    def window(self, rows: Any) -> Any:
        columns = self.layout
        p = np.ones(len(columns.names))
        for i in columns.numeric:
            p[i] = self.stats.ks_2samp(self.reference[:, i], rows[:, i]).pvalue
        if columns.category is not None:
            codes = (x[:, columns.category].astype(int) for x in (self.reference, rows))
            both = np.array([np.bincount(code, minlength=columns.levels) for code in codes])
            p[columns.category] = self.stats.chi2_contingency(both[:, both.any(0)]).pvalue
        return p < 0.05 / len(columns.names)


class Psi(Detector):
    """Population stability index of at least 0.1 in ten equal-frequency bins; empty bins count as 0.0001."""

    def __init__(self, reference: Any, layout: Layout = PREDICTIONS) -> None:
        super().__init__(reference, layout)
        self.edges = [np.quantile(column, np.arange(1, 10) / 10) for column in reference.T]
        if layout.category is not None:
            self.edges[layout.category] = np.arange(layout.levels - 1) + 0.5
        self.usual = self.shares(reference)

    def shares(self, rows: Any) -> Any:
        shares = [
            np.bincount(np.searchsorted(edges, column), minlength=len(edges) + 1) / len(rows)
            for edges, column in zip(self.edges, rows.T, strict=True)
        ]
        return [np.maximum(share, 1e-4) for share in shares]

    def window(self, rows: Any) -> Any:
        pairs = zip(self.shares(rows), self.usual, strict=True)
        return np.array([((now - usual) * np.log(now / usual)).sum() >= 0.1 for now, usual in pairs])


class Adwin(Detector):
    """River's ADWIN on each number and each answer's indicator, value by value."""

    remembers = True
    made: Any = None
    imports: ClassVar = {"made": "river.drift:ADWIN"}

    def __init__(self, reference: Any, layout: Layout = PREDICTIONS) -> None:
        super().__init__(reference, layout)
        self.numbers = [(i, self.made()) for i in layout.numeric]
        self.shares = [self.made() for _ in range(layout.levels)]
        self.window(reference)

    def window(self, rows: Any) -> Any:
        out = np.zeros(len(self.layout.names), bool)
        for column, detector in self.numbers:
            out[column] = self.is_drifting(detector, rows[:, column])
        category = self.layout.category
        if category is not None:
            shares = [self.is_drifting(detector, rows[:, category] == k) for k, detector in enumerate(self.shares)]
            out[category] = any(shares)
        return out

    def is_drifting(self, detector: Any, values: Any) -> bool:
        detected = False
        for value in values.astype(float).tolist():
            detector.update(value)
            detected |= detector.drift_detected
        return detected


class Evidently(Detector):
    """Evidently with its default test and threshold for each column (here: W1 / sd and JS of 0.1)."""

    frame: Any = None
    chosen: Any = None
    types: Any = None
    imports: ClassVar = {
        "frame": "pandas:DataFrame",
        "chosen": "evidently.legacy.calculations.stattests.registry:get_stattest",
        "types": "evidently.legacy.core:ColumnType",
    }

    def __init__(self, reference: Any, layout: Layout = PREDICTIONS) -> None:
        super().__init__(self.frame(reference, columns=layout.names), layout)

    def window(self, rows: Any) -> Any:
        now, out = self.frame(rows, columns=self.layout.names), []
        for i, name in enumerate(self.layout.names):
            kind = self.types.Categorical if i == self.layout.category else self.types.Numerical
            test = self.chosen(self.reference[name], now[name], kind, None)
            out.append(bool(test(self.reference[name], now[name], kind, None).drifted))
        return np.array(out)


class Nannyml(Detector):
    """NannyML univariate drift with one chunk per window: JS, with limits from the reference chunks."""

    frame: Any = None
    made: Any = None
    imports: ClassVar = {"frame": "pandas:DataFrame", "made": "nannyml:UnivariateDriftCalculator"}
    environment: ClassVar = {"NML_DISABLE_USAGE_LOGGING": "1"}  # otherwise the import sends usage data

    def __init__(self, reference: Any, layout: Layout = PREDICTIONS) -> None:
        super().__init__(reference, layout)
        made = self.made(column_names=layout.names, chunk_size=layout.rows)
        self.fitted = made.fit(self.table(reference))

    def table(self, rows: Any) -> Any:
        out = self.frame(rows, columns=self.layout.names)
        if self.layout.category is not None:
            name = self.layout.names[self.layout.category]
            out[name] = out[name].astype(int).astype(str)
        return out

    def window(self, rows: Any) -> Any:
        return self.flags(rows)[0]

    def flags(self, rows: Any, until: list[int] | None = None) -> Any:
        frame = self.fitted.calculate(self.table(rows)).filter(period="analysis").to_df()
        alerts = [frame[name, "jensen_shannon", "alert"].to_numpy(bool) for name in self.layout.names]
        return np.stack(alerts, axis=1)


class Dle(Library):
    """NannyML's direct loss estimation with its defaults: mean absolute error of windows without labels."""

    frame: Any = None
    made: Any = None
    imports: ClassVar = {"frame": "pandas:DataFrame", "made": "nannyml:DLE"}
    environment: ClassVar = {**Nannyml.environment, "OMP_NUM_THREADS": "1"}  # LightGBM's threads wait for each other

    def estimate(self, held_out: Any, later: Any, rows: int) -> list[float]:
        """Return the expected error of each window of `later` (m, D + 2), by tables of inputs, answer and truth."""
        inputs = [f"f{i}" for i in range(held_out.shape[1] - 2)]
        made = self.made(feature_column_names=inputs, y_pred="y", y_true="truth", metrics=["mae"], chunk_size=rows)
        known, unknown = (self.frame(table, columns=[*inputs, "y", "truth"]) for table in (held_out, later))
        result = made.fit(known).estimate(unknown.drop(columns="truth")).filter(period="analysis").to_df()
        return [float(value) for value in result["mae", "value"]]


class Whylogs(Detector):
    """whylogs profile of each window. It has no drift decision of its own, so it flags nothing."""

    frame: Any = None
    log: Any = None
    imports: ClassVar = {"frame": "pandas:DataFrame", "log": "whylogs:log"}
    environment: ClassVar = {"WHYLOGS_NO_ANALYTICS": "True"}  # otherwise the import sends usage data

    def window(self, rows: Any) -> Any:
        self.log(self.frame(rows, columns=self.layout.names)).profile()
        return np.zeros(len(self.layout.names), bool)


DETECTORS: dict[str, Any] = {made.__name__.lower(): made for made in (Ks, Psi, Adwin, Evidently, Nannyml, Dle, Whylogs)}


def flags(made: Any, data: Any, ask: dict[str, Any]) -> dict[str, Any]:
    """Write the flags of `quiet` and of each change (`change0`…) to the file `out`, with consecutive windows."""
    changes = json.loads(str(data["changes"]))
    parts: dict[str, list[Any]] = {f"change{i}": [] for i in range(len(changes))}
    without_change = []
    for site in range(int(data["sites"])):
        reference = data[f"{site}/reference"]
        learned = made(reference)
        without_change.append(learned.flags(data[f"{site}/quiet"][: ask["quiet"] * PREDICTIONS.rows]))
        for i, change in enumerate(changes):
            for trial in range(ask["trials"]):
                rows, until = data[f"{site}/{i}/{trial}"], [s for s in change["subjects"] if s < len(PREDICTIONS.names)]
                detector = made(reference) if made.remembers else learned
                parts[f"change{i}"].append(detector.flags(rows, until))
    longest = max((len(column) for part in parts.values() for column in part), default=0)
    padded: dict[str, Any] = {
        name: np.array([_padded(column, longest) for column in part]) for name, part in parts.items()
    }
    np.savez(ask["out"], **padded | {"quiet": np.concatenate(without_change)})
    return {}


def _padded(flags: Any, length: int) -> Any:
    return np.concatenate([flags, np.zeros((length - len(flags), flags.shape[1]), bool)])


def quiet(made: Any, data: Any, ask: dict[str, Any]) -> dict[str, Any]:
    """Count windows, at most `windows` of them, and those in which a column is flagged."""
    size, levels = int(data["rows"]), int(data["levels"])
    windows = alarms = 0
    for site in range(int(data["sites"])):
        reference, rows = data[f"{site}/reference"], data[f"{site}/quiet"]
        names = [f"f{i}" for i in range(reference.shape[1])]
        layout = Layout(names, size, len(names) - 1 if levels else None, levels)
        detector = made(reference, layout)
        flagged = detector.flags(rows[: (ask["windows"] - windows) * size])
        windows, alarms = windows + len(flagged), alarms + int(flagged.any(1).sum())
        if windows >= ask["windows"]:
            break
    return {"windows": windows, "alarms": alarms}


def cost(made: Any, data: Any, ask: dict[str, Any]) -> dict[str, Any]:
    detector, rows = made(data["0/reference"]), data["0/quiet"][: ask["windows"] * PREDICTIONS.rows]
    detector.flags(rows[: PREDICTIONS.rows])
    begin = time.process_time()
    detector.flags(rows)
    return {"rows": len(rows), "cpu_s": time.process_time() - begin}


def memory(made: Any, data: Any, loaded_kb: int) -> dict[str, Any]:
    """Return the MB of the import, and the peak above it during the work; the data are read before."""
    reference, rows = data["0/reference"], data["0/quiet"]
    with peak() as grown:
        made(reference).flags(rows[: 10 * PREDICTIONS.rows])
    return {"import_mb": loaded_kb / 1024, "work_mb": grown[0] / 1024}


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Yield a list that afterwards holds the peak growth of resident memory in kB."""
    grown: list[int] = []
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak counter
    yield grown
    grown.append(status("VmHWM") - before)


def status(member: str) -> int:
    """Return a memory field of this process in kilobytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(member + ":"))


def answers(made: Any, requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    before = status("VmRSS")
    made.load()
    loaded = status("VmRSS") - before
    yield {"loaded_kb": loaded}
    for line in requests:
        ask = json.loads(line)
        with np.load(ask["data"], allow_pickle=False) as data:
            match ask["do"]:
                case "flags":
                    yield flags(made, data, ask)
                case "quiet":
                    yield quiet(made, data, ask)
                case "cost":
                    yield cost(made, data, ask)
                case "errors":
                    yield {"mae": made().estimate(data["held_out"], data["later"], int(data["rows"]))}
                case "memory":
                    yield memory(made, data, loaded)


def main() -> None:
    warnings.simplefilter("ignore")
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print to stdout
        for answer in answers(DETECTORS[sys.argv[1]], iter(sys.stdin)):
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()

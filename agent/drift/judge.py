"""The drift state machine of one task: batches of model windows in, closed drift windows with their alerts out.

Pure: state and batch in, new state and verdicts out, and the same whatever the batch boundaries.

- A drift window is exactly `window` model windows. Rows that lie in no model window are not counted; a row in several
  overlapping model windows is counted once, in the first drift window that has it.
- Until `learn` drift windows without a fault are gathered and agree, the site has no reference: faults are raised
  (limits are the shipped reference's), drift is "insufficient".
- A drift window in which any field has a fault is kept out of drift tests and learning for all fields, because the
  class the model named cannot be trusted then.
- One open alert per field and kind. Faults clear after three windows without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.drift import alerts, codec, cusum, faults, statistics
from agent.drift.alerts import Alert
from agent.drift.codec import Bools, Floats, Ints
from agent.drift.cusum import CALM, Cusum
from agent.drift.faults import Tail
from agent.drift.learning import Learning, finite, settle
from agent.drift.reference import FEWEST, Reference
from agent.drift.summary import Summary
from agent.errors import BadBundle


@dataclass(frozen=True, eq=False)
class State:
    """All a task's drift detection remembers. Constant size but for what is gathered while learning."""

    window: int  # model windows per drift window
    index: int  # of the open drift window, from 1
    open: Summary
    tail: Tail
    rows: tuple[int, int]  # first and last row of the open drift window, as the stream numbers them; (0, -1) if none
    t: tuple[int, int]  # their times, epoch µs
    seen: int  # last row counted
    learning: Learning
    site: Reference | None
    cusum: Cusum
    faulty: Bools  # (F,) a fault alert is open
    calm: Ints  # (F,) windows without a fault since
    raised: Ints  # (F, 2) alerts raised so far: drift, fault

    def to_bytes(self) -> bytes:
        return codec.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Raises ValueError."""
        return codec.from_bytes(data, cls)


@dataclass(frozen=True)
class Verdict:
    """One closed drift window. `summary` holds the drift message's `features`, `output`, `estimate` and `state`."""

    index: int
    rows: tuple[int, int]
    t: tuple[int, int]
    n: int
    site: str | None  # digest of the site's reference that this window was judged by
    learned: Reference | None  # the site's reference, when this window completed it
    refused: str | None  # why the windows gathered up to this one were thrown away
    summary: dict[str, Any]
    alerts: tuple[Alert, ...]


class Judge:
    """Judges a task's batches against its shipped reference and, once learned, its site's."""

    def __init__(
        self, shipped: Reference, *, labels: Sequence[str], window: int, learn: int = 40, units: Sequence[str] = ()
    ) -> None:
        if tuple(labels) != shipped.labels:
            raise BadBundle("the drift reference has other labels than the model: build reference.json for this model")
        if learn < FEWEST:
            raise ValueError(f"a site cannot learn its reference from {learn} drift windows; {FEWEST} is the least")
        self.shipped = shipped
        self.window = window
        self.learn = learn
        self.units = tuple(units) or ("",) * len(shipped.fields)
        self._origin = shipped.origin

    def start(self) -> State:
        fields = len(self.shipped.fields)
        return State(
            window=self.window,
            index=1,
            open=Summary.empty(self.shipped),
            tail=Tail.empty(fields),
            rows=(0, -1),
            t=(0, 0),
            seen=-1,
            learning=Learning.empty(self.shipped),
            site=None,
            cusum=Cusum.zeros(2 * fields),
            faulty=np.zeros(fields, np.bool_),
            calm=np.zeros(fields, np.int64),
            raised=np.zeros((fields, 2), np.int64),
        )

    def restore(self, data: bytes) -> State:
        """The state of `to_bytes`. Raises ValueError when it is damaged or made for another bundle: start anew."""
        state = State.from_bytes(data)
        if (state.open.reference, state.window) != (self.shipped.digest, self.window):
            raise ValueError("this drift state was made for another reference or window length")
        return state

    def step(
        self,
        state: State,
        features: NDArray[np.float32],
        starts: Ints,
        window_rows: int,
        labels_idx: Ints,
        scores: NDArray[np.float32] | None,
        *,
        rows: tuple[int, int],
        t: Ints,
    ) -> tuple[State, list[Verdict]]:
        """Take one batch.

        `features` (n, F) physical units, NaN missing, of stream rows `rows` (first, last) at `t` (n,) epoch µs;
        `starts` (w,) ascending offsets of model windows of `window_rows` rows, `labels_idx` (w,) and `scores` (w, K)
        the model's answers. Raises ValueError when the batch does not go on where the last one ended.
        """
        if len(features) != rows[1] - rows[0] + 1 or len(t) != len(features):
            raise ValueError(f"rows {rows[0]}-{rows[1]} do not match {len(features)} rows of features, {len(t)} times")
        if len(starts) and rows[0] + int(starts[0]) + window_rows - 1 <= state.seen:
            raise ValueError(f"rows up to {state.seen} were judged before; this batch begins at row {rows[0]}")
        if window_rows != self.shipped.window_rows:
            raise BadBundle(f"the drift reference is for windows of {self.shipped.window_rows} rows, not {window_rows}")
        values = finite(features)
        top = None if scores is None else np.asarray(scores, np.float64).max(axis=1, initial=-np.inf)
        found = statistics.of_windows(values, starts, window_rows, self.shipped.floor)
        verdicts = []
        at = 0
        while at < len(starts):
            some = slice(at, at + self.window - state.open.windows)
            at = some.stop
            state = self._fill(state, values, starts[some], rows[0], t)
            some_top = None if top is None else top[some]
            state = replace(state, open=state.open.add_windows(self.shipped, found[some], labels_idx[some], some_top))
            if state.open.windows == self.window:
                state, verdict = self._close(state)
                verdicts.append(verdict)
        return state, verdicts

    def _fill(self, state: State, values: Floats, starts: Ints, first: int, t: Ints) -> State:
        """With the rows of these model windows that were not counted before."""
        rows = statistics.covered(starts, self.shipped.window_rows, state.seen + 1 - first)
        part = values[rows]
        if not len(part):
            return state
        summary, tail = state.open.add_rows(self.shipped, part, state.tail)
        begin, end = (rows.start, rows.stop - 1) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]))
        fresh = state.rows[1] < state.rows[0]
        return replace(
            state,
            open=summary,
            tail=tail,
            rows=(first + begin if fresh else state.rows[0], first + end),
            t=(int(t[begin]) if fresh else state.t[0], int(t[end])),
            seen=first + end,
        )

    def _close(self, state: State) -> tuple[State, Verdict]:
        window = state.open
        found = faults.find(window, self.shipped)
        clean = not any(found)
        after, learned, refused = state, None, None
        effects = np.zeros(2 * len(found))
        if clean and state.site is not None:
            after, effects = self._test(state, state.site)
        elif clean:
            after, learned, refused = self._learn(state)
        after, fault_alerts = self._faults(after, found)
        after, drift_alerts = self._drifts(state, after, effects)
        verdict = Verdict(
            index=state.index,
            rows=state.rows,
            t=state.t,
            n=window.rows,
            site=state.site.digest if state.site else None,
            learned=learned,
            refused=refused,
            summary=self._report(after, found, tested=clean and state.site is not None),
            alerts=(*fault_alerts, *drift_alerts),
        )
        fresh = replace(
            after,
            index=state.index + 1,
            open=Summary.empty(self.shipped),
            tail=Tail.empty(len(found)),
            rows=(0, -1),
            t=(0, 0),
        )
        return fresh, verdict

    def _learn(self, state: State) -> tuple[State, Reference | None, str | None]:
        learning = state.learning.add(state.open)
        if learning.windows < self.learn:
            return replace(state, learning=learning), None, None
        empty = Learning.empty(self.shipped)
        try:
            site = settle(replace(self.shipped, window=self.window), learning, made="site")
        except BadBundle as refused:
            return replace(state, learning=empty), None, f"{refused}; gathering {self.learn} new windows"
        return replace(state, learning=empty, site=site), site, None

    def _test(self, state: State, site: Reference) -> tuple[State, Floats]:
        found = state.open.classes.moments(self._origin)
        values, effects = statistics.tests(found, site.class_mean, site.class_sd, windowed=site.windowed)
        if not site.windowed:
            fields = len(site.fields)
            effects[fields:] -= site.test_mean[fields:] / 2
        z = cusum.scores(values, site.test_mean, site.test_sd, site.drift_windows)
        z = np.where(statistics.untested(found, windowed=site.windowed), np.nan, z)
        return replace(state, cusum=state.cusum.update(z, effects)), effects

    def _faults(self, state: State, found: tuple[str | None, ...]) -> tuple[State, list[Alert]]:
        now = np.array([name is not None for name in found])
        calm = np.where(state.faulty & ~now, state.calm + 1, 0)
        faulty = (state.faulty | now) & (calm < CALM)
        raised = state.raised + np.stack([np.zeros(len(found), np.int64), now & ~state.faulty], axis=1)
        out = []
        for field in np.flatnonzero(faulty != state.faulty):
            name, fault = self.shipped.fields[field], found[field]
            if fault is not None:
                sentence = alerts.fault_sentence(name, fault, int(field), state.open)
                out.append(self._alert(state, "fault", int(field), raised, "critical", sentence, {"fault": fault}))
            else:
                out.append(self._alert(state, "fault", int(field), raised, "info", "", {}))
        return replace(state, faulty=faulty, calm=calm, raised=raised), out

    def _drifts(self, before: State, after: State, effects: Floats) -> tuple[State, list[Alert]]:
        was, now = open_drift(before.cusum), open_drift(after.cusum)
        raised = after.raised + np.stack([now & ~was, np.zeros(len(now), np.int64)], axis=1)
        earlier = [self.shipped.fields[field] for field in np.flatnonzero(was)]
        out = []
        for field in np.flatnonzero(was != now):
            if now[field] and after.site is not None:
                change = alerts.change(after.cusum, int(field), after.site, effects)
                cause = alerts.cause(change, int(field), after.site, before.open, self._origin)
                sentence = change.sentence(self.shipped.fields[field], self.units[field], cause)
                sentence += alerts.doubt(earlier) if self.shipped.labels else ""
                evidence = change.evidence() | {"site": after.site.digest, "after": earlier}
                out.append(self._alert(before, "drift", int(field), raised, "warning", sentence, evidence))
            else:
                out.append(self._alert(before, "drift", int(field), raised, "info", "", {}))
        return replace(after, raised=raised), out

    def _alert(
        self, state: State, kind: str, field: int, raised: Ints, severity: str, sentence: str, evidence: dict[str, Any]
    ) -> Alert:
        subject = self.shipped.fields[field]
        return Alert(
            alert=kind,
            subject=subject,
            state="raised" if sentence else "cleared",
            severity=severity,
            id=f"{subject}/{kind}/{raised[field, 0 if kind == 'drift' else 1]}",
            summary=sentence or alerts.cleared_sentence(subject, kind),
            evidence={"window": state.index, "rows": list(state.rows)} | evidence,
        )

    def _report(self, after: State, found: tuple[str | None, ...], *, tested: bool) -> dict[str, Any]:
        """The message members: the summary's numbers, and the state of each field, of the output and of all."""
        report = after.open.describe(self.shipped)
        sums, drifting = np.round(after.cusum.value.T, 2).tolist(), open_drift(after.cusum)
        for i, name in enumerate(self.shipped.fields):
            report["features"][name] |= {
                "cusum": {"mean": sums[i], "spread": sums[len(found) + i]},
                "state": "fault" if found[i] else "drift" if drifting[i] else "ok" if tested else "insufficient",
                "fault": found[i],
            }
        states = {feature["state"] for feature in report["features"].values()}
        report["output"]["state"] = "ok" if tested else "insufficient"
        report["state"] = next(state for state in ("fault", "drift", "insufficient", "ok") if state in states)
        return report


def open_drift(sums: Cusum) -> Bools:
    """(F,) which fields have a drift alert open."""
    on: Bools = sums.on[0] | sums.on[1]
    fields = len(on) // 2
    return on[:fields] | on[fields:]

"""The drift state machine of one task: batches of model windows in, closed drift windows with their alerts out.

Pure: state and batch in, new state and verdicts out, and the same whatever the batch boundaries.

- A drift window is exactly `window` model windows. Rows that lie in no model window are not counted; a row in several
  overlapping model windows is counted once, in the first drift window that has it.
- Until `learn` drift windows without a fault are gathered and agree, the site has no reference: faults are raised
  (limits are the shipped reference's), drift is "insufficient".
- A drift window in which any field has a fault is kept out of drift tests and learning for all fields, because the
  class the model named cannot be trusted then.
- While a field is read wrongly (another unit, swapped, reversed) nothing is tested or learned, until three windows
  without a fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from agent.arrays import Ints
from agent.drift import batches, quiet, sampling_rate_watch
from agent.drift.alert_lifecycle import Raising
from agent.drift.baseline.learning import Learning, settle
from agent.drift.baseline.reference import FEWEST, Reference
from agent.drift.baseline.summary import Summary
from agent.drift.batches import Full
from agent.drift.detectors.modes import CLASSES, Modes, classes
from agent.drift.detectors.season import Season
from agent.drift.detectors.window_statistics import Found
from agent.drift.faults import faults
from agent.drift.reporting.alert_text import Alert
from agent.drift.reporting.drift_message import Told
from agent.drift.seen import Seen
from agent.drift.state import Batch, State, Verdict, emptied, filled
from agent.drift.testing import sequence
from agent.drift.testing.test_suite import Detectors, Tester
from agent.errors import BadBundle


class Judge:
    """Judges a task's batches against its shipped reference and, once learned, its site's.

    That is learned from `learn` drift windows and at least `learn_s` seconds of readings; `strata` says whether it
    follows the hour of day and the days of rest (auto, hour, week, none). No bin in a message tells of fewer than
    `least` rows. `mode` names the field whose values are the classes of a model that names none.
    """

    def __init__(
        self,
        shipped: Reference,
        *,
        labels: Sequence[str],
        window: int,
        learn: int = 40,
        units: Sequence[str] = (),
        least: int = 0,
        learn_s: float = 0.0,
        strata: str = "auto",
        mode: str = "",
    ) -> None:
        if tuple(labels) != shipped.labels:
            raise BadBundle("the drift reference has other labels than the model: build reference.json for this model")
        if learn < FEWEST:
            raise ValueError(f"a site cannot learn its reference from {learn} drift windows; {FEWEST} is the least")
        if mode and shipped.labels:
            raise BadBundle(f"the model names classes itself: {mode!r} cannot name them, too")
        self.shipped = shipped.with_modes(CLASSES) if mode else shipped
        self.mode = mode
        self.window = window
        self.learn = learn
        self.units = tuple(units) or ("",) * len(shipped.fields)
        self._raising = Raising(shipped, self.units)
        self.learn_s = learn_s
        self.strata = strata
        self.least = least
        self._nothing = Summary.empty(self.shipped)
        self._nothing_learned = Learning.empty(self.shipped)
        self._tester: Tester | None = None

    def start(self) -> State:
        return State.start(self.shipped, self.window, self.mode)

    def restore(self, data: bytes, learning: bytes | None = None, site: bytes | None = None) -> State:
        """The state of `to_bytes` with what is kept apart from it, `site` as JSON.

        Raises ValueError when it is damaged or made for another bundle: start anew. Where what was gathered while
        learning is damaged, that begins anew.
        """
        state = State.joined(data, site)
        if (state.open.reference, state.window, state.mode) != (self.shipped.digest, self.window, self.mode):
            raise ValueError("this drift state was made for another reference, window length or field of modes")
        if not state.fits(self.shipped.places):
            raise ValueError("this drift state was made by a version with other tests")
        if learning is not None:
            with contextlib.suppress(ValueError):
                gathered = Learning.from_bytes(learning)
                if gathered.total.reference == self.shipped.digest:
                    return replace(state, learning=gathered)
        return state

    def to_bytes(self, state: State) -> bytes:
        """What is remembered, without what is large and seldom another: the site's reference, and what is gathered
        while learning."""
        return replace(state, learning=self._nothing_learned, site=None).to_bytes()

    def renumbered(self, state: State) -> State:
        """For rows that are numbered from anew: without what was gathered of the open drift window."""
        return replace(emptied(state, self._nothing), index=state.index, seen=-1)

    def relearn(self, state: State, for_s: float = 0.0) -> tuple[State, list[Alert]]:
        """Without its site's reference, to learn another from at least `for_s` seconds of readings.

        And the open drift alerts, cleared: what they were against is gone.
        """
        gone = "this site's reference is learned anew"
        subjects = np.flatnonzero(state.detectors.open_subjects).tolist()
        cleared = [
            self._raising.cleared(state, "drift", subject, f"{name}: {gone}.")
            for subject in subjects
            for name in (self._raising.subjects[subject],)
        ]
        fresh = replace(
            state,
            site=None,
            learning=self._nothing_learned,
            detectors=Detectors.start(self.shipped.places),
            watch=sampling_rate_watch.relearning(state.watch),
            season=Season(),
            learn_s=for_s,
        )
        evidence = {"window": state.index, "rows": list(state.rows)}
        return fresh, cleared + sampling_rate_watch.forgotten(state.watch, gone, evidence)

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
        modes: Modes | None = None,
    ) -> tuple[State, list[Verdict]]:
        """Take one batch.

        `features` (n, F) physical units, NaN missing, of stream rows `rows` (first, last) at `t` (n,) epoch µs;
        `starts` (w,) ascending offsets of model windows of `window_rows` rows, `labels_idx` (w,) and `scores` (w, K)
        the model's answers; `modes` those of model windows, where a field names them. Raises ValueError when the batch
        does not go on where the last one ended.
        """
        if len(features) != rows[1] - rows[0] + 1 or len(t) != len(features):
            raise ValueError(f"rows {rows[0]}-{rows[1]} do not match {len(features)} rows of features, {len(t)} times")
        if len(starts) and rows[0] + int(starts[0]) + window_rows - 1 <= state.seen:
            raise ValueError(f"rows up to {state.seen} were judged before; this batch begins at row {rows[0]}")
        if window_rows != self.shipped.window_rows:
            raise BadBundle(f"the drift reference is for windows of {self.shipped.window_rows} rows, not {window_rows}")
        if self.mode and modes is not None:
            known, labels_idx = classes(state.modes, modes)
            state = replace(state, modes=known)
        top = None if scores is None else np.asarray(scores, np.float64).max(axis=1, initial=-np.inf)
        batch, verdicts, at = Batch(features, starts, labels_idx, top, rows[0], t), [], 0
        while at < len(starts):
            state, more, at = self._go_on(state, batch, at)
            verdicts += more
        return state, verdicts

    def _go_on(self, state: State, batch: Batch, at: int) -> tuple[State, list[Verdict], int]:
        """Fill drift windows with the model windows from `at` on and judge the full ones; and where it got to."""
        ahead = None if state.open.windows else batches.ahead(self.shipped, batch, at, self.window, state.seen)
        full: Full | None = None
        if ahead is None:
            most = int(np.searchsorted(batch.starts, batch.starts[at] + batches.rows_at_once(batch)))
            stop = min(at + self.window - state.open.windows, len(batch.starts), max(at + 1, most))
            part = batch.part(slice(at, stop), self.shipped)
            state = filled(state, self.shipped, part, self._classes(state, part.found, part.named))
            if state.open.windows < self.window:
                return state, [], stop
            full, at = Full.of(state, stop), stop
            ahead = batches.ahead(self.shipped, batch, at, self.window, state.seen)
        if ahead is not None:
            more = ahead.full(self.shipped, batch, at, partial(self._classes, state))
            full = full.then(more) if full else more
        assert full is not None
        return self._judged(state, full)

    def _judged(self, state: State, full: Full) -> tuple[State, list[Verdict], int]:
        tester = self._testing(state.site) if state.site else None
        seen = Seen.of(full.stack, full.middle, self.shipped, tester, self.least)
        verdicts: list[Verdict] = []
        while len(verdicts) < full.windows:
            number = len(verdicts)
            after, more = self._quiet(state, full, seen, number)
            if not more:
                after, verdict = self._close(full.opened(state, number), seen, number)
                more = [verdict]
            verdicts += more
            changed = after.site is not state.site or self._by_others(after) != self._by_others(state)
            state = after
            if changed:
                # What follows was summarized for other classes, or has no evidence yet.
                break
        return emptied(state, self._nothing), verdicts, full.ends[len(verdicts) - 1]

    def _quiet(self, state: State, full: Full, seen: Seen, first: int) -> tuple[State, list[Verdict]]:
        """With those from number `first` on in which nothing happens, if any."""
        if state.site is None or seen.evidence is None:
            return state, []
        tester, rest = self._testing(state.site), slice(first, None)
        found = quiet.ahead(
            state, tester, seen.signs.any[rest], seen.ticks[rest], seen.evidence[rest], full.begun[rest]
        )
        if found is None:
            return state, []
        some, fields = slice(first, first + found.windows), len(self.shipped.fields)
        told = Told(found.sums, tester.site.places, [False] * (fields + 3), (None,) * fields, tested=True)
        summaries = seen.reported(some, told, found.watch, found.paces, tester)
        index, rows = state.index + (1 if first else 0), seen.stack.rows_each[some].tolist()
        verdicts = [
            Verdict(
                index + at, full.rows[first + at], full.t[first + at], n, state.site.digest, None, None, summary, ()
            )
            for at, (n, summary) in enumerate(zip(rows, summaries, strict=True))
        ]
        after = replace(
            state,
            index=verdicts[-1].index,
            rows=verdicts[-1].rows,
            t=verdicts[-1].t,
            seen=max(state.seen, verdicts[-1].rows[1]),
            detectors=found.detectors,
            watch=found.watch,
            season=found.season,
        )
        return after, verdicts

    def _by_others(self, state: State) -> bytes:
        """By which fields model windows are given classes, as something to compare."""
        if state.site is None or not self.shipped.labels:
            return b""
        return state.detectors.open_fields.tobytes()

    def _classes(self, state: State, found: Found, named: Ints) -> Ints:
        if state.site is None:
            return named
        return self._testing(state.site).classes(state.detectors, found.values, named)

    def _close(self, state: State, seen: Seen, at: int) -> tuple[State, Verdict]:
        """With the open drift window, which is number `at` of those that were looked at."""
        window, tick = state.open, seen.ticks[at]
        found = faults.find(seen.signs, at, window, self.shipped, self.units, state.site, state.misread)
        tester = self._testing(state.site) if state.site else None
        # One window in which a field that is read wrongly is not recognised so is not sound yet.
        spoiled = faults.spoiled(found) or bool(state.misread.any())
        watching = (
            state.watch if spoiled else sampling_rate_watch.after(state.watch, tick, tester, state.detectors, state.t)
        )
        clean = not spoiled and not sampling_rate_watch.holds(watching)
        learned, refused, season, detectors = None, None, state.season, state.detectors
        tested = clean and state.site is not None
        drift_alerts: list[Alert] = []
        if tester is not None and seen.evidence is not None:
            if clean:
                evidence, t = seen.evidence[at : at + 1], np.array([state.t[0]])
                detectors = sequence.of(tester, detectors, evidence, t).after(1)
                season = season.add(evidence.z[:, : len(self.shipped.fields)], t)
            elif watching.drifting:
                # What fields have gathered may be the wrong classes that the model names since then.
                detectors = detectors.only_open()
        after = replace(state, watch=watching, detectors=detectors, season=season)
        if tester is not None and seen.evidence is not None and clean:
            after, drift_alerts = self._raising.drifts(state, after, seen.evidence.effects[at], tester)
        elif clean:
            after, learned, refused = self._learn(after)
        after, fault_alerts = self._raising.faults(after, found)
        where = {"window": state.index, "rows": list(state.rows)}
        (summary,) = seen.reported(
            slice(at, at + 1),
            Told(
                sums=after.detectors.cusum.value[None],
                at=after.detectors.places,
                drifting=after.detectors.open_subjects.tolist(),
                found=tuple(fault.name if fault else None for fault in found),
                tested=tested,
            ),
            after.watch,
            after.watch.cusum.value[None, :, 0],
            self._testing(after.site) if after.site else None,
        )
        verdict = Verdict(
            index=state.index,
            rows=state.rows,
            t=state.t,
            n=window.rows,
            site=state.site.digest if state.site else None,
            learned=learned,
            refused=refused,
            summary=summary,
            alerts=(
                *fault_alerts,
                *sampling_rate_watch.alerts(state.watch, watching, tick, tester, state.t, where),
                *drift_alerts,
            ),
        )
        return after, verdict

    def _learn(self, state: State) -> tuple[State, Reference | None, str | None]:
        learning = state.learning.add(state.open, windowed=self.shipped.windowed, t=state.t)
        if learning.gathered < self.learn or learning.watched_s < max(self.learn_s, state.learn_s):
            return replace(state, learning=learning), None, None
        empty = self._nothing_learned
        shipped = replace(self.shipped, window=self.window)
        try:
            site = settle(shipped, learning, made="site", strata=self.strata, number=state.learned + 1)
        except BadBundle as refused:
            return replace(state, learning=empty), None, f"{refused}; gathering {self.learn} new windows"
        return replace(state, learning=empty, site=site, learned=state.learned + 1, learn_s=0.0), site, None

    def _testing(self, site: Reference) -> Tester:
        if self._tester is None or self._tester.site is not site:
            assert site.site is not None
            self._tester = Tester(site, site.site)
        return self._tester

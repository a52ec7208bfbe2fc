"""Drift monitor: the state machine of one task. Batches go in; closed drift windows with alerts come out.

It is pure: state and batch in, new state and results out, and the same whatever the batch boundaries.

- A drift window is exactly `window` model windows. Rows outside model windows are not counted. A row in several
  overlapping model windows is counted once, in the first drift window that has it.
- Until `learn_windows` drift windows without a fault are gathered and agree, the site has no reference. Faults are
  raised (limits are the shipped reference's), and drift is "insufficient".
- A drift window in which any field has a fault is kept out of drift tests and learning for all fields, because the
  class that the model named cannot be trusted.
- While a field is read wrongly (another unit, swapped, reversed) nothing is tested or learned, until three windows
  without a fault.
"""

from __future__ import annotations

import contextlib
from functools import partial

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float32s, Float64s, Ints, any_true
from outstation.foundation.errors import BadBundle
from outstation.ml.drift import batches, succession
from outstation.ml.drift.alert_lifecycle import AlertLifecycle
from outstation.ml.drift.baseline import deviation
from outstation.ml.drift.baseline.learning_state import LearningState
from outstation.ml.drift.baseline.modes import CLASS_COUNT, Modes, assign_classes
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.baseline.window_statistics import WindowStatistics
from outstation.ml.drift.batches import FullWindows, MeasuredWindows, WindowAnalysis
from outstation.ml.drift.detectors.registry import GATES, GateStates
from outstation.ml.drift.faults import faults
from outstation.ml.drift.faults.constant_runs import ConstantRuns, run_until_stuck
from outstation.ml.drift.faults.missing_values import MissingValues
from outstation.ml.drift.monitor_settings import MonitorSettings
from outstation.ml.drift.reporting.drift_message import MessageSums, SuiteStatus
from outstation.ml.drift.reporting.field_roles import complete_roles
from outstation.ml.drift.sequential.test_suite import DriftTester, SuiteState
from outstation.ml.drift.state import Batch, DriftState, DriftWindowResult, fill_window, start_next_window
from outstation.ml.drift.window_results import ClosedWindow, build_results, merge_quiet
from outstation.ml.performance.expected_error import NO_ERROR_BINS, ErrorBins
from outstation.protocol.alerts.alert import Alert

_NO_ANSWERS = np.zeros(0, np.int64)


class _Outcome(msgspec.Struct, frozen=True):
    """Outcome of closed windows: alerts, the reference that they completed, and why learned ones were dropped."""

    alerts: tuple[Alert, ...]
    learned: Reference | None
    refused: str | None


class DriftMonitor:
    """Monitor of a task's batches against its shipped reference and, once learned, its site's reference."""

    def __init__(self, settings: MonitorSettings) -> None:
        shipped = settings.shipped
        self.settings = settings
        self.shipped = shipped.with_modes(CLASS_COUNT) if settings.class_field else shipped
        self._units = tuple(settings.units) or ("",) * len(shipped.fields)
        self._alert_lifecycle = AlertLifecycle(shipped, self._units, complete_roles(settings.roles, shipped))
        self._empty_summary = Summary.empty(self.shipped)
        self._empty_learning = LearningState.empty(self.shipped)
        self._tester: DriftTester | None = None

    def rebase(self, basis: Reference) -> DriftMonitor:
        """Return this monitor with another shipped reference."""
        return DriftMonitor(replace(self.settings, basis=basis))

    def start(self) -> DriftState:
        return DriftState.start(self.shipped, self.settings.window, self.settings.class_field)

    def restore(
        self, data: bytes, learning: bytes | None = None, site: bytes | None = None, guard: bytes | None = None
    ) -> DriftState:
        """Restore the state of `to_bytes` with the parts that are kept apart from it, `site` as JSON.

        Raises ValueError if it is damaged or made for another bundle: start anew. Learning begins anew if only
        `learning` is damaged.
        """
        state = DriftState.from_parts(data, site, guard)
        if (state.open_summary.reference, state.window, state.class_field) != (
            self.shipped.digest,
            self.settings.window,
            self.settings.class_field,
        ):
            raise ValueError("this drift state was made for another reference, window length or field of modes")
        if not state.is_compatible(self.shipped.task):
            raise ValueError("this drift state was made by a version with other tests")
        if learning is not None:
            with contextlib.suppress(ValueError):
                gathered = LearningState.from_bytes(learning)
                same_outputs = gathered.further.shape[1] == self.shipped.further_cells
                if same_outputs and gathered.total.reference == self.shipped.digest:
                    return replace(state, learning=gathered)
        return state

    def to_bytes(self, state: DriftState) -> bytes:
        """Encode the state without its large, rarely changing parts: the site's reference, its guard, and learning."""
        return replace(state.without_guard(), learning=self._empty_learning, site_reference=None).to_bytes()

    def restart_row_numbers(self, state: DriftState) -> DriftState:
        """Drop what was gathered of the open drift window, as rows are numbered from 1 again."""
        return replace(start_next_window(state, self._empty_summary), index=state.index, last_counted_row=-1)

    def relearn(self, state: DriftState, duration_s: float = 0.0) -> tuple[DriftState, list[Alert]]:
        """Drop the site's reference, to learn another from at least `duration_s` seconds of readings.

        Also returns the open drift alerts, cleared: the reference they were raised against is gone.
        """
        reason = "this site's reference is learned anew"
        lifecycle = self._alert_lifecycle
        cleared = [
            lifecycle.build_cleared_alert(state, subject, f"{lifecycle.subjects[subject]}: {reason}.")
            for subject in np.flatnonzero(state.suite.open_subjects).tolist()
        ]
        state, faults_cleared = lifecycle.clear_site_faults(state, reason)
        cleared += faults_cleared
        fresh = replace(
            state,
            site_reference=None,
            learning=self._empty_learning,
            suite=SuiteState.start(self.shipped.task),
            gates=GateStates({gate.name: gate.restart(state.gates[gate.name]) for gate in GATES}),
            requested_learn_s=duration_s,
            guard=state.guard.begin_learning(state.site_reference),
            carried=(),
            is_inherited=False,
        )
        cleared += succession.clear_carried(state.carried, reason)
        evidence = {"window": state.index, "rows": list(state.rows)}
        for gate in GATES:
            cleared += gate.clear_alerts(state.gates[gate.name], reason, evidence)
        return fresh, cleared

    def accept_reference(self, state: DriftState) -> tuple[DriftState, list[Alert]]:
        """Accept the site's reference as it is, or the sensors as they are until it is learned.

        Also returns the alerts that this clears.
        """
        if state.site_reference is None:
            return self._alert_lifecycle.clear_site_faults(state, "the sensors were accepted as they are")
        after = replace(state, guard=state.guard.accept(state.site_reference), carried=())
        cleared = self._build_guard_alert(state, after)
        carried = succession.clear_carried(state.carried, "this site's reference was accepted")
        return after, [*([] if cleared is None else [cleared]), *carried]

    def process_batch(
        self,
        state: DriftState,
        features: Float32s,
        starts: Ints,
        window_rows: int,
        predicted: Ints,
        scores: Float32s | None,
        *,
        rows: tuple[int, int],
        t: Ints,
        modes: Modes | None = None,
        answers: Float64s | None = None,
        error_bins: ErrorBins = NO_ERROR_BINS,
        measured: MeasuredWindows | None = None,
    ) -> tuple[DriftState, list[DriftWindowResult]]:
        """Process one batch.

        `features` (n, F) physical units, NaN missing, of stream rows `rows` (first, last) at `t` (n,) epoch µs;
        `starts` (w,) ascending offsets of model windows of `window_rows` rows; `predicted` (w,) and `scores` (w, K) of
        the model; `modes` of model windows, if a field names classes; `answers` (w, P) of the reference's further
        outputs. The bin of the error to expect of each answer is written to `error_bins` (w,) of its output. `measured`
        is what `measure_batch` returned for the same rows and state.
        Raises ValueError if the batch does not follow the last one.
        """
        if len(features) != rows[1] - rows[0] + 1 or len(t) != len(features):
            raise ValueError(f"rows {rows[0]}-{rows[1]} do not match {len(features)} rows of features, {len(t)} times")
        if len(starts) and rows[0] + int(starts[0]) + window_rows - 1 <= state.last_counted_row:
            raise ValueError(
                f"rows up to {state.last_counted_row} were judged before; this batch begins at row {rows[0]}"
            )
        if window_rows != self.shipped.window_rows:
            raise BadBundle(f"the drift reference is for windows of {self.shipped.window_rows} rows, not {window_rows}")
        if self.settings.class_field and modes is not None:
            known, predicted = assign_classes(state.known_modes, modes)
            state = replace(state, known_modes=known)
        top = None if scores is None else np.asarray(scores, np.float64).max(axis=1, initial=-np.inf)
        batch, at = Batch(features, starts, predicted, top, rows[0], t, answers, error_bins), 0
        closed: list[ClosedWindow] = []
        while at < len(starts):
            state, more, at = self._fill_windows(state, batch, at, measured)
            closed += more
        return state, build_results(merge_quiet(closed), self.shipped)

    def measure_batch(
        self, state: DriftState, features: Float32s, starts: Ints, *, first_row: int, t: Ints
    ) -> MeasuredWindows | None:
        """Measure of a batch what does not depend on the model's answers, while the model still computes them.

        The arguments are those of `process_batch`. None if no drift window lies in the batch as a whole.
        """
        batch, first, counted = Batch(features, starts, _NO_ANSWERS, None, first_row, t), 0, state.last_counted_row
        if not len(starts):
            return None
        if state.open_summary.model_windows:
            first = self._find_end(state, batch, 0)
            counted = first_row + int(starts[first - 1]) + self.shipped.window_rows - 1
        windows = batches.find_complete_windows(self.shipped, batch, first, self.settings.window, counted)
        return None if windows is None else windows.measure(self.shipped, batch)

    def _find_end(self, state: DriftState, batch: Batch, first: int) -> int:
        """Return how many model windows there are up to the end of what is added to the open drift window at once."""
        most = int(np.searchsorted(batch.starts, batch.starts[first] + batches.max_rows_per_pass(batch)))
        to_fill = self.settings.window - state.open_summary.model_windows
        return min(first + to_fill, len(batch.starts), max(first + 1, most))

    def _fill_windows(
        self, state: DriftState, batch: Batch, first: int, measured: MeasuredWindows | None
    ) -> tuple[DriftState, list[ClosedWindow], int]:
        """Fill drift windows with model windows from `first` on, process the full ones, and return how far it got."""
        ahead = (
            None
            if state.open_summary.model_windows
            else batches.find_complete_windows(self.shipped, batch, first, self.settings.window, state.last_counted_row)
        )
        full: FullWindows | None = None
        if ahead is None:
            stop = self._find_end(state, batch, first)
            part = batch.slice_windows(slice(first, stop), self.shipped)
            state = fill_window(state, self.shipped, part, self._assign_classes(state, part.stats, part.predicted))
            if state.open_summary.model_windows < self.settings.window:
                return state, [], stop
            full, first = FullWindows.from_state(state, stop), stop
            ahead = batches.find_complete_windows(
                self.shipped, batch, first, self.settings.window, state.last_counted_row
            )
        if ahead is not None:
            more = ahead.summarize(self.shipped, batch, measured, partial(self._assign_classes, state))
            full = full.extend(more) if full else more
        assert full is not None
        return self._process_full_windows(state, full)

    def _process_full_windows(self, state: DriftState, full: FullWindows) -> tuple[DriftState, list[ClosedWindow], int]:
        tester = self._find_tester(state)
        analysis = WindowAnalysis.from_summaries(full.summaries, full.midpoints, self.shipped, tester)
        closed: list[ClosedWindow] = []
        number = 0
        while number < full.windows:
            after, window = self._close_windows(state, full, analysis, number)
            closed.append(window)
            number += window.result.windows
            changed = after.site_reference is not state.site_reference or self._drifting_fields_key(
                after
            ) != self._drifting_fields_key(state)
            state = after
            if changed:
                # Later windows were summarized for other classes, or have no evidence yet.
                break
        return start_next_window(state, self._empty_summary), closed, full.ends[number - 1]

    def _drifting_fields_key(self, state: DriftState) -> bytes:
        """Return a key of the fields that class assignment leaves out."""
        if state.tested_reference is None or not self.shipped.labels:
            return b""
        return state.suite.open_fields.tobytes()

    def _assign_classes(self, state: DriftState, stats: WindowStatistics, predicted: Ints) -> Ints:
        tester = self._find_tester(state)
        return predicted if tester is None else tester.assign_classes(state.suite, stats.values, predicted)

    def _close_windows(
        self, state: DriftState, full: FullWindows, analysis: WindowAnalysis, first: int
    ) -> tuple[DriftState, ClosedWindow]:
        """Close windows from number `first` on: all before one in which something happens, or that one alone."""
        tester = self._find_tester(state)
        plain = 0 if tester is None else batches.count_plain_windows(state, analysis, first)
        ahead = slice(first, first + max(1, plain))
        missing = self._update_missing(state, analysis, ahead, full.start_times)
        known = state.site_reference or self.shipped
        runs = run_until_stuck(state.faults.runs, analysis.summaries, ahead, known)
        identified = self._identify_faults(state, analysis, first, missing[0], runs[0])
        # A single window without the fault does not prove a misread field sound.
        has_fault = faults.excludes_window(identified) or any_true(state.faults.misread)
        is_quiet = not (any_true(missing[0].alarm) or any_true(runs[0].find_stuck(known)))
        plain = min(plain, len(missing), len(runs)) if is_quiet else 0
        tests = batches.advance_tests(
            state, tester, analysis, first, full.start_times, has_fault=has_fault, plain=plain
        )
        closing = slice(first, first + tests.windows)
        before = full.open_windows(state, closing, summarized=tests.nearest is None)
        after = replace(
            before,
            suite=succession.forget_answers(tests.suite) if state.is_inherited else tests.suite,
            gates=tests.gates,
            faults=replace(before.faults, missing=missing[tests.windows - 1], runs=runs[tests.windows - 1]),
        )
        after, outcome = self._conclude_windows(before, after, analysis, first, identified, blocked=tests.blocked)
        result = full.build_result(
            closing,
            before,
            learned_reference=outcome.learned,
            learning_error=outcome.refused,
            alerts=outcome.alerts,
            nearest=tests.nearest,
        )
        status = SuiteStatus(
            cusum_sums=after.suite.cusum.value,
            caution=after.suite.caution,
            layout=after.suite.layout,
            drifting=after.suite.open_subjects.tolist(),
            faults=tuple(several[-1].name if several else None for several in identified),
            tested=tester is not None and not tests.blocked,
            answers_tested=not state.is_inherited,
        )
        sums = MessageSums.from_summaries(analysis.summaries, closing)
        return after, ClosedWindow(result, sums, status, after.gates, self._find_tester(after))

    def _identify_faults(
        self, state: DriftState, analysis: WindowAnalysis, index: int, missing: MissingValues, runs: ConstantRuns
    ) -> tuple[tuple[faults.Fault, ...], ...]:
        """Return the faults of each field in window `index`; `missing` and `runs` are the states after it."""
        return faults.identify_faults(
            analysis.indicators,
            index,
            analysis.summaries,
            self.shipped,
            self._units,
            state.site_reference,
            state.faults.misread,
            state.faults.exchanged,
            missing,
            state.faults.spoilt,
            runs,
        )

    def _conclude_windows(
        self,
        before: DriftState,
        after: DriftState,
        analysis: WindowAnalysis,
        first: int,
        identified: tuple[tuple[faults.Fault, ...], ...],
        *,
        blocked: bool,
    ) -> tuple[DriftState, _Outcome]:
        """Raise and clear alerts and learn, from the state `before` the windows and `after` their tests."""
        tester, site = self._find_tester(before), before.site_reference
        drift_alerts: list[Alert] = []
        guard_alerts: list[Alert] = []
        learned, refused = None, None
        gates = before.gates, after.gates
        if tester is not None and analysis.evidence is not None and not blocked:
            after, drift_alerts = self._alert_lifecycle.update_drifts(
                before, after, analysis.evidence.z[first], analysis.evidence.effects[first], tester
            )
        if self._is_gathering(after) and not blocked:
            after, learned, refused = self._gather_window(after)
            after, guard_alerts = self._build_guard_alerts(before, after)
        scores = None if analysis.evidence is None else analysis.evidence.z[first]
        after, fault_alerts = self._alert_lifecycle.update_faults(after, identified, scores)
        gate_alerts = analysis.build_gate_alerts(first, gates[0], before, gates[1], site, self.shipped)
        return after, _Outcome((*fault_alerts, *gate_alerts, *drift_alerts, *guard_alerts), learned, refused)

    def _is_gathering(self, state: DriftState) -> bool:
        """Return True if windows are gathered to learn from: none while an alert is open but of few missing values."""
        if state.faults.stop_learning or any(gate.is_open for gate in state.gates.values()):
            return False
        return state.site_reference is None or (state.is_inherited and not any_true(state.suite.open_subjects))

    def _update_missing(
        self, state: DriftState, analysis: WindowAnalysis, ahead: slice, start_times: Ints
    ) -> list[MissingValues]:
        """Return the chart of missing values after each of the windows `ahead`, up to the first alarm."""
        chart, missing, rows = state.faults.missing, analysis.summaries.missing[ahead], analysis.summaries.row_counts
        baseline = faults.missing_baseline(self.shipped, state.site_reference)
        if chart.is_idle and not any_true(missing):
            return [chart] * len(missing)
        return chart.update_until_alarm(missing, rows[ahead], start_times[ahead], baseline)

    def _gather_window(self, state: DriftState) -> tuple[DriftState, Reference | None, str | None]:
        settings = self.settings
        learning, before = state.learning.add(state.open_summary, self.shipped.task, t=state.t), state.learning
        gathered, first = replace(state, learning=learning), not self._has_learned(state, before)
        more = learning.total_windows - settings.learn_windows
        # A reference that may need more windows is calibrated again after each quarter of the windows.
        if not self._has_learned(state, learning) or not (first or more % max(1, settings.learn_windows // 4) == 0):
            return gathered, None, None
        # Imported here, as at most starts nothing is learned.
        from outstation.ml.drift.baseline.learning import calibrate_reference, compute_residuals

        fresh, shipped = replace(state, learning=self._empty_learning), replace(self.shipped, window=settings.window)
        number, seasonality = state.learned_count + 1, settings.seasonality
        try:
            site = calibrate_reference(shipped, learning, source="site", seasonality=seasonality, number=number)
        except BadBundle as refused:
            if not (first or self._has_learned(state, learning, settings.learn_extension)):
                return gathered, None, None
            return fresh, None, f"{refused}; gathering {settings.learn_windows} new windows"
        residuals = compute_residuals(shipped, learning, site, seasonality)
        guard = state.guard.check(
            site, self.shipped, residuals, learning.t[:, 0], self._units, hold=settings.hold_deviating
        )
        assert site.site is not None
        if site.site.needs_more_windows and not self._has_learned(state, learning, settings.learn_extension):
            # A change is reported at once, however long learning takes.
            return replace(gathered, guard=state.guard.announce_steps(guard)), None, None
        if state.is_inherited:
            # Sums towards alarms were measured from the inherited reference.
            fresh = replace(fresh, suite=SuiteState.start(self.shipped.task))
        learned = {"site_reference": site, "learned_count": number, "requested_learn_s": 0.0, "guard": guard}
        return replace(fresh, **learned, is_inherited=False), site, None

    def _build_guard_alert(self, before: DriftState, after: DriftState) -> Alert | None:
        if after.guard is before.guard:
            return None
        window = {"window": before.index, "rows": list(before.rows)}
        return deviation.build_alert(after.guard, before.guard, window, learning=after.learning.windows > 0)

    def _build_guard_alerts(self, before: DriftState, after: DriftState) -> tuple[DriftState, list[Alert]]:
        """Return the alerts of a gathered window: a reference that does not deviate ends what was carried over."""
        guard_alert = self._build_guard_alert(before, after)
        alerts = [] if guard_alert is None else [guard_alert]
        if after.guard is before.guard or after.guard.deviations:
            return after, alerts
        reason = "the reference that was learned since does not deviate from the one before"
        return replace(after, carried=()), [*alerts, *succession.clear_carried(after.carried, reason)]

    def _find_tester(self, state: DriftState) -> DriftTester | None:
        reference = state.tested_reference
        return None if reference is None else self._get_tester(reference)

    def _has_learned(self, state: DriftState, learning: LearningState, times: float = 1.0) -> bool:
        """Return True if the required windows and seconds are gathered this number of times."""
        required_s = times * max(self.settings.min_learn_s, state.requested_learn_s)
        return learning.total_windows >= times * self.settings.learn_windows and learning.observed_s >= required_s

    def _get_tester(self, reference: Reference) -> DriftTester:
        if self._tester is None or self._tester.reference is not reference:
            self._tester = DriftTester(reference)
        return self._tester

"""Drift, faults and expected accuracy of a task's readings: pure numpy, no I/O, deterministic.

    reference.py    what is normal: bins, limits, class statistics, calibration; the format of reference.json
    learning.py     from drift windows to a reference: `build` for a bundle, `settle` for a site
    calibration.py  how a test varies over the windows of a reference, odd ones among them
    middle.py       medians
    daily.py        what the hour of the day and days of rest do to a site's statistics
    modes.py        classes for a model that names none, from a field of the stream
    season.py       slow changes of several fields together
    statistics.py   statistics of a model window, and the tests of a drift window within each class
    joint.py        how pairs of fields move together
    ticks.py        the time from row to row, and rows that repeat the one before
    pace.py         how fast signals move from row to row
    rate.py         what is usual of both at a site, and what is a fault
    watch.py        the subject "rate": its faults, its drift, its alerts
    site.py         what only a site's own reference has
    summary.py      one drift window as numbers that add: `Summary`
    groups.py       which things in a row belong together
    counting.py     what is counted of rows and answers
    runs.py         from row to row: steps, runs of one value, lone jumps
    sums.py         counts, sums and squares of many groups at once
    whole.py        drift windows that a batch holds whole, summarized many at a time
    describe.py     what a drift message says of a summary
    sizes.py        PSI, JS, KS, W1: reported, never an alarm
    limits.py       how many false alarms each kind of test may raise, and the limits that follow
    cusum.py        what raises and clears a drift alarm of a mean, a spread, a pair, the certainty
    shape.py        the same of a distribution's shape
    together.py     the same of many small shifts
    places.py       where each test stands
    detectors.py    all tests of a drift window against the site's reference
    course.py       how they go on over windows in a row, and what raises an alarm
    seen.py         what windows say by themselves
    quiet.py        windows in which nothing happens, judged together
    ramp.py         whether a change came at once or grows
    faults.py       sensor faults, told apart from drift
    extremes.py     a drift window's outermost values, and when a sensor saturates
    steps.py        how finely a sensor tells values apart
    channels.py     fields that changed places, or whose sign is reversed
    units.py        which other unit readings seem to be in
    estimate.py     accuracy without labels
    raising.py      which alerts a window raises, clears and withdraws
    drifts.py       the sentence of a drift alert
    alerts.py       alerts, and the sentences of faults
    words.py        times in sentences
    state.py        what is remembered, and how a drift window fills
    judge.py        the state machine of a task: `Judge.step`
    reported.py     a drift message's members, read back by who looks at many
    timeline.py     how drift went over such windows, in bounded memory
    truth.py        labels, and what they may be
    quality.py      how good labelled results were, by metric
    slices.py       where they were worse than elsewhere
    intervals.py    how sure that is, where neighbours are alike
    decay.py        labels against what was promised, as they come
    codec.py        to JSON and bytes, and back

A *drift window* holds several *model windows*; a model that answers each row has model windows of one row.
"""

from agent.drift.baseline.learning import build_reference
from agent.drift.baseline.reference import Reference
from agent.drift.monitor import DriftMonitor
from agent.drift.state import DriftState, DriftWindowResult

__all__ = ["DriftMonitor", "DriftState", "DriftWindowResult", "Reference", "build_reference"]

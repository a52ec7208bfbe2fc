"""Forged readings before a device's drift monitor: how often each attack is noticed, when, and by what.

A site learns from windows drawn at random from recordings. Then 20 drift windows come in which every model window, or
one in twenty, is forged. The control is as many drift windows of honest readings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import click
import msgspec
import numpy as np

from outstation.protocol.alerts.alert import Alert
from scripts.benchmarks import Report, Result, Section, benchmark
from scripts.benchmarks.drift_peers import forged_sites
from scripts.benchmarks.drift_peers.forged_sites import Device, MahalanobisTest, Subject

WATCHED, SITES, QUIET = 20, 10, 5  # drift windows; sites; quiet runs of each
RARE = 20  # model windows of which one is forged
HONEST_WINDOWS = 4000  # that the compared test learns from
PER_1000 = 10.0
SECTION = "Forged readings"
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "exercise": lambda: forged_sites.load_shipped("exercise"),
    "machine": lambda: forged_sites.load_shipped("machine"),
    "keywords": forged_sites.load_keywords,
}
HEAD = f"""\
`scripts/bench forged-readings`: readings that an attacker chose, at {SITES} sites of each model. *Noticed*: sites with
an alert within {WATCHED} drift windows, and the median drift window of the first one, if every model window is forged,
or one in {RARE}. *Unlike training*: alerts that say so. *Mahalanobis*: share of forged model windows that a test of
single windows flags, which flags one honest window in 1000 (means and log variances, within the named class)."""


class Trials(msgspec.Struct):
    """Runs of WATCHED drift windows each."""

    runs: int = 0
    delays: list[int] = []
    first: Counter[str] = msgspec.field(default_factory=Counter)
    alerts: int = 0
    unlike: int = 0  # alerts about readings unlike those of the training

    def add(self, raised: list[tuple[int, Alert]]) -> None:
        self.runs += 1
        self.alerts += len(raised)
        self.unlike += sum("unlike anything the model was trained on" in alert.summary for _, alert in raised)
        if raised:
            window, alert = raised[0]
            self.delays.append(window)
            self.first[f"{alert.alert} {alert.evidence.get('fault') or alert.evidence.get('test')}"] += 1

    def summarize(self) -> str:
        """Return how many runs raised an alert, and its median window."""
        return f"{len(self.delays)} of {self.runs}" + (f", {np.median(self.delays):g}" if self.delays else "")


class AttackTrials(msgspec.Struct):
    always: Trials = msgspec.field(default_factory=Trials)
    rare: Trials = msgspec.field(default_factory=Trials)
    mahalanobis: float = 0.0


class Measured(msgspec.Struct):
    name: str
    honest: Trials = msgspec.field(default_factory=Trials)
    attacks: dict[str, AttackTrials] = {}


def measure(subject: Subject, sites: int = SITES, quiet: int = QUIET) -> Measured:
    """Run each attack at each site."""
    device, measured = Device(subject), Measured(subject.name)
    forgeries = list(forged_sites.forge(subject, 0))
    test = MahalanobisTest(subject, subject.draw(HONEST_WINDOWS, np.random.default_rng(5)))
    for forgery in forgeries:
        measured.attacks[forgery.name] = AttackTrials(mahalanobis=test.flagged_share(forgery.windows))
    count = WATCHED * device.window
    for site in range(sites):
        learned, rng = device.learn(site), np.random.default_rng([site, 3])
        for _ in range(quiet):
            measured.honest.add(device.watch(learned, subject.draw(count, rng))[1])
        for forgery in forgeries:
            trials = measured.attacks[forgery.name]
            forged = forgery.windows[rng.integers(0, len(forgery.windows), count)]
            trials.always.add(device.watch(learned, forged)[1])
            mixed = subject.draw(count, rng)
            at = np.arange(rng.integers(0, RARE), count, RARE)
            mixed[at] = forged[at]
            trials.rare.add(device.watch(learned, mixed)[1])
    return measured


def table(measured: Measured) -> str:
    honest = measured.honest
    lines = [
        f"| {measured.name} | noticed | first by | unlike training | noticed, 1 in {RARE} | first by | Mahalanobis |",
        "|---|---:|---|---:|---:|---|---:|",
        f"| honest readings | {honest.summarize()} | {_most_common(honest)} | {_unlike(honest)} | | | 0.1% |",
    ]
    lines += [
        f"| {name} | {trials.always.summarize()} | {_most_common(trials.always)} | {_unlike(trials.always)} "
        f"| {trials.rare.summarize()} | {_most_common(trials.rare)} | {trials.mahalanobis:.0%} |"
        for name, trials in measured.attacks.items()
    ]
    return "\n".join(lines)


def _most_common(trials: Trials) -> str:
    return ", ".join(name for name, _ in trials.first.most_common(2))


def _unlike(trials: Trials) -> str:
    return f"{trials.unlike} of {trials.alerts}" if trials.alerts else ""


def _results(measured: Measured) -> Iterator[Result]:
    honest = measured.honest
    note = f"{honest.alerts} alerts in {honest.runs * WATCHED} drift windows"
    per_1000 = 1000 * honest.alerts / (honest.runs * WATCHED)
    yield Result.within(f"forged-readings, {measured.name}: honest", per_1000, PER_1000, "per 1000 windows", note)
    missed = sum(trials.always.runs - len(trials.always.delays) for trials in measured.attacks.values())
    runs = sum(trials.always.runs for trials in measured.attacks.values())
    share, note = 100 * (runs - missed) / runs, f"{missed} of {runs} attacks on every window missed"
    yield Result(f"forged-readings, {measured.name}: noticed", share, 90.0, "per cent", 1.0, note)


@benchmark("forged-readings")
def forged_readings() -> Report:
    """Run all attacks before the drift monitors of three models."""
    results, tables = list[Result](), [HEAD]
    for name, load in SUBJECTS.items():
        try:
            measured = measure(load())
        except click.ClickException as lacking:
            click.echo(f"{name}: skipped: {lacking.message}", err=True)
            continue
        results += _results(measured)
        tables.append(table(measured))
    text = "\n\n".join(tables)
    return Report(results, text, Section("docs/internals/drift-benchmarks.md", SECTION, text))

"""Command `scripts/torture`; exit code 1 if a fault lost or duplicated rows, or a negative control lost none."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import msgspec

from scripts import faults
from scripts.faults import Fault
from scripts.faults.oracle import Verdict, settle
from scripts.faults.world import World


class Outcome(msgspec.Struct):
    """Results of all rounds of one fault; `skipped` is the reason for running none."""

    fault: Fault
    seed: int
    verdicts: list[Verdict] = msgspec.field(default_factory=list)
    skipped: str | None = None
    folder: Path | None = None

    @property
    def passed(self) -> bool:
        if self.skipped is not None:
            return True
        lost = any(self.lost(v) or v.misdated for v in self.verdicts)
        if self.fault.control:
            return lost
        undamaged = self.fault.damages or not any(v.declared for v in self.verdicts)
        return undamaged and not lost and not any(v.doubled or v.problems for v in self.verdicts)

    def lost(self, verdict: Verdict) -> int:
        """Return the number of lost rows; after a control, declared rows count as lost too."""
        return verdict.lost + (verdict.declared if self.fault.control else 0)

    def document(self) -> dict[str, Any]:
        """Return the report of `scripts/torture --json`."""
        last = self.verdicts[-1] if self.verdicts else Verdict()
        return {
            "fault": self.fault.name,
            "rounds": len(self.verdicts),
            "acknowledged": last.acknowledged,
            "lost": max((self.lost(v) for v in self.verdicts), default=0),
            "doubled": max((v.doubled for v in self.verdicts), default=0),
            "recovery_s": round(max((v.recovery_s for v in self.verdicts), default=0.0), 1),
            "passed": self.passed,
            "declared": max((v.declared for v in self.verdicts), default=0),
            "misdated": max((v.misdated for v in self.verdicts), default=0),
            "seed": self.seed,
            "skipped": self.skipped,
            "problems": list(dict.fromkeys(p for v in self.verdicts for p in v.problems))[:5],
        }


def torture(fault: Fault, rounds: int, seed: int, folder: Path) -> Outcome:
    """Run `rounds` rounds of one fault in one world; each is healed and judged before the next."""
    outcome = Outcome(fault, seed, skipped=fault.setting.missing(), folder=folder)
    if outcome.skipped is not None:
        return outcome
    rng = random.Random(f"{fault.name}/{seed}")
    with World(folder, fault.setting, random.Random(f"rows/{seed}")) as world:
        for _ in range(rounds):
            world.resume()
            fault.inject(world, rng)
            verdict = settle(world, fault.patience_s, expects_loss=fault.control)
            if verdict.logs > 1 and not fault.damages:
                verdict.problems.append(f"{verdict.logs} logs, though nobody damaged the store")
            outcome.verdicts.append(verdict)
            if outcome.verdicts[-1].problems or (fault.control and outcome.passed):
                break
    return outcome


@click.command()
@click.option("--fault", "names", multiple=True, help="Inject this fault; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Inject all faults, negative controls included.")
@click.option("--rounds", default=3, show_default=True, help="Rounds per fault.")
@click.option("--seed", default=1, show_default=True, help="Seed; equal seeds inject at equal moments.")
@click.option("--jobs", default=1, show_default=True, help="Faults to run in parallel, each in its own world.")
@click.option("--list", "listing", is_flag=True, help="List the faults with a description.")
@click.option("--keep", is_flag=True, help="Keep the folders of failed faults.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    names: tuple[str, ...],
    everything: bool,
    rounds: int,
    seed: int,
    jobs: int,
    listing: bool,
    keep: bool,
    as_json: bool,
) -> None:
    """Inject faults, heal them, and count lost rows. Example: scripts/torture --fault kill-daemon --rounds 20."""
    known = faults.load()
    if listing:
        click.echo("\n".join(f"{name:32} {event}" for name, (event, _) in faults.read_table().items()))
        return
    unknown = [name for name in names if name not in known]
    if unknown or not (names or everything):
        raise click.UsageError(f"name a fault (--list lists them), or --all{': no ' + unknown[0] if unknown else ''}")
    with ThreadPoolExecutor(jobs) as worlds:
        started = [worlds.submit(_one, known[name], rounds, seed, keep) for name in (known if everything else names)]
        for ended in as_completed(started):
            if not as_json:
                click.echo(row(ended.result()))
    outcomes = [ended.result() for ended in started]
    if as_json:
        click.echo(json.dumps([outcome.document() for outcome in outcomes], indent=2))
    else:
        click.echo(summary(outcomes))
    sys.exit(0 if all(outcome.passed for outcome in outcomes) else 1)


def _one(fault: Fault, rounds: int, seed: int, keep: bool) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix=f"torture-{fault.name}-"))
    outcome = Outcome(fault, seed)
    try:
        outcome = torture(fault, rounds, seed, folder)
    except Exception:
        outcome.verdicts.append(Verdict(problems=[traceback.format_exc(limit=-4)]))
    if keep and not outcome.passed:
        click.echo(f"kept: {folder}", err=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def row(outcome: Outcome) -> str:
    if outcome.skipped is not None:
        return f"{outcome.fault.name:32} skipped: {outcome.skipped}"
    document = outcome.document()
    columns = "{rounds:6} rounds {acknowledged:8} acknowledged {lost:5} lost {declared:5} declared {doubled:3} doubled"
    text = columns.format_map(document)
    verdict = "ok" if outcome.passed else "FAILED"
    details = "".join(f"\n    {line}" for problem in document["problems"] for line in problem.splitlines())
    return (
        f"{outcome.fault.name:32}{text} {document['recovery_s']:7.1f} s  {verdict}{'' if outcome.passed else details}"
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    ran = [outcome for outcome in outcomes if outcome.skipped is None]
    failed = [outcome.fault.name for outcome in ran if not outcome.passed]
    text = f"{len(ran)} faults, {sum(len(outcome.verdicts) for outcome in ran)} rounds"
    return f"{text}: {'FAILED: ' + ', '.join(failed) if failed else 'nothing lost, nothing doubled'}"


if __name__ == "__main__":
    main()

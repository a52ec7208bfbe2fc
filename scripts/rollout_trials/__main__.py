"""Command `scripts/rollouts`; exit code 1 if a rollout ended unexpectedly or an audit failed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from outstation.protocol.wire import keys
from scripts.rollout_trials.trials import TRIALS, Trial, make_bundle, problems

# Time limit of one trial, which ends with its decision; fifty devices take a minute to start on two cores.
_LONGEST_S, _STARTS_S = 900.0, 300.0
# Replay speed of the recordings: ten windows per second, so that a minute shows enough different windows.
_SPEED = 20


@click.command()
@click.option("--only", "names", multiple=True, metavar="NAME", help="Run this trial; repeatable.")
@click.option("--devices", default=50, show_default=True, type=click.IntRange(4, 200), help="Devices per fleet.")
@click.option("--seed", default=1, show_default=True, help="Seed of sites and recordings.")
@click.option("--list", "listing", is_flag=True, help="List the trials with a description.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(names: tuple[str, ...], devices: int, seed: int, listing: bool, as_json: bool) -> None:
    """Roll bundles out in simulated fleets, one after the other.

    Example: scripts/rollouts --only crash --devices 12.
    """
    known = {trial.name: trial for trial in TRIALS}
    if listing:
        click.echo("\n".join(f"{trial.name:22} {trial.about}" for trial in TRIALS))
        return
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"there is no trial {unknown[0]!r}; --list names them")
    results = []
    for trial in [known[name] for name in names or known]:
        results.append(run(trial, devices, seed))
        if not as_json:
            click.echo(row(results[-1]))
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        click.echo(summary(results))
    sys.exit(0 if all(trial_result["passed"] for trial_result in results) else 1)


def run(trial: Trial, devices: int, seed: int) -> dict[str, Any]:
    """Run one trial in its own fleet by `fleet simulate`, and return the problems with its outcome."""
    with tempfile.TemporaryDirectory(prefix="rollout-") as name:
        folder = Path(name)
        key = keys.generate(folder / "publisher.key")
        make_bundle(trial.bundle, folder, key)
        plan = folder / "rollout.toml"
        plan.write_text(trial.plan(trial.bundle, devices), encoding="utf-8")
        hard = max(1, devices // trial.hard)
        counts = {
            "devices": devices,
            "seed": seed,
            "speed": _SPEED,
            "worse": trial.worse,
            "away": hard,
            "cut": hard,
            "slow": hard,
        }
        options = [word for option, value in counts.items() for word in (f"--{option}", str(value))]
        command = [sys.executable, "-m", "outstation", "fleet", "simulate", "--rollout", str(plan), "--json", *options]
        command += ["--publisher", key.public.text, "--duration", str(_LONGEST_S), "--dir", str(folder / "fleet")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S + _STARTS_S, check=False)
    if not done.stdout:
        failure = f"exit code {done.returncode}: {done.stderr.strip()[-500:]}"
        return {"trial": trial.name, "devices": devices, "seed": seed, "passed": False, "problems": [failure]}
    return _judged(trial, json.loads(done.stdout), seed)


def _judged(trial: Trial, report: dict[str, Any], seed: int) -> dict[str, Any]:
    wrong = problems(trial, report)
    rollout, devices = report["rollout"], report["devices"]
    return {
        "trial": trial.name,
        "devices": len(devices),
        "seed": seed,
        "state": rollout["state"],
        "step": rollout["step"],
        "phases": dict(Counter(device["phase"] or "unknown" for device in devices)),
        "runs": dict(Counter(device["runs"]["version"] for device in devices if device["runs"])),
        "served": rollout["served"],
        "back": {device["device"]: device["reason"] for device in devices if device["phase"] == "rolled_back"},
        "restarts": [ended for device in devices for ended in device["restarts"]],
        "last": rollout["decisions"][-1]["summary"],
        "audit": report["audit"]["passed"],
        "messages": report["audit"]["messages"],
        "seconds": report["seconds"],
        "passed": not wrong,
        "problems": wrong,
    }


def row(trial_result: dict[str, Any]) -> str:
    if "state" not in trial_result:
        return f"{trial_result['trial']:22} FAILED\n    {trial_result['problems'][0]}"
    runs = ", ".join(f"{count} run {version}" for version, count in sorted(trial_result["runs"].items()))
    text = f"{trial_result['trial']:22} {trial_result['state']:9} step {trial_result['step']}  {runs:28}"
    text += f" {trial_result['served']:6} served "
    audit = f"audit {'passed' if trial_result['audit'] else 'FAILED'} of {trial_result['messages']:6}"
    details = "".join(f"\n    {line}" for line in (*trial_result["problems"], *trial_result["restarts"]))
    verdict = "ok" if trial_result["passed"] else "FAILED"
    return f"{text} {audit} {trial_result['seconds']:6.0f} s  {verdict}\n    {trial_result['last']}{details}"


def summary(results: Iterable[dict[str, Any]]) -> str:
    each = list(results)
    failed = [trial_result["trial"] for trial_result in each if not trial_result["passed"]]
    return f"{len(each)} rollouts: {'FAILED: ' + ', '.join(failed) if failed else 'all ended as expected'}"


if __name__ == "__main__":
    main()

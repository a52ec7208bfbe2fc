"""The ten rollout trials: bundle, steps, impaired devices, expected end, and deviations from it.

Times are minutes where a field rollout takes days; everything else is realistic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.authoring import pack
from scripts.kit import rigged

# Candidates to follow the shipped `exercise`. A rigged one is the shipped model with a trap that its golden vectors do
# not trigger (`scripts/kit/rigged.py`).
_TRAINED = Path(__file__).parents[2] / "models" / "sources" / "exercise" / "candidates"
TRAINED = ("distilled", "shuffled", "touchy")
RIGGED = {"slow": "1.4.0", "crash": "1.5.0", "hang": "1.6.0", "error": "1.7.0"}
# Functions of the window that the slow model computes in vain.
_TIMES = 1500
_BACK = frozenset({"rolled_back", "rejected"})
Where = Literal["finished", "shadow", "canary"]

# Answers first, then time: a slow model is correct, and shows under load only. With fifty devices on two cores most
# time is spent waiting: a model that takes a hundred times as long was measured at ten times.
_SHADOW = 'strategy = "shadow"\npercent = {shadow}\n'
_CANARY = 'strategy = "canary"\npercent = {canary}\nmax_latency_ratio = 4.0\n'
_ALL = 'strategy = "all"\nmax_latency_ratio = 4.0\n'
STAGED = (_SHADOW, _CANARY, _ALL)


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial that ends in the state `ends`: completed, or stopped in that step.

    Every `hard`-th device is away, disconnected and slow; 0 means none. `worse` sites have a faulty sensor; exactly the
    `back` sites must roll the bundle back. `serves` tells whether results may carry its digest. `batches` is the number
    of trial batches per device, enough to detect the difference.
    """

    name: str
    bundle: str
    ends: Where
    about: str
    steps: tuple[str, ...] = STAGED
    hard: int = 10
    worse: int = 0
    back: bool = False
    serves: bool = True
    batches: int = 24

    def plan(self, path: str, devices: int) -> str:
        """Return the rollout plan. Few devices allow no step of a few per cent."""
        # Twenty per cent of fifty can be four devices, fewer than a step's minimum.
        shares = dict.fromkeys(("shadow", "canary"), 60.0 if devices < 20 else 40.0)
        # Most of a step's devices: a few may never meet the data that a bad bundle fails on.
        needed = max(2, int(0.5 * devices * shares["shadow"] / 100))
        steps = "".join(f"\n[[steps]]\n{step.format(**shares)}" for step in self.steps)
        return (
            f'[rollout]\nname = "{self.name}"\ntask = "exercise"\npath = "{path}"\ntarget = "all"\n'
            f"\n[promote]\nmin_devices = {needed}\nmin_batches = 10\nmin_hours = 0.005\nmin_agreement = 0.5\n"
            "max_failed_share = 0.3\n"
            # A shared machine is late, while a batch takes milliseconds. Estimates without labels are off: the
            # candidates are not calibrated.
            f"\n[device_rules]\nmin_batches = {self.batches}\nmin_hours = 0.002\nmin_agreement = 0.75\n"
            "max_latency_ratio = 10.0\nbatch_timeout_s = 10.0\n"
            f"max_accuracy_drop = 0.5\nhold_off_hours = 24.0\n{steps}"
        )


TRIALS = (
    Trial("good", "distilled", "finished", "a smaller network, as right as the old one: shadow, canary, all"),
    Trial("good-at-once", "distilled", "finished", "the same to all devices at once", steps=(_ALL,)),
    Trial(
        "good-on-bad-lines", "distilled", "finished", "the same where most devices are away, cut off or slow", hard=4
    ),
    Trial(
        "good-and-worse-sites", "distilled", "finished", "the same with a gyroscope out of order on two sites", worse=2
    ),
    Trial("shuffled-labels", "shuffled", "shadow", "a network that learned from shuffled labels", serves=False),
    Trial("slow", "slow", "canary", "right, and a hundred times slower"),
    Trial("crash", "crash", "shadow", "ends its process on some windows", serves=False),
    Trial("hang", "hang", "shadow", "never answers on some windows", serves=False),
    Trial("errors", "error", "shadow", "the runtime refuses to run it on some windows", serves=False),
    Trial(
        "drift-sensitive",
        "touchy",
        "finished",
        "right but where a sensor is out of order: two sites take it back",
        worse=2,
        back=True,
        batches=60,
    ),
)


def problems(trial: Trial, report: dict[str, Any]) -> list[str]:
    """Return a sentence for each deviation from the expected outcome."""
    rollout, devices = report["rollout"], report["devices"]
    lines = []
    if not report["audit"]["passed"]:
        wrong = [entry for key in ("gaps", "invalid", "invalid_decisions") for entry in report["audit"].get(key, [])]
        lines.append(f"the audit fails: {wrong[:3]}")
    if not rollout["ended"]:
        lines.append("it did not end in time")
    if not trial.serves and rollout["served"]:
        lines.append(f"{rollout['served']} messages carry results of a bundle that should never serve")
    silent = [device["device"] for device in devices if device["runs"] is None]
    if silent:
        lines.append(f"no results at all from {', '.join(silent)}")
    lines += _finished(trial, rollout, devices) if trial.ends == "finished" else _stopped(trial, rollout, devices)
    return lines


def _finished(trial: Trial, rollout: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[str]:
    if rollout["state"] != "finished":
        yield f"it is {rollout['state']} at step {rollout['step']}, and should be finished"
    worse = set(rollout["disturbances"]["worse"]) if trial.back else set()
    for device in devices:
        back = device["device"] in worse
        if device["phase"] not in (_BACK if back else {"active"}):
            where = f"is {device['phase'] or 'unknown'} ({device['why']})"
            yield f"{device['device']} {where}, and should {'have taken it back' if back else 'have settled on it'}"
        if _runs_it(device, rollout) == back:
            yield f"{device['device']} runs {device['runs']}, and should {'not ' if back else ''}run it"


def _stopped(trial: Trial, rollout: dict[str, Any], devices: list[dict[str, Any]]) -> Iterator[str]:
    if rollout["state"] != "aborted":
        yield f"it is {rollout['state']} at step {rollout['step']}, and should be aborted"
    if rollout["strategy"] != trial.ends:
        yield f"it was stopped in {rollout['strategy']}, and should be in {trial.ends}"
    if still := [device["device"] for device in devices if _runs_it(device, rollout)]:
        yield f"{', '.join(still)} still run it"


def _runs_it(device: dict[str, Any], rollout: dict[str, Any]) -> bool:
    return device["runs"] is not None and device["runs"]["digest"] == rollout["digest"]


def make_bundle(name: str, folder: Path, key: SigningKey) -> Path:
    """Create the signed bundle `name` and return its folder."""
    out = folder / name
    if name in RIGGED:
        return rigged.write_bundle(rigged.build_rigged_bundle(name, RIGGED[name], key, repeats=_TIMES), out)
    pack.write_bundle(pack.pack(_TRAINED / f"{name}.toml", key), out)
    return out

"""The ten trials: bundle, rollout steps, impaired devices and expected end.

Times are minutes where a field rollout takes days; everything else is realistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        shares = _shares(devices)
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


def _shares(devices: int) -> dict[str, float]:
    # Twenty per cent of fifty can be four devices, fewer than a step's minimum.
    share = 60.0 if devices < 20 else 40.0
    return {"shadow": share, "canary": share}


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

"""The ten trials: which bundle goes out, in which steps, who has it hard, and how it should end.

Times are of a laboratory, minutes where a field has days; everything else is as it would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Where = Literal["finished", "shadow", "canary"]

# First the answers only, then the time too: a slow model is right, and is found out where it has work to do.
# Where fifty devices share two cores, time is mostly spent waiting: one that takes a hundred times as long was measured
# at ten.
_SHADOW = 'strategy = "shadow"\npercent = {shadow}\n'
_CANARY = 'strategy = "canary"\npercent = {canary}\nmax_latency_ratio = 4.0\n'
_ALL = 'strategy = "all"\nmax_latency_ratio = 4.0\n'
STAGED = (_SHADOW, _CANARY, _ALL)


@dataclass(frozen=True, slots=True)
class Trial:
    """`ends`: at the end, or stopped in that step. `hard`: every so many devices are away, cut off and slow; 0: none.

    `worse` sites have a sensor out of order, and `back`: it is these that take the bundle back, and no other.
    `serves`: whether any result may carry its digest. `batches` that a device tries it for: as many as tell apart what
    it should.
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
        """The roll-out file. Few devices make no step of a few percent."""
        shares = _shares(devices)
        # Most of those that a step chooses: a few may be lucky, and never see what an ill bundle stumbles over.
        needed = max(2, int(0.5 * devices * shares["shadow"] / 100))
        steps = "".join(f"\n[[steps]]\n{step.format(**shares)}" for step in self.steps)
        return (
            f'[rollout]\nname = "{self.name}"\ntask = "exercise"\npath = "{path}"\ntarget = "all"\n'
            f"\n[promote]\nmin_devices = {needed}\nmin_batches = 10\nmin_hours = 0.005\nmin_agreement = 0.5\nmax_failed_share = 0.3\n"
            # A machine that is shared with others is late; a batch takes milliseconds. What is expected without labels
            # is not asked: nobody calibrated these candidates.
            f"\n[device_rules]\nmin_batches = {self.batches}\nmin_hours = 0.002\nmin_agreement = 0.75\nmax_latency_ratio = 10.0\nbatch_timeout_s = 10.0\n"
            f"max_accuracy_drop = 0.5\nhold_off_hours = 24.0\n{steps}"
        )


def _shares(devices: int) -> dict[str, float]:
    # Of fifty, twenty per cent can be four: fewer than a step should be judged by.
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

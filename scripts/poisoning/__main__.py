"""Table of all trials.

    python -m scripts.poisoning [--seeds 20] [--only exercise]

Public tables need scikit-learn, which the product does not: `pip install scikit-learn`.
"""

from __future__ import annotations

import argparse
import time

from outstation.ml.performance.intervals import wilson
from scripts.poisoning import sets, trials
from scripts.poisoning.attacks import ATTACKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.poisoning", description="Trials of the poisoning checks.")
    parser.add_argument("--seeds", type=int, default=20, help="sets of each kind (default 20)")
    parser.add_argument("--only", default="", help="only sets whose name begins so")
    parser.add_argument("--clean", action="store_true", help="only the sets without poison")
    options = parser.parse_args()
    seeds = range(options.seeds)
    recorded = {"exercise": sets.exercise, "machine": sets.machine, "solar": sets.solar, **sets.list_public()}
    loaded = {name: load() for name, load in recorded.items() if name.startswith(options.only)}
    accused, total = 0, 0
    for name, windows in {**loaded, **sets.list_generated(0)}.items():
        begin = time.perf_counter()
        results = list(trials.accuse_clean(windows, seeds)) if name.startswith(options.only) else []
        if not results:
            continue
        false = [text for _, text in results if text]
        accused, total = accused + len(false), total + len(results)
        seconds = (time.perf_counter() - begin) / len(results)
        print(f"| {name} | {len(windows)} | {len(false)} of {len(results)} | {seconds:.1f} s |", *false[:3], flush=True)
    low, high = wilson(accused / max(1, total), total)
    print(f"clean sets accused: {accused} of {total}, {low:.2%} to {high:.2%}\n")
    for name, windows in loaded.items() if not options.clean else ():
        for attack in ATTACKS:
            result = trials.try_attack(windows, attack, seeds)
            shown = f"{result.hits} of {result.trials} | {result.precision:.0%} | {result.recall:.0%}"
            print(f"| {name} | {attack.name} | {shown} |", flush=True)


if __name__ == "__main__":
    main()

"""Judge and time what variants.py made, side by side: small.json, and from that models/README.md and its picture.

Runs with the agent, not with TensorFlow: figures are those of `outstation model evaluate`, times those of the agent's
own runtime.

    python compare.py FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import show_small
from pace import HELD_OUT, Pace, loaded, measure

from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference import runtime, tuning
from outstation.workbench.evaluation import evaluate
from outstation.workbench.evaluation.document import Evaluation, IntervalEstimate

HERE = Path(__file__).parent
SEEDS = HERE / "small_seeds.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    ours = bundle.read(builtin.bundles_dir() / "exercise", None)
    variants = json.loads((folder / "variants.json").read_text())
    files = [folder / f"{variant['file']}.tflite" for variant in variants]
    judged = [evaluated(ours, file, files[0]) for file in files]
    print("measuring times, about a minute", flush=True)
    paces = measure([loaded(file) for file in files])
    rows = [row(*each) for each in zip(variants, files, judged, paces.each, strict=True)]
    seeds = json.loads(SEEDS.read_text())
    for one, variant in zip(rows, variants, strict=True):
        if variant["seeds"]:
            one["seeds"] = seeds["accuracy"][variant["seeds"]]
    found = {
        "machine": tuning.describe_machine(),
        "runtime": runtime.RUNTIME_NAME,
        "windows": judged[0].data.windows,
        "intervals": judged[0].intervals,
        "rounds": paces.rounds,
        "rest_us": paces.rest_us,
        "seeds": seeds,
        "variants": rows,
    }
    show_small.DATA.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show_small.write(found)


def evaluated(ours: Bundle, file: Path, float32: Path) -> Evaluation:
    """The model in `file` in place of the shipped bundle's, beside the float one."""
    files = {"manifest.json": ours.files["manifest.json"], "model.tflite": file.read_bytes()}
    other = Bundle(ours.manifest, "", files, "")
    beside = None if file == float32 else float32
    request = evaluate.EvaluationRequest(data=HELD_OUT, group="subject", float_model=beside, latency=False)
    found = evaluate.evaluate(other, loaded(file), "", request, lambda _: None)
    accuracy = next(one for one in found.metrics if one.metric == "accuracy")
    print(f"{file.stem}: {accuracy.value} [{accuracy.low}, {accuracy.high}]", flush=True)
    return found


def row(variant: dict[str, Any], file: Path, found: Evaluation, pace: Pace) -> dict[str, Any]:
    accuracy = next(one for one in found.metrics if one.metric == "accuracy")
    other = found.against
    return {
        "name": variant["name"],
        "network": variant["network"],
        "parameters": variant["parameters"],
        "bytes": file.stat().st_size,
        "sha256": tuning.model_digest(file.read_bytes()).removeprefix("sha256:"),
        "accuracy": [accuracy.value, accuracy.low, accuracy.high],
        "change": spread(other.change) if other else None,
        "agreement": spread(other.agreement) if other and other.agreement else None,
        **pace,
    }


def spread(one: IntervalEstimate) -> list[float | None]:
    return [one.value, one.low, one.high]


if __name__ == "__main__":
    main()

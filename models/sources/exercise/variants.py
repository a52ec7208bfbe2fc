"""The committed float weights in each of the ways a network can be made small: one .tflite each, and a list of them.

python variants.py FOLDER    # FOLDER/*.tflite and FOLDER/variants.json, which compare.py reads
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import network
from convert import MODEL, WEIGHTS, converted
from train_small import ALONE, DISTILLED, SMALL_WIDTH, TEACHER, TEACHER_WIDTH


@dataclass(frozen=True)
class Variant:
    """`kind` as `converted` has it; `network` is what stands above a group; `seeds` names its other training runs."""

    name: str
    file: str
    network: str
    kind: str
    weights: str
    width: float = 1.0
    seeds: str = ""


SHIPPED, WIDE, SMALL = "the shipped network", "a wider teacher", "a small network"
VARIANTS = (
    Variant("float32", "float32", SHIPPED, "float32", WEIGHTS.name),
    Variant("float16 weights", "float16", SHIPPED, "float16", WEIGHTS.name),
    Variant("dynamic range", "dynamic", SHIPPED, "dynamic", WEIGHTS.name),
    Variant("int8, shipped", "int8", SHIPPED, "int8", WEIGHTS.name),
    Variant("int16 × int8", "int16x8", SHIPPED, "int16x8", WEIGHTS.name),
    Variant("teacher, float32", "teacher-float32", WIDE, "float32", TEACHER.name, TEACHER_WIDTH, "teacher"),
    Variant("teacher, int8", "teacher-int8", WIDE, "int8", TEACHER.name, TEACHER_WIDTH),
    Variant("small alone, int8", "small-alone", SMALL, "int8", ALONE.name, SMALL_WIDTH, "alone"),
    Variant("small distilled, int8", "small-distilled", SMALL, "int8", DISTILLED.name, SMALL_WIDTH, "distilled"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for variant in VARIANTS:
        model = converted(WEIGHTS.with_name(variant.weights), variant.kind, variant.width)
        if variant.file == "int8" and model != MODEL.read_bytes():
            raise SystemExit("int8.tflite: not the committed model, so the table would not be about what ships")
        (folder / f"{variant.file}.tflite").write_bytes(model)
        parameters = network.build(width=variant.width).count_params()
        made.append(asdict(variant) | {"parameters": parameters})
        print(f"{variant.file}.tflite: {len(model):,} bytes", flush=True)
    (folder / "variants.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

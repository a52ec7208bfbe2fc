"""One target under atheris, in its own process: libFuzzer ends it at the first finding.

python -m scripts.fuzzing.guided TARGET CORPUS [libFuzzer options]
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["outstation"]):
    from scripts import fuzzing

    TARGETS = fuzzing.load()

from scripts.fuzzing.explore import run
from scripts.fuzzing.mutate import mutated


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Alternate libFuzzer's byte mutations with our JSON mutations."""
    random = Random(seed)
    return mutated([data], random, longest) if random.random() < 0.5 else bytes(atheris.Mutate(data, longest))


def main(name: str, corpus: str, options: list[str]) -> None:
    logging.disable()
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(corpus) if corpus else Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(target.seeds()):
            (folder / f"seed-{number}").write_bytes(data)
        arguments = [sys.argv[0], *options, f"-max_len={target.longest}", str(folder)]
        atheris.Setup(arguments, lambda data: run(target, data), custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

"""A program that watches a folder, killed again and again with a file in hand."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from outstation.workbench.testing.patience import wait_until
from tests.kit.stations import ROOT


def kill_with_a_file_in_hand(command: Sequence[str], folder: Path, files: int, kills: int, rng: random.Random) -> int:
    """Kill the program `kills` times, and then let it take the rest of `files` in `folder`.

    Return how many kills left a file in `taking`. Two in a row set a file aside, as it might have caused them; it is
    put back.
    """
    interrupted = 0

    def is_done() -> bool:
        for path in (folder / "failed").glob("*"):
            if path.suffix != ".txt":
                path.rename(folder / path.name)
        return sum(path.name != "rows.csv" for path in (folder / "done").glob("*")) == files

    def is_busy() -> bool:
        return any((folder / "taking").glob("*")) or is_done()

    for life in range(kills + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                if life < kills:
                    wait_until("a file is taken", is_busy)
                    time.sleep(rng.uniform(0.0, 0.08))
                else:
                    wait_until("all files are taken", is_done)
            finally:
                process.kill()
        interrupted += any((folder / "taking").glob("*"))
    return interrupted

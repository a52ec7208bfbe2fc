"""The program on emulated ARM processors: `scripts/test_arm --quick`.

Making the emulated Debian takes minutes. So this runs where `scripts/test_arm` has made one before, or where the
variable OUTSTATION_TEST_ARM is set.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_arm"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processor", ["aarch64", "armv7l"])
def test_bundles_run_on(processor: str) -> None:
    cached = subprocess.run([SCRIPT, processor, "--cached"], check=False, capture_output=True).returncode == 0
    if not cached and not os.environ.get("OUTSTATION_TEST_ARM"):
        pytest.skip(f"no Debian for {processor} has been made here: run scripts/test_arm {processor}")
    done = subprocess.run([SCRIPT, processor, "--quick"], check=False, capture_output=True, text=True)
    if "test_arm: skipped: " in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") >= 4


def test_an_unknown_processor_is_refused() -> None:
    done = subprocess.run([SCRIPT, "armv6l"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "test_arm: armv6l: give aarch64 or armv7l\n"

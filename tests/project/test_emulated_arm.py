"""scripts/test_arm, as far as it needs no emulator: wrong use, and a machine on which nothing is ready."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_arm"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["armv6l"], "test_arm: armv6l: give aarch64 or armv7l\n"),
        ([], "test_arm: no processor: give aarch64 or armv7l\n"),
    ],
)
def test_an_unknown_processor_is_refused(arguments: list[str], problem: str) -> None:
    done = subprocess.run([SCRIPT, *arguments], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", problem)


@pytest.mark.parametrize("processor", ["aarch64", "armv7l"])
def test_one_line_names_all_that_is_missing(processor: str, tmp_path: Path) -> None:
    for name in ("bash", "dirname", "uname", "sha256sum", "cut", "grep", "cat"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([SCRIPT, processor], check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    needs = "debootstrap is missing: apt-get install debootstrap" if os.geteuid() == 0 else "it needs root"
    assert done.stdout.startswith(f"test_arm: skipped: {needs}")
    assert done.stdout.count("\n") == 1


def test_without_a_cache_no_debian_is_ready(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([SCRIPT, "armv7l", "--cached"], check=False, capture_output=True, text=True, env=environment)
    is_skipped = "skipped" in done.stdout
    assert (done.returncode, done.stderr) == (0 if is_skipped else 1, "")

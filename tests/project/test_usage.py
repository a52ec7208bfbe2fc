"""Every script answers --help with its usage, and does nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# It imports what only an environment of its own has.
_OWN_ENVIRONMENT = {"reference_values.py"}
SCRIPTS = sorted(
    path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name not in _OWN_ENVIRONMENT
)


def to_command(script: Path) -> list[str]:
    """Return the script, or what it runs in its environment with the arguments it gets."""
    text = script.read_text(encoding="utf-8")
    if "-h | --help)" in text:
        return [str(script)]
    if script.suffix == ".py":
        return [sys.executable, "-m", f"scripts.{script.stem}"]
    module = re.search(r'^(?:\S+ )?exec .*[/$]python" -m (scripts\S.*) "\$@"$', text, re.MULTILINE)
    if module is not None:
        return [sys.executable, "-m", *module[1].split()]
    assert 'exec "$venv/bin/outstation" demo "$@"' in text, f"{script}: answer --help"
    return [sys.executable, "-m", "outstation", "demo"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_answers_help_with_its_usage(tmp_path: Path, name: str) -> None:
    command = to_command(ROOT / "scripts" / name)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OUTSTATION_VENV": str(tmp_path / "venv")}
    done = subprocess.run([*command, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"(?i)usage:|scripts[/.]|python -m ", done.stdout)
    assert [*tmp_path.iterdir()] == []

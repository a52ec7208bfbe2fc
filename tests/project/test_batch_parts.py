"""The way of a batch: it enters few modules, and a part of it can be deleted by its file and its lines."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest

from scripts.kit.bundles import CLASSIFY, activated
from tests.kit.devices import Device

AGENT = Path(__file__).parents[2] / "agent"
# Modules of ours that a batch with drift detection enters. It may only fall.
MOST_MODULES = 103
DELETABLE = {
    "CostPart": "device/batch_parts/cost_part.py",
    "LabelPart": "device/batch_parts/label_part.py",
    "RulePart": "device/rules/rule_part.py",
}


def list_entered(folder: Path) -> list[str]:
    """Return our modules of which a batch calls a function."""
    device = Device(folder, CLASSIFY, activated(CLASSIFY))
    for _ in range(2):
        device.feed(CLASSIFY.rows(200))
        device.run()
    device.feed(CLASSIFY.rows(200))
    entered: set[str] = set()

    def record(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            entered.add(frame.f_globals.get("__name__", ""))

    gc.disable()
    sys.setprofile(record)
    try:
        device.run()
    finally:
        sys.setprofile(None)
        gc.enable()
    device.store.close()
    return sorted(name for name in entered if name.startswith("outstation."))


@pytest.mark.exec
def test_a_batch_enters_few_modules(tmp_path: Path) -> None:
    """Run it in a process of its own: what others left behind is called in between."""
    code = "import sys, pathlib; from tests.project import test_batch_parts as parts"
    code += "; print(*parts.list_entered(pathlib.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=AGENT.parent
    )
    ours = done.stdout.split()
    assert "outstation.device.pipeline.batch" in ours
    assert len(ours) <= MOST_MODULES, ours


@pytest.mark.exec
@pytest.mark.parametrize("part", DELETABLE)
def test_without_a_part_and_its_lines_the_rest_can_be_imported(part: str, tmp_path: Path) -> None:
    shutil.copytree(AGENT, tmp_path / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    house = tmp_path / "agent" / "outstation"
    (house / DELETABLE[part]).unlink()
    assembly = house / "device" / "bootstrap" / "assembly.py"
    lines = assembly.read_text(encoding="utf-8").splitlines(keepends=True)
    left = [line for line in lines if part not in line]
    assert len(lines) - len(left) == 2, "one import, and one line of the list"
    assembly.write_text("".join(left), encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(house.parent)!r}); import outstation.device.bootstrap.daemon as daemon"
    code += "; import outstation.device.daemon, outstation.device.bootstrap.assembly; print(daemon.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.startswith(str(house)), done.stderr

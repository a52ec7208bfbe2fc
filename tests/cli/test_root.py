"""Commands that root runs on a device that belongs to another user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli.device.init import TEMPLATE
from tests.kit.stations import ROOT

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return the config of a device whose data folder belongs to nobody."""
    for folder in [tmp_path, *tmp_path.parents]:
        if Path("/tmp") in folder.parents:
            folder.chmod(0o755)
    file = tmp_path / "outstation.toml"
    file.write_text(TEMPLATE.format(device="pi-07", fleet="acme", data_dir="data", collector=""))
    (tmp_path / "data").mkdir(mode=0o750)
    os.chown(tmp_path / "data", NOBODY, NOBODY)
    return file


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.stdout + done.stderr


def test_a_bundle_that_root_checks_runs_as_the_devices_user(config: Path) -> None:
    program = "import os, sys\nfrom agent.bootstrap.device import load_config\nload_config(sys.argv[1])\n"
    program += "print(os.getresuid(), os.getresgid(), os.getgroups())\n"
    program += "try:\n    os.setuid(0)\nexcept PermissionError:\n    print('for good')\n"
    ids = (NOBODY,) * 3
    assert run(program, str(config)) == f"{ids} {ids} [{NOBODY}]\nfor good\n"


def test_what_root_writes_to_a_devices_store_belongs_to_the_devices_user(config: Path) -> None:
    outstation = "import sys\nfrom agent.cli import main\nmain(sys.argv[1:])"
    shown = run(outstation, "check", "--json", "-c", str(config))
    assert '"storage"' in shown, shown
    made = list((config.parent / "data").iterdir())
    assert made
    assert {path.lstat().st_uid for path in made} == {NOBODY}


def test_root_stays_root_where_the_data_folder_is_its_own(config: Path) -> None:
    os.chown(config.parent / "data", 0, 0)
    program = "import os, sys\nfrom agent.bootstrap.device import load_config\nload_config(sys.argv[1])\n"
    assert run(program + "print(os.getuid())", str(config)) == "0\n"

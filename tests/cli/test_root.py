"""Commands that root runs on a device that belongs to another user."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from outstation.device.cli.doctor.fixes import belongs_to_root
from outstation.device.cli.init import TEMPLATE
from tests.kit.marks import root_only
from tests.kit.stations import ROOT

NOBODY = 65534
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
pytestmark = [
    pytest.mark.attack("install"),
    root_only,
]


@pytest.fixture
def config(shared_path: Path) -> Path:
    """Return the config of a device whose data folder belongs to nobody."""
    file = shared_path / "outstation.toml"
    file.write_text(TEMPLATE.format(device="pi-07", fleet="acme", data_dir="data", collector=""))
    (shared_path / "data").mkdir(mode=0o750)
    os.chown(shared_path / "data", NOBODY, NOBODY)
    return file


def run(program: str, *arguments: str, folder: Path = ROOT) -> str:
    """Run a program with the `agent` of `folder`."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": str(folder)}
    )
    return done.stdout + done.stderr


def nobody_reads(path: Path) -> bool:
    """Return True if others may pass all folders above `path`."""
    return all(folder.stat().st_mode & 0o001 for folder in path.resolve().parents)


readable = pytest.mark.skipif(
    not nobody_reads(ROOT / "agent/outstation") or not nobody_reads(Path(sys.executable)),
    reason="this checkout or its Python lies in a folder that other users may not enter",
)


@readable
def test_a_bundle_that_root_checks_runs_as_the_devices_user(config: Path) -> None:
    program = "import os, sys\nfrom outstation.device.bootstrap.device import load_config\nload_config(sys.argv[1])\n"
    program += "print(os.getresuid(), os.getresgid(), os.getgroups())\n"
    program += "try:\n    os.setuid(0)\nexcept PermissionError:\n    print('for good')\n"
    ids = (NOBODY,) * 3
    assert run(program, str(config)) == f"{ids} {ids} [{NOBODY}]\nfor good\n"


@readable
def test_what_root_writes_to_a_devices_store_belongs_to_the_devices_user(config: Path) -> None:
    outstation = "import sys\nfrom outstation.__main__ import main\nmain(sys.argv[1:])"
    shown = run(outstation, "check", "--json", "-c", str(config))
    assert '"storage"' in shown, shown
    made = list((config.parent / "data").iterdir())
    assert made
    assert {path.lstat().st_uid for path in made} == {NOBODY}


@readable
@pytest.mark.parametrize("closed", ["", "<&-", "2>&-"])
def test_root_runs_a_batch_as_the_devices_user_also_with_a_closed_stream(shared_path: Path, closed: str) -> None:
    shell = f'exec "$0" -m outstation "$@" {closed}'

    def outstation(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", shell, sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=shared_path, env=ENVIRONMENT, check=False)

    assert outstation("init", "pi", "--standalone", "--id", "pi-07").returncode == 0
    fields = ", ".join(f'{{ name = "{name}" }}' for name in ("ax", "ay", "az", "wx", "wy", "wz"))
    config = shared_path / "pi" / "outstation.toml"
    with config.open("a") as file:
        file.write(f'[streams.watch]\nfields = [{fields}]\n[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\n')
    rows = [f"{1_764_022_680 + n / 50},1,2,3,4,5,{n % 7}" for n in range(300)]
    (shared_path / "rows.csv").write_text("\n".join(["t,ax,ay,az,wx,wy,wz", *rows]))
    for path in [shared_path / "pi", *(shared_path / "pi").rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    assert outstation("ingest", "watch", "rows.csv", "-c", str(config)).returncode == 0
    done = outstation("batch", "--json", "-c", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exercise" in done.stdout


def test_root_stays_root_where_the_data_folder_is_its_own(config: Path) -> None:
    os.chown(config.parent / "data", 0, 0)
    program = "import os, sys\nfrom outstation.device.bootstrap.device import load_config\nload_config(sys.argv[1])\n"
    assert run(program + "print(os.getuid())", str(config)) == "0\n"


def test_a_program_that_the_devices_user_may_not_read_is_named_in_one_line(config: Path) -> None:
    private = config.parent / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(ROOT / "agent/outstation", private / "outstation", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "models", private / "models", ignore=shutil.ignore_patterns("sources", "recordings"))
    outstation = "import sys\nfrom outstation.__main__ import main\nmain(sys.argv[1:])"
    shown = run(outstation, "check", "-c", str(config), folder=private)
    assert "Traceback" not in shown
    assert len(shown.splitlines()) == 1
    assert f"who may not read the program in {private / 'outstation'}" in shown


@readable
def test_sudo_doctor_fixes_the_config_of_an_installed_device(config: Path) -> None:
    os.chown(config, 0, NOBODY)
    config.chmod(0o640)
    key = config.parent / "device.key"
    outstation = "import sys\nfrom outstation.__main__ import main\nmain(sys.argv[1:])"
    shown = run(outstation, "doctor", "--fix", "--yes", "--json", "-c", str(config))
    document = json.loads(shown)
    assert {fix["name"] for fix in document["applied"]} == {"key", "collector"}, shown
    assert document["fixes"] == []
    status = config.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, NOBODY, 0o640)
    assert (key.stat().st_uid, stat.S_IMODE(key.stat().st_mode)) == (NOBODY, 0o600)


def test_a_link_in_the_devices_folder_leads_root_to_no_file(config: Path) -> None:
    data, secret = config.parent / "data", config.parent / "root.key"
    secret.write_text("root's own")
    (data / "intake.token").symlink_to(secret)
    assert not belongs_to_root(data / "intake.token")
    (data / "folder").symlink_to(config.parent)
    os.chown(data / "folder", NOBODY, NOBODY, follow_symlinks=False)
    assert not belongs_to_root(data / "folder" / "root.key")
    assert belongs_to_root(secret)

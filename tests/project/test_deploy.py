"""Service unit and installer, as far as tests can run them without changing this machine.

`scripts/test_install` runs them on a fresh Debian system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from outstation.fleet.enrolment.enrol import init_fleet
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from scripts import lock
from tests.kit.marks import root_only

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "outstation.service"
DROP_IN = ROOT / "deploy" / "devices.conf"
INSTALL = ROOT / "deploy" / "install.sh"
SETUP = ROOT / "scripts" / "setup"

Program = Callable[[str], str]


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal, with `more` in its environment."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=os.environ | more,
    )


def unit_with_a_program(folder: Path) -> Path:
    """Return a copy of the unit that starts a program available on every machine."""
    copy = folder / UNIT.name
    copy.write_text(re.sub(r"^(Exec\w+)=/opt\S+", r"\1=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    return copy


def test_the_service_is_exposed_by_1_1_at_most(program: Program) -> None:
    done = run(program("systemd-analyze"), "security", "--offline=true", "--threshold=15", UNIT)
    exposure = re.search(r"Overall exposure level for outstation.service: ([\d.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= 1.1
    assert done.returncode == 0


def test_systemd_finds_nothing_wrong_with_the_service(program: Program, tmp_path: Path) -> None:
    done = run(program("systemd-analyze"), "verify", "--man=no", unit_with_a_program(tmp_path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_accepts_the_drop_in_with_every_line_uncommented(program: Program, tmp_path: Path) -> None:
    unit = unit_with_a_program(tmp_path)
    settings = re.sub(r"^#(?=[A-Z]\w+=)", "", DROP_IN.read_text(), flags=re.MULTILINE)
    assert "\nPrivateDevices=no\n" in settings
    folder = tmp_path / f"{unit.name}.d"
    folder.mkdir()
    (folder / DROP_IN.name).write_text(settings)
    done = run(program("systemd-analyze"), "verify", "--man=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_service_starts_without_network_or_time_and_is_tried_for_ever() -> None:
    lines = [line for line in UNIT.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if line.startswith(("After=", "Wants=", "Requires=", "BindsTo="))] == []
    assert "Restart=always" in lines
    assert "StartLimitIntervalSec=0" in lines[: lines.index("[Service]")]


@pytest.mark.attack("install")
def test_the_service_and_the_installer_agree() -> None:
    unit, script = UNIT.read_text(), INSTALL.read_text()
    program = re.search(r"^program=(\S+)", script, re.MULTILINE)
    config = re.search(r"^config=(\S+)", script, re.MULTILINE)
    data = re.search(r"^data=/var/lib/(\S+)", script, re.MULTILINE)
    assert program
    assert config
    assert data
    assert f"ExecStart={program[1]}/bin/outstation run -c {config[1]}/outstation.toml\n" in unit
    assert f"StateDirectory={data[1]} {data[1]}.moved\n" in unit
    user = re.search(r"^User=(\S+)", unit, re.MULTILINE)
    assert user
    assert re.search(rf"useradd --system .* {user[1]}\n", script)


def test_the_shell_scripts_are_clean(program: Program) -> None:
    files = [path for folder in ("scripts", "deploy", ".ci") for path in (ROOT / folder).iterdir() if path.is_file()]
    scripts = [path for path in files if path.read_text().startswith("#!/usr/bin/env bash\n")]
    assert {INSTALL, SETUP} <= set(scripts)
    done = run(program("shellcheck"), *scripts)
    assert done.returncode == 0, done.stdout


def test_the_installer_tells_its_options() -> None:
    done = run(INSTALL, "--help")
    assert done.returncode == 0
    assert {"--join", "--request", "--rollback", "--uninstall"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--upgrade"], "--upgrade is no option"),
        (["--join"], "--join needs a file"),
        (["--code"], "--code needs what fleet invite printed"),
        (["--join", "/nonexistent"], "--join needs a file"),
    ],
)
def test_the_installer_refuses_wrong_use_before_it_changes_anything(arguments: list[str], problem: str) -> None:
    done = run(INSTALL, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr


def test_the_installer_run_by_a_user_says_that_root_is_needed() -> None:
    nobody: dict[str, int | list[int]] = {}
    if os.geteuid() == 0:
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        script = shutil.copy(INSTALL, folder)
        done = subprocess.run([script], capture_output=True, text=True, check=False, cwd="/", **nobody)  # type: ignore[call-overload]
    assert done.returncode == 2
    assert "must run as root: sudo" in done.stderr


def test_setup_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = run(SETUP, "demo", OUTSTATION_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "is not a Python environment" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["letter.txt"]


def test_setup_names_the_pythons_that_will_do(tmp_path: Path) -> None:
    done = run(SETUP, "demo", OUTSTATION_VENV=str(tmp_path / "venv"), PYTHON="/bin/false")
    assert done.returncode == 2
    assert "Python 3.11 to 3.14" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.attack("install")
def test_what_is_installed_is_pinned_with_hashes_and_in_step_with_the_project() -> None:
    assert lock.check() == []


@pytest.mark.attack("install")
def test_a_changed_dependency_makes_the_locks_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(project.replace("paho-mqtt>=2.1", "paho-mqtt>=2.2"), encoding="utf-8")
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    assert [problem.partition(" is")[0] for problem in lock.check()] == [f"deploy/{name}" for name in lock.TARGETS]
    text = (tmp_path / "deploy" / "requirements.txt").read_text(encoding="utf-8")
    (tmp_path / "deploy" / "requirements.txt").write_text(text + "evil>=1\n", encoding="utf-8")
    assert lock.check()[1] == "deploy/requirements.txt: no version or hash: evil>=1"


@pytest.mark.attack("install")
@root_only
def test_the_installer_gives_away_the_devices_own_files_only(tmp_path: Path) -> None:
    function = re.search(r"^give_files\(\) \{\n.*?^\}\n", INSTALL.read_text(), re.DOTALL | re.MULTILINE)
    assert function
    keys, own = ("device.key", "device.key.before-join"), ("outstation.toml", "ca.pem.before-join", "device.key.pub")
    for name in (*keys, *own, "root.key", "notes.txt"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o600)
    # This machine need not have the user of the service.
    text = function[0].replace("root:outstation", "0:65534").replace("outstation:outstation", "65534:65534")
    assert run("bash", "-euc", f"{text}\nconfig={tmp_path}\ngive_files").returncode == 0
    entries = {path.name: path.stat() for path in tmp_path.iterdir()}
    modes = {name: (entry.st_uid, entry.st_gid, entry.st_mode & 0o777) for name, entry in entries.items()}
    assert {modes[name] for name in keys} == {(65534, 65534, 0o600)}
    assert {modes[name] for name in own} == {(0, 65534, 0o640)}
    assert modes["root.key"] == modes["notes.txt"] == (0, os.getegid(), 0o600)


@root_only
def test_the_broker_starts_from_a_fleet_folder_of_the_debian_package(program: Program) -> None:
    program("mosquitto")
    folders = (ROOT / "deploy" / "debian" / "outstation-fleet.tmpfiles").read_text()
    mode = re.search(r"^d \S+ (0\d+) ", folders, re.MULTILINE)
    assert mode
    for unit in ("outstation-collect.service", "outstation-dashboard.service"):
        assert f"StateDirectoryMode={mode[1]}\n" in (ROOT / "deploy" / unit).read_text()
    # Its user cannot pass through the folders of pytest.
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o711)
        fleet, port = Path(base) / "fleet", free_port()
        init_fleet(fleet, "acme", BrokerConfig(url=f"mqtts://localhost:{port}"))
        fleet.chmod(int(mode[1], 8))
        assert run("chown", "-R", "mosquitto:", fleet / "broker").returncode == 0
        with MosquittoBroker(Path(base), conf=fleet / "broker" / "mosquitto.conf", port=port) as broker:
            assert broker.is_running


@pytest.mark.attack("install", control=True)
@root_only
def test_a_chown_of_names_that_were_listed_before_gives_a_file_of_root_away(tmp_path: Path) -> None:
    """The former installer listed the files of a folder that the service's user could write to."""
    secret, folder = tmp_path / "shadow", tmp_path / "config"
    secret.write_text("root's own\n")
    folder.mkdir()
    (folder / "a.key").write_text("")
    names = run("find", folder, "-type", "f").stdout.split()
    (folder / "a.key").unlink()
    (folder / "a.key").symlink_to(secret)
    assert run("chown", "65534", *names).returncode == 0
    assert secret.stat().st_uid == 65534


@pytest.mark.attack("install")
def test_root_takes_no_file_by_its_path_where_another_user_may_swap_it() -> None:
    text = INSTALL.read_text(encoding="utf-8") + UNIT.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if "chown" in line and not line.strip().startswith("#")]
    take = '"${files[@]}" \\( '
    assert lines == [
        take + '-name device.key.pub "${others[@]}" \\) -exec chown root:outstation {} + -exec chmod 0640 {} +',
        take + '-false "${keys[@]}" \\) -exec chown outstation:outstation {} + -exec chmod 0600 {} +',
    ]
    assert 'install -d -o root -g outstation -m 0750 "$config"' in text


def test_a_known_vulnerability_of_a_pinned_version_is_named_and_a_missing_database_is_no_pass() -> None:
    document = {
        "dependencies": [
            {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-2014-8", "fix_versions": ["2.7.2"]}]},
            {"name": "click", "version": "8.1.0", "vulns": []},
            {"name": "private", "skip_reason": "not found"},
        ],
        "fixes": [],
    }
    assert lock.list_vulnerabilities("requirements.txt", json.dumps(document)) == [
        "deploy/requirements.txt: jinja2 2.4.1: PYSEC-2014-8, mended in 2.7.2"
    ]
    unknown = {"dependencies": document["dependencies"][2:], "fixes": []}
    for text in (json.dumps(unknown), "", "Traceback"):
        with pytest.raises(ValueError, match=r"none of the 1 packages|Expecting value"):
            lock.list_vulnerabilities("requirements.txt", text)

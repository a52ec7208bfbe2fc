"""The package of the guide to plug-ins, installed by pip: a real daemon reads its source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess, run_outstation
from tests.kit.commands import call_outstation
from tests.kit.plugins import install_module, pip_install

# Real starts, as users and systemd do it.
pytestmark = pytest.mark.exec

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plugin"
STREAMS = """
[streams.wave]
fields = [{{ name = "x" }}, {{ name = "y" }}]
source = {{ kind = "{}", interval = "20 ms" }}
"""


def make_device(home: Path, kind: str = "sine") -> Path:
    assert call_outstation("init", str(home), "--id", "pi-07").returncode == 0
    file = home / "outstation.toml"
    text = file.read_text().replace('delivery = "collector"', 'delivery = "broker"')
    file.write_text(text + STREAMS.format(kind))
    return file


def read_streams(file: Path, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the status of each stream; {} before the store is there."""
    done = run_outstation("status", "--json", "-c", str(file), env={**os.environ, **env})
    streams = json.loads(done.stdout)["streams"] if done.returncode == 0 else []
    return {stream["stream"]: stream for stream in streams}


def test_the_package_of_the_guide_has_forty_lines_and_a_daemon_reads_its_source(tmp_path: Path) -> None:
    assert len((EXAMPLE / "outstation_sine.py").read_text().splitlines()) <= 40
    pip_install(EXAMPLE, tmp_path / "packages")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    file = make_device(tmp_path / "device")
    check = run_outstation("check", "--config-only", "-c", str(file), env={**os.environ, **env})
    assert (check.returncode, "a sine wave of 60 s" in check.stdout) == (0, True), check.stdout
    daemon = OutstationProcess(tmp_path / "log", "run", "-c", str(file)).start(**env)
    try:
        wait_until("rows of the source", lambda: read_streams(file, env).get("wave", {"rows": 0})["rows"] > 20)
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_a_source_that_fails_runs_again_and_no_other_stream_stops(tmp_path: Path) -> None:
    text = (EXAMPLE / "outstation_sine.py").read_text().replace('"sine"', '"cosine"')
    text = text.replace("            await asyncio.sleep", "            return 1 / 0\n            await asyncio.sleep")
    install_module(tmp_path / "packages", "cosine", text, "outstation.sources", "cosine")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    file = make_device(tmp_path / "device", "cosine")
    daemon = OutstationProcess(tmp_path / "log", "run", "-c", str(file)).start(**env)
    try:
        wait_until("two restarts", lambda: daemon.log.read_text().count("its source failed") >= 2)
        problem = "wave: its source failed: ZeroDivisionError: division by zero; started again in"
        assert daemon.log_contains(problem)
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert read_streams(file, env)["wave"]["source_restarts"] >= 2


def test_a_config_that_names_a_missing_package_says_so(tmp_path: Path) -> None:
    done = run_outstation("check", "-c", str(make_device(tmp_path / "device")))
    assert done.returncode == 2
    assert "streams.wave.source.kind: 'sine' is not a valid choice" in done.stderr
    assert "other packages can add some, see docs/guides/plugins.md" in done.stderr

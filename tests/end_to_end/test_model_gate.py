"""Guide to a gate in CI: each command of its workflow, with a good candidate and with a bad one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.protocol.wire import keys
from outstation.workbench.testing.fleet import LocalFleet
from scripts.kit.bundles import CLASSIFY, LABELS, packed, write_spec
from tests.kit.commands import call_outstation
from tests.kit.stations import ROOT

GUIDE = (ROOT / "docs" / "guides" / "model-gate.md").read_text(encoding="utf-8")
GATE = re.findall(r"<!-- file: model/gate.toml -->\n```toml\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)[0]
WORKFLOW = re.findall(r"<!-- workflow -->\n```yaml\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)[0]
COMMANDS = [shlex.split(line) for line in re.findall(r"^ *- run: outstation (.*)$", WORKFLOW, re.MULTILINE)]
ROLLOUT = """
[rollout]
name = "candidate"
task = "tiny"
bundle = "tiny"
version = "1.1.0"
target = "all"
[[steps]]
strategy = "shadow"
[[steps]]
strategy = "all"
[promote]
max_accuracy_drop = 0.02
min_devices = 1
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the workflow: model/ with everything that the guide names, and the publisher's key."""
    model = tmp_path / "repository" / "model"
    model.mkdir(parents=True)
    monkeypatch.chdir(model.parent)
    key = keys.generate(Path("publisher.key"))
    (model / "publisher.pub").write_text(key.public.text)
    shutil.move(packed(tmp_path / "current", CLASSIFY), model / "current")
    (model / "gate.toml").write_text(GATE)
    (model / "rollout.toml").write_text(ROLLOUT)
    labels = [LABELS[i] for i in np.arange(1200) // 7 % 3]
    rows = CLASSIFY.rows(1200, seed=5)
    lines = [",".join([*(f"{v:.5f}" for v in row), label]) for row, label in zip(rows, labels, strict=True)]
    (model / "held-out.csv").write_text("\n".join([",".join([*CLASSIFY.fields, "label"]), *lines]) + "\n")
    return model.parent


def write_candidate(repository: Path, labels: tuple[str, ...]) -> None:
    spec = write_spec(repository / "model", replace(CLASSIFY, labels=labels))
    (repository / "model" / "spec.toml").write_text(spec.read_text().replace('"1.0.0"', '"1.1.0"'))


def test_a_good_candidate_passes_the_gate_and_its_rollout_starts(repository: Path, tmp_path: Path) -> None:
    write_candidate(repository, LABELS)
    with LocalFleet(tmp_path / "fleet") as fleet:
        fleet.broker.start()
        fleet.add_device("pi-01")
        where = str(fleet.home / "repository")
        done = call_outstation("fleet", "repository", "init", "--demo", "--url", where, "--dir", str(fleet.home))
        assert done.returncode == 0, done.stderr
        for arguments in COMMANDS:
            more = ["--dir", str(fleet.home)] if arguments[0] == "fleet" else []
            done = call_outstation(*arguments, *more)
            assert done.returncode == 0, done.stdout + done.stderr
        status = call_outstation("fleet", "rollout", "status", "candidate", "--dir", str(fleet.home))
    assert "shadow" in status.stdout
    assert Path("gate.xml").exists()
    assert 'failures="0"' in Path("gate.xml").read_text()


def test_a_bad_candidate_stops_at_the_gate(repository: Path) -> None:
    write_candidate(repository, LABELS[1:] + LABELS[:1])
    codes = {}
    for arguments in COMMANDS:
        codes[" ".join(arguments[:2])] = code = call_outstation(*arguments).returncode
        if code:
            break
    assert codes == {"model pack": 0, "model check": 0, "model evaluate": 1}
    assert "against tiny 1.0.0" in Path("gate.xml").read_text()

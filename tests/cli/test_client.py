"""`outstation client`: the client as one file for a Python that has nothing but its standard library."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from outstation.workbench.testing.process import run_outstation
from tests.kit.stations import T0, Station, conf

_PRODUCER = f"""\
import array, math, sys
assert not {{"numpy", "msgspec"}} & set(sys.modules)
from outstation_client import Client
for name in ("numpy", "msgspec", "outstation"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " is installed")
with Client(sys.argv[1], name="sensor") as client:
    client.send("watch", t={T0}, ax=0.5, ay=1)
    client.send("watch", t={T0} + 1, ax=math.nan, ay=1)
    client.send_columns("watch", {{"t": [{T0} + 2, {T0} + 3], "ax": array.array("d", [1, 2]).tolist(), "ay": range(2)}})
    client.send_columns("machine", {{"power": [1.5], "count": [2**62], "mode": ["a:\\u00e9"], "heat": [math.inf]}})
    answer = client.flush()
print(answer.accepted, answer.rejected, client.through)
try:
    Client(sys.argv[1] + ".none")
except ConnectionError as error:
    print(error)
"""


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    printed = run_outstation("client")
    assert printed.returncode == 0, printed.stderr
    file = tmp_path / "outstation_client.py"
    file.write_text(printed.stdout, encoding="utf-8")
    return file


def pythons() -> list[str]:
    """Return each Python of this machine once: this one, and those of the system."""
    system = [shutil.which(f"python3.{minor}", path="/usr/bin") for minor in range(9, 15)]
    own = f"python3.{sys.version_info.minor}"
    return [sys.executable, *(path for path in system if path and not path.endswith(own))]


def test_the_exported_client_sends_rows_with_the_standard_library_only(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "producer.py").write_text(_PRODUCER)
    for python in pythons():
        with Station(conf(tmp_path / Path(python).name)) as station:
            # Neither packages of the installation nor of the user, and no path of the environment.
            code = f"import sys; sys.path.append({str(tmp_path)!r}); exec(open(sys.argv.pop(1)).read())"
            command = [python, "-I", "-S", "-c", code, str(tmp_path / "producer.py"), str(station.socket)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            first, second = done.stdout.splitlines()
            assert first == "4 [(2, 'ax: expected `float`, got `null`')] 4"
            assert second.endswith("intake.sock.none: No such file or directory")
            assert station.rows("watch").columns[0].tolist() == [0.5, 1.0, 2.0]
            assert station.rows("machine").columns[1].tolist() == [2**62]


def test_the_exported_client_is_python_3_9_and_imports_the_standard_library_only(exported: Path) -> None:
    tree = ast.parse(exported.read_text(), feature_version=(3, 9))
    imported = {
        alias.name.partition(".")[0] if isinstance(node, ast.Import) else str(node.module).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported - {"msgspec"} <= sys.stdlib_module_names
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version", "py39", "--select", "F,E9"]
    checked = subprocess.run([*ruff, str(exported)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout

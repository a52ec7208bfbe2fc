"""The floors of the house: imports go down only, few rooms know certain libraries, and start-up loads little.

cli → simulate → scenario → device | fleet → client | evaluation → link | model → drift | wire → config → clock | names
→ errors
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "agent"

# A room is a package or module directly under agent/. It imports itself and lower floors.
FLOORS = {
    "errors": 0,
    "quantities": 0,
    "names": 1,
    "jsonkeys": 1,
    "jsonpath": 1,
    "media": 1,
    "clock": 1,
    "toml": 1,
    "config": 2,
    "wire": 3,
    "drift": 3,
    "picture": 3,
    "tls": 3,
    "link": 4,
    "model": 4,
    "rivals": 4,
    "client": 5,
    "evaluation": 5,
    "device": 6,
    "fleet": 6,
    "scenario": 7,
    "simulate": 8,
    "cli": 9,
    "__main__": 10,
}
# Library → the only modules that import it.
ONLY = {
    "paho": {"agent.link"},
    "ai_edge_litert": {"agent.model.runtime"},
    "tflite_runtime": {"agent.model.runtime"},
    "resvg_py": {"agent.picture.png"},
    "PIL": {"agent.model.images"},
    "ray": {"agent.evaluation.cluster"},
    "cyclonedx": {"agent.fleet.evidence.software"},
    "psycopg": {f"agent.fleet.database.{name}" for name in ("postgresql", "postgresql_rows", "postgresql_tables")},
    "tuf": {
        *(f"agent.fleet.repository.{name}" for name in ("chain", "copy", "create", "edition", "publish", "revoke")),
        *(f"agent.fleet.repository.{name}" for name in ("roots", "rotate")),
        *("agent.fleet.repository.status", "agent.device.updates.trust"),
    },
    "securesystemslib": {f"agent.fleet.repository.{name}" for name in ("edition", "keyring", "rotate")},
}
# wire/ and drift/ are pure: these libraries and no other, nothing of the system but for the key files.
PURE = {
    "drift": {"msgspec", "numpy"},
    "rivals": {"msgspec", "numpy"},
    "wire": {"cryptography", "msgspec"},
}
KEY_FILES = "agent.wire.keys"
COMPUTED = "a module whose name is computed"
SYSTEM = {
    "asyncio", "ctypes", "fcntl", "glob", "http", "io", "logging", "multiprocessing", "os", "pathlib", "random",
    "resource", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "sys",
    "tempfile", "threading", "time", "urllib",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Import:
    """`module` imports `target`, both dotted, at `line`."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module} (line {self.line}) imports {self.target}"


def modules(folder: Path = AGENT) -> dict[str, Path]:
    """Dotted name → file of every module of the package in `folder`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """All imports of a module, those inside functions and under TYPE_CHECKING too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(module, inner if inner in known else base, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0] if node.args else None
            yield Import(module, str(name.value) if isinstance(name, ast.Constant) else COMPUTED, node.lineno)


ALL = [found for name, path in MODULES.items() for found in imports(name, path, MODULES)]


def room(module: str) -> str:
    """The room of a module of ours; `""` for the package itself."""
    return [*module.split("."), ""][1]


def climbs(found: Import) -> bool:
    """Whether an import leads up, or sideways into another room."""
    here, there = room(found.module), room(found.target)
    if there in (here, ""):
        return False
    return here == "" or FLOORS[here] <= FLOORS[there]


def test_every_room_stands_on_a_floor() -> None:
    homeless = {room(module) for module in MODULES} - set(FLOORS) - {""}
    assert not homeless, f"agent/{homeless}: give it a floor in tests/test_imports.py"


def test_imports_go_down_only() -> None:
    ours = [found for found in ALL if found.target.split(".")[0] == "agent"]
    assert ours
    assert [str(found) for found in ours if climbs(found)] == []


def test_only_the_command_line_computes_what_it_imports() -> None:
    assert [str(found) for found in ALL if found.target == COMPUTED and room(found.module) != "cli"] == []


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_known_to_one_module_only(library: str) -> None:
    users = {found.module for found in ALL if found.target.split(".")[0] == library}
    assert users <= ONLY[library]


def test_on_the_device_the_child_that_fetches_alone_knows_tuf() -> None:
    trust = "agent.device.updates.trust"
    assert {f.module for f in ALL if f.target == trust} == {"agent.device.updates.fetch"}


@pytest.mark.parametrize("pure", PURE)
def test_a_pure_room_touches_neither_the_system_nor_foreign_libraries(pure: str) -> None:
    inside = [found for found in ALL if room(found.module) == pure]
    allowed = PURE[pure] | {"agent", "__future__"} | (set(sys.stdlib_module_names) - SYSTEM)
    wrong = [str(f) for f in inside if f.target.split(".")[0] not in allowed and f.module != KEY_FILES]
    assert wrong == []


@pytest.mark.parametrize("pure", PURE)
def test_a_pure_room_opens_no_files(pure: str) -> None:
    opened = []
    for module, path in MODULES.items():
        if room(module) == pure and module != KEY_FILES:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            opened += [f"{module} (line {call.lineno})" for call in calls if ast.unparse(call.func) == "open"]
    assert opened == []


@pytest.mark.parametrize(
    ("start", "unwanted"),
    [
        (
            "agent.device.daemon",
            {
                "agent.cli",
                "agent.fleet",
                "agent.simulate",
                "apscheduler",
                "cryptography.x509",
                "dateutil",
                "importlib.metadata",
                "iotcore",
                "jwt",
                "pandas",
                "pyarrow",
                "pytest",
                "rich",
                "sqlite_utils",
                "tuf",
            },
        ),
        (
            "agent.cli.run",
            {"agent.fleet", "agent.simulate", "apscheduler", "cryptography.x509", "rich", "sqlite_utils", "tuf"},
        ),
        (
            "agent.cli.batch",
            {
                "agent.device.beside",
                "agent.device.daemon",
                "agent.device.recovery.copying",
                "agent.fleet",
                "agent.link",
                "apscheduler",
                "asyncio",
                "cryptography.x509",
                "http",
                "importlib.metadata",
                "paho",
                "psutil",
                "rich",
                "sqlite_utils",
                "tuf",
            },
        ),
        (
            "agent.cli.status",
            {"agent.device.daemon", "agent.link", "apscheduler", "asyncio", "cryptography.x509", "sqlite_utils", "tuf"},
        ),
        (
            "agent.device.updates.fetch",
            {"agent.cli", "agent.config", "agent.device.storage", "agent.model", "numpy", "paho", "psutil", "sqlite3"},
        ),
        (
            "agent.fleet.collect",
            {"agent.cli", "agent.device", "ai_edge_litert", "cyclonedx", "iotcore", "jwt", "pyarrow", "rich", "tuf"},
        ),
        (
            "agent.cli",
            {"ai_edge_litert", "apscheduler", "iotcore", "jwt", "pandas", "pyarrow", "rich", "tflite_runtime", "tuf"},
        ),
    ],
)
def test_starting_does_not_load_what_only_others_need(start: str, unwanted: set[str]) -> None:
    code = f"import sys, {start}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert start in loaded
    assert loaded & unwanted == set()


def test_the_list_of_commands_loads_none_of_them() -> None:
    code = "import sys; from agent.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "  status     Backlog" in done.stdout
    loaded = set(done.stdout.splitlines())
    assert "agent.cli" in loaded
    assert {module for module in loaded if module.startswith("agent.cli.") or module == "numpy"} == set()


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("wire/topics.py", "from agent.device import store", True),
        ("device/store.py", "import agent.fleet.collect", True),
        ("fleet/collect.py", "from ..device import store", True),
        ("model/runtime.py", "def f():\n    from agent import link", True),
        ("drift/faults.py", "from agent.wire import topics", True),
        ("device/store.py", "from . import intake", False),
        ("config.py", "from agent import errors", False),
        ("config.py", "from agent.wire.topics import parse", True),
        ("cli/run.py", "from agent.device import store", False),
    ],
)
def test_the_check_itself_sees_an_import_that_climbs(tmp_path: Path, file: str, line: str, wrong: bool) -> None:
    house = tmp_path / "agent"
    rooms = (
        "wire/topics.py",
        "wire/keys.py",
        "device/store.py",
        "device/intake.py",
        "fleet/collect.py",
        "link.py",
        "errors.py",
    )
    for name in (*rooms, file):
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).touch()
    (house / file).write_text(line)
    known = modules(house)
    found = [one for name, path in known.items() for one in imports(name, path, known)]
    assert [climbs(one) for one in found] == [wrong]

"""Import rules: imports lead down only, few modules use certain libraries, and startup loads little.

evidence → workbench → device | fleet → integrations → ml → protocol → foundation
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import pytest

from outstation.device.config.sinks import SINKS
from outstation.device.config.sources import SOURCES
from outstation.fleet.bridge_config import BRIDGES
from outstation.integrations.notify.config import TARGETS

# A fork has imported everything.
pytestmark = pytest.mark.exec

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "agent" / "outstation"

# A room is a folder directly under agent/outstation/. It imports itself and lower floors.
FLOORS = {
    "foundation": 0,
    "protocol": 1,
    "ml": 2,
    "integrations": 3,
    "device": 4,
    "fleet": 4,
    "workbench": 5,
    "evidence": 6,
    "__main__": 7,
}
MOST_ARROWS = 29
MOST_MODULES = 18
# Cycles that are still there. This list only shrinks.
FILE_CYCLES: set[str] = set()
FOLDER_CYCLES: set[str] = set()
CLIMBING = {
    "outstation.fleet.cli.command",
    "outstation.fleet.cli.data.database",
    "outstation.fleet.cli.enrolment.enrol",
    "outstation.fleet.cli.labelling.label",
    "outstation.fleet.dashboard.pages.models",
}
CROWDED: set[str] = set()
# Library → the only modules that import it.
ONLY = {
    "paho": {"outstation.protocol.transport.mqtt"},
    "ai_edge_litert": {"outstation.ml.model.inference.runtime"},
    "tflite_runtime": {"outstation.ml.model.inference.runtime"},
    "resvg_py": {"outstation.foundation.cli.plot_file"},
    "PIL": {"outstation.ml.model.inference.images"},
    "ray": {"outstation.workbench.evaluation.predict.ray_cluster"},
    "cyclonedx": {"outstation.evidence.gather.sbom"},
    "rfc3161_client": {"outstation.evidence.timestamps.token"},
    "psycopg": {
        f"outstation.fleet.database.{name}" for name in ("postgresql", "postgresql_rows", "schema.translation")
    },
    "google": {"outstation.integrations.sparkplug.sparkplug_payload"},
    "duckdb": {"outstation.fleet.export.query"},
    "tuf": {
        *(
            f"outstation.fleet.repository.{name}"
            for name in ("signature_chain", "mirror", "create", "edition", "publish")
        ),
        *(
            f"outstation.fleet.repository.{name}"
            for name in ("key_rotation", "revoke", "root_rotation", "repository_status", "trust")
        ),
        "outstation.device.rollout.fetch.tuf_client",
    },
    "starlette": {
        *(f"outstation.fleet.dashboard.{name}" for name in ("app", "login", "server")),
        *(f"outstation.fleet.dashboard.security.{name}" for name in ("access", "guard")),
        *(f"outstation.fleet.dashboard.pages.{name}" for name in ("account", "device", "fleet", "incidents", "labels")),
        *(
            f"outstation.fleet.dashboard.pages.{name}"
            for name in ("audit", "message", "models", "rollouts", "tasks", "visit")
        ),
        "outstation.fleet.metrics.endpoint",
    },
    "uvicorn": {"outstation.fleet.dashboard.server"},
    "jinja2": {"outstation.foundation.render.templates"},
    "prometheus_client": {
        f"outstation.fleet.metrics.{name}" for name in ("collector_families", "device_families", "exporter")
    },
    "itsdangerous": {"outstation.fleet.dashboard.security.access"},
    "securesystemslib": {f"outstation.fleet.repository.{name}" for name in ("edition", "key_rotation", "keys")},
}
# wire/ and drift/ are pure: only these libraries, and no system access except for the key files.
PURE = {
    "ml.drift": {"msgspec", "numpy"},
    "ml.comparison": {"msgspec", "numpy"},
    "ml.performance": {"msgspec", "numpy"},
    "ml.poisoning": {"msgspec", "numpy"},
    "protocol.wire": {"cryptography", "msgspec"},
}
KEY_FILES = "outstation.protocol.wire.keys"
PLUGINS = "outstation.foundation.config.plugins"
GROUPS = {
    "outstation.device.config.sources": SOURCES,
    "outstation.device.config.sinks": SINKS,
    "outstation.integrations.notify.config": TARGETS,
    "outstation.fleet.bridge_config": BRIDGES,
}
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
    """Return dotted name → file of every module of the package in `folder`."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = modules()


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Return all imports of a module, including those in functions and under TYPE_CHECKING."""
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
        elif isinstance(node, ast.Call) and _called_name(node).endswith(("import_module", "__import__")):
            name = node.args[0] if node.args else None
            yield Import(module, str(name.value) if isinstance(name, ast.Constant) else COMPUTED, node.lineno)


def _called_name(call: ast.Call) -> str:
    """Return the last name of what is called; `""` if it has none."""
    name: str = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name


@cache
def all_imports() -> list[Import]:
    """Return the imports of all modules. Not read at import: each process that runs tests imports each test file."""
    return [each for name, path in MODULES.items() for each in imports(name, path, MODULES)]


def room(module: str) -> str:
    """Return the room of our module; `""` for the package itself."""
    return [*module.split("."), ""][1]


def is_inside(module: str, folder: str) -> bool:
    """Return True if a module lies in a folder, whose dotted name begins below the package."""
    return f"{module}.".startswith(f"outstation.{folder}.")


def climbs(imported: Import) -> bool:
    """Return True if an import leads up, or sideways into another room."""
    here, there = room(imported.module), room(imported.target)
    if there in (here, ""):
        return False
    return here == "" or FLOORS[here] <= FLOORS[there]


def cycles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    components = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        path.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in path:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = path[path.index(node) :]
            del path[path.index(node) :]
            if len(component) > 1:
                components.append(sorted(component))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return components


def folder_of(module: str, known: dict[str, Path]) -> str:
    """Return the package that a module lies in; a module directly under agent/outstation/ stands for itself."""
    if known[module].name == "__init__.py":
        return module
    package = module.rpartition(".")[0]
    return module if package == "outstation" else package


def module_arrows(every: list[Import], known: dict[str, Path]) -> dict[str, set[str]]:
    """Return module → modules it imports."""
    arrows: dict[str, set[str]] = {}
    for imported in every:
        if imported.target in known and imported.target != imported.module:
            arrows.setdefault(imported.module, set()).add(imported.target)
    return arrows


def folder_arrows(every: list[Import], known: dict[str, Path]) -> dict[str, set[str]]:
    """Return folder → folders that its modules import."""
    arrows: dict[str, set[str]] = {}
    for module, targets in module_arrows(every, known).items():
        here = folder_of(module, known)
        if here != "outstation":
            arrows.setdefault(here, set()).update({folder_of(target, known) for target in targets} - {here})
    return arrows


def test_no_module_imports_itself_through_others() -> None:
    """Count imports in functions and under TYPE_CHECKING, since a reader follows them too."""
    inside = {module for cycle in cycles(module_arrows(all_imports(), MODULES)) for module in cycle}
    assert inside == FILE_CYCLES


def test_no_folder_imports_itself_through_others() -> None:
    inside = {folder for cycle in cycles(folder_arrows(all_imports(), MODULES)) for folder in cycle}
    assert inside == FOLDER_CYCLES


def test_few_modules_sign_or_verify_a_token() -> None:
    """A document that is no message is signed by `protocol/documents/signed_document.py` alone."""
    calls = {
        (name.removeprefix("outstation."), ast.unparse(call.func))
        for name, path in MODULES.items()
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {"jws.sign", "jws.verify"}
    }
    assert {name for name, called in calls if called == "jws.verify"} == {
        "protocol.documents.signed_document",
        "protocol.wire.verification",
    }
    assert {name for name, called in calls if called == "jws.sign"} == {
        "device.store.message_log",
        "fleet.collector.acknowledger",
        "fleet.commands",
        "fleet.rollout.desired_state",
        "protocol.documents.signed_document",
        "workbench.testing.messages",
    }


def test_only_decoders_makes_msgspec_read_a_type() -> None:
    """Two threads that are the first to do so end the process; see agent/outstation/foundation/decoders.py."""
    reading = {"msgspec.convert", "msgspec.json.Decoder", "msgspec.msgpack.Decoder"}
    decoding = {"msgspec.json.decode", "msgspec.msgpack.decode", "msgspec.toml.decode", "msgspec.yaml.decode"}
    outside = []
    for name, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls if name != "outstation.foundation.decoders" else []:
            called, words = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
            if called in reading or (called in decoding and "type" in words):
                outside.append(f"{name} (line {call.lineno}) calls {called}")
    assert outside == []
    froms = {each for each in all_imports() if each.target in {"msgspec.json", "msgspec.msgpack"}}
    assert {each.module for each in froms} <= {"outstation.protocol.client"}, (
        "name them in full, or this test does not see them"
    )


def test_no_start_compiles_the_annotations_of_a_config_or_manifest() -> None:
    """msgspec compiles an annotation that is a text, which takes longer than to import the module."""
    names = [
        name
        for name in MODULES
        if name.startswith("outstation.device.config.") or name == "outstation.ml.model.bundle.manifest"
    ]
    structs = {
        value
        for name in [*names, "outstation.foundation.media"]
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == name
    }
    assert len(structs) > 40
    assert [struct for struct in structs if any(isinstance(a, str) for a in struct.__annotations__.values())] == []


def test_a_folder_holds_few_modules() -> None:
    sizes: dict[str, int] = {}
    for path in AGENT.rglob("*.py"):
        if path.name != "__init__.py":
            name = path.parent.relative_to(ROOT).as_posix()
            sizes[name] = sizes.get(name, 0) + 1
    assert {name for name, size in sizes.items() if size > MOST_MODULES} == CROWDED


def test_columns_of_a_row_are_named() -> None:
    number = re.compile(r"(?<![.a-z_])row\[\d+\]")
    files = [path for suffix in ("py", "html") for path in AGENT.rglob(f"*.{suffix}")]
    assert [path for path in files if number.search(path.read_text(encoding="utf-8"))] == []


def test_every_module_lies_three_folders_deep_at_most() -> None:
    assert [path for path in AGENT.rglob("*.py") if len(path.relative_to(AGENT).parts) > 4] == []


def test_the_check_itself_sees_a_cycle(tmp_path: Path) -> None:
    house = tmp_path / "outstation"
    files = {
        "ml/__init__.py": "",
        "ml/drift/__init__.py": "",
        "ml/drift/monitor.py": "from outstation.ml.drift.state import State",
        "ml/drift/state.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from outstation.ml.drift import monitor"
        ),
        "fleet/__init__.py": "",
        "fleet/store.py": "def f():\n    from outstation.ml.drift.monitor import step",
        "ml/drift/alerts.py": "from outstation.fleet.store import f",
    }
    for name, text in files.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
    known = modules(house)
    every = [imported for name, path in known.items() for imported in imports(name, path, known)]
    assert cycles(module_arrows(every, known)) == [["outstation.ml.drift.monitor", "outstation.ml.drift.state"]]
    assert cycles(folder_arrows(every, known)) == [["outstation.fleet", "outstation.ml.drift"]]


def test_every_room_stands_on_a_floor() -> None:
    homeless = {room(module) for module in MODULES} - set(FLOORS) - {""}
    assert not homeless, f"agent/outstation/{homeless}: give it a floor in tests/project/test_imports.py"


def test_imports_go_down_only() -> None:
    ours = [imported for imported in all_imports() if imported.target.split(".")[0] == "outstation"]
    assert ours
    assert {imported.module for imported in ours if climbs(imported)} == CLIMBING


def test_few_rooms_know_each_other() -> None:
    known = {(room(each.module), room(each.target)) for each in all_imports() if each.target in MODULES}
    assert len({(here, there) for here, there in known if there not in ("", here)}) <= MOST_ARROWS


def test_only_the_command_line_and_plugins_compute_what_they_import() -> None:
    computed = [imported for imported in all_imports() if imported.target == COMPUTED]
    assert {imported.module for imported in computed if ".cli." not in imported.module} == {PLUGINS}


@pytest.mark.parametrize("home", GROUPS)
def test_the_table_of_a_group_of_plugins_names_modules_of_lower_rooms(home: str) -> None:
    named = [module for module in GROUPS[home].modules.values() if module is not None]
    assert named
    assert [module for module in named if module not in MODULES or climbs(Import(home, module, 1))] == []


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_known_to_one_module_only(library: str) -> None:
    users = {imported.module for imported in all_imports() if imported.target.split(".")[0] == library}
    assert users <= ONLY[library]


def test_on_the_device_the_child_that_fetches_alone_knows_tuf() -> None:
    trust = "outstation.device.rollout.fetch.tuf_client"
    assert {f.module for f in all_imports() if f.target == trust} == {"outstation.device.rollout.fetch.worker"}


@pytest.mark.parametrize("pure", PURE)
def test_a_pure_room_touches_neither_the_system_nor_foreign_libraries(pure: str) -> None:
    inside = [imported for imported in all_imports() if is_inside(imported.module, pure)]
    allowed = PURE[pure] | {"outstation", "__future__"} | (set(sys.stdlib_module_names) - SYSTEM)
    wrong = [str(f) for f in inside if f.target.split(".")[0] not in allowed and f.module != KEY_FILES]
    assert wrong == []


@pytest.mark.parametrize("pure", PURE)
def test_a_pure_room_opens_no_files(pure: str) -> None:
    opened = []
    for module, path in MODULES.items():
        if is_inside(module, pure) and module != KEY_FILES:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            opened += [f"{module} (line {call.lineno})" for call in calls if getattr(call.func, "id", "") == "open"]
    assert opened == []


@pytest.mark.parametrize(
    ("start", "unwanted"),
    [
        (
            "outstation.device.daemon",
            {
                "outstation.__main__",
                "outstation.fleet",
                "outstation.evidence",
                "outstation.workbench",
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
            "outstation.device.cli.run",
            {
                "outstation.fleet",
                "outstation.evidence",
                "outstation.workbench",
                "apscheduler",
                "click",
                "cryptography.x509",
                "sqlite_utils",
                "tuf",
            },
        ),
        (
            "outstation.device.cli.batch",
            {
                "outstation.device.commands.wipe",
                "outstation.device.daemon",
                "outstation.device.machine.trusted_keys",
                "outstation.device.recovery.copy",
                "outstation.device.rollout.shadow",
                "outstation.device.samples.selection",
                "outstation.device.uplink.meter",
                "outstation.fleet",
                "outstation.protocol.transport.mqtt",
                "apscheduler",
                "outstation.protocol.wire.messages",
                "asyncio",
                "click",
                "cryptography.x509",
                "dataclasses",
                "http",
                "importlib.metadata",
                "paho",
                "psutil",
                "random",
                "rich",
                "shutil",
                "sqlite_utils",
                "subprocess",
                "tuf",
                "zipfile",
            },
        ),
        (
            "outstation.device.cli.status",
            {
                "outstation.device.bootstrap.tasks",
                "outstation.device.commands.wipe",
                "outstation.device.daemon",
                "outstation.device.machine.trusted_keys",
                "outstation.protocol.transport.mqtt",
                "apscheduler",
                "asyncio",
                "cryptography.x509",
                "psutil",
                "shutil",
                "subprocess",
                "sqlite_utils",
                "tuf",
            },
        ),
        (
            "outstation.device.rollout.fetch.worker",
            {
                "outstation.__main__",
                "outstation.device.config",
                "outstation.device.store",
                "outstation.ml.model",
                "numpy",
                "paho",
                "psutil",
                "sqlite3",
            },
        ),
        # Models run in processes of their own.
        (
            "outstation.device.bootstrap.daemon",
            {
                "outstation.__main__",
                "outstation.fleet",
                "outstation.evidence",
                "outstation.workbench",
                "outstation.integrations.notify.notifier",
                "smtplib",
                "zoneinfo",
                "ai_edge_litert",
                "tflite_runtime",
                "tuf",
                "pyarrow",
            },
        ),
        (
            "outstation.fleet.collector.collector",
            {
                "outstation.__main__",
                "outstation.device",
                "outstation.fleet.metrics",
                "outstation.integrations.notify.notifier",
                "smtplib",
                "ai_edge_litert",
                "cyclonedx",
                "iotcore",
                "jwt",
                "prometheus_client",
                "pyarrow",
                "rich",
                "starlette",
                "tuf",
            },
        ),
        (
            "outstation.__main__",
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
    code = "import sys; from outstation.__main__ import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "  status       Show backlog" in done.stdout
    loaded = set(done.stdout.split())
    assert "outstation.__main__" in loaded
    folders = ("device", "evidence", "fleet", "integrations", "ml", "protocol", "workbench")
    commands = {module for module in loaded if module.startswith(tuple(f"outstation.{folder}" for folder in folders))}
    assert commands | (loaded & {"numpy", "msgspec"}) == set()


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("protocol/topics.py", "from outstation.device import store", True),
        ("device/store.py", "import outstation.fleet.collector.collector", True),
        ("fleet/collect.py", "from ..device import store", True),
        ("protocol/mqtt.py", "def f():\n    from outstation.ml.model import runtime", True),
        ("foundation/text.py", "from outstation.protocol.topics import parse", True),
        ("device/store.py", "from . import intake", False),
        ("device/store.py", "from outstation.foundation import errors", False),
        ("workbench/run.py", "from outstation.device import store", False),
    ],
)
def test_the_check_itself_sees_an_import_that_climbs(tmp_path: Path, file: str, line: str, wrong: bool) -> None:
    house = tmp_path / "outstation"
    rooms = (
        "protocol/topics.py",
        "protocol/keys.py",
        "device/store.py",
        "device/intake.py",
        "fleet/collect.py",
        "ml/model.py",
        "foundation/errors.py",
    )
    for name in (*rooms, file):
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).touch()
    (house / file).write_text(line)
    known = modules(house)
    climbing = [imported for name, path in known.items() for imported in imports(name, path, known)]
    assert [climbs(imported) for imported in climbing] == [wrong]

"""Shared fixtures and settings of all tests."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from outstation.fleet.database.store import FleetStore
from outstation.workbench.testing.process import find_program
from scripts.kit.postgres import FAST_SETTINGS, PostgresServer, run_server
from tests.kit import fork_server
from tests.kit.fleet_databases import DATABASES, fresh_in

pytest_plugins = ["outstation.workbench.testing.fixtures"]

# Modules and tests stay until the end: looking for garbage among them, over and over, is a tenth of the collection.
gc.disable()

# No deadline, since the time of an example depends on the machine. Examples are reproducible and few; `pytest
# --hypothesis-profile chance` draws many new ones.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("chance", patient, derandomize=False, max_examples=300)
settings.register_profile("busy", patient, derandomize=True, max_examples=50)
settings.load_profile("busy")

fork_server.install()

# Workers of pytest-xdist have it: without a terminal, tables are not wrapped.
os.environ.pop("COLUMNS", None)

# A shell without job control starts background commands with SIGINT ignored, which children inherit; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Modules, and functions of them, whose use marks a test: it starts a broker, a PostgreSQL server, or another process.
_MARKS = {
    "broker": {"outstation.workbench.testing.broker", "outstation.workbench.testing.fleet"},
    "postgres": {"scripts.kit.postgres"},
    "process": {
        "subprocess",
        "multiprocessing",
        "outstation.workbench.authoring.pack",
        "outstation.device.bootstrap.daemon",
        "outstation.device.bootstrap.tasks",
        "outstation.device.cli.doctor.power",
        "outstation.device.intake.decode_process",
        "outstation.device.intake.sources.exec",
        "outstation.device.intake.sources.files",
        "outstation.ml.model.activation",
        "outstation.ml.model.activation.activate",
        "outstation.ml.model.sandbox.probe",
        "outstation.ml.model.sandbox.subprocess_model",
        "outstation.workbench.testing.broker",
        "outstation.workbench.testing.fleet",
        "outstation.workbench.testing.process",
        "scripts.kit.bundles.activated",
        "scripts.kit.bundles.packed",
        "scripts.benchmarks.drift_peers.peers",
        "scripts.faults.disk",
        "scripts.fuzzing.explore",
        "scripts.fuzzing.malformed.run_command",
        "scripts.fuzzing.sanitized",
        "scripts.kit.postgres",
        "tests.device.intake.test_sources",
        "tests.end_to_end.test_daemon",
        "tests.kit.bundle_devices",
        "tests.kit.killed_watcher",
        "tests.kit.multi_output_device",
        "tests.kit.repositories",
        "tests.kit.rollouts",
        "tests.kit.stations.Killable",
        "tests.kit.updating",
    },
}
# Folders of tests that mostly wait for other processes.
_WAITING = {"end_to_end", "project", "rollout", "intake", "notify", "bridge", "testing"}
_FIXTURES = {
    "broker": {"outstation_broker", "outstation_fleet"},
    "postgres": {"postgres_server", "postgres_url"},
    "process": {"outstation_broker", "outstation_fleet", "postgres_server", "postgres_url", "program"},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the programs they start, so that `-m "not process"` selects tests without any."""
    if hasattr(config, "workerinput"):
        _mix_files(items)
    for item in items:
        used = _used_names(item.module) if isinstance(item, pytest.Function) else set()
        fixtures = set(getattr(item, "fixturenames", ()))
        if "fresh" in fixtures and "postgresql" in item.name:
            fixtures.add("postgres_url")
        for mark, starters in _MARKS.items():
            if used & starters or fixtures & _FIXTURES[mark]:
                item.add_marker(mark)
        if "end_to_end" in item.path.parts:
            item.add_marker("process")


def _mix_files(items: list[pytest.Item]) -> None:
    """Spread files that mostly wait for other processes over those that compute, so that parallel ones share the cores.

    The last files compute: the longest of them takes a few seconds.
    """
    files = list(dict.fromkeys(item.path for item in items))
    waiting = [path for path in files if _WAITING & set(path.parts)]
    computing = [path for path in files if not _WAITING & set(path.parts)]
    places = {path: 0.9 * i / len(waiting) for i, path in enumerate(waiting)}
    places |= {path: i / len(computing) for i, path in enumerate(computing)}
    items.sort(key=lambda item: places[item.path])


@cache
def _used_names(test_module: ModuleType) -> set[str]:
    """Return the modules of all objects in a test module, and their own names there."""
    names = set()
    for value in vars(test_module).values():
        module, name = getattr(value, "__module__", None), getattr(value, "__name__", "")
        names |= {name} if module is None else {module, f"{module}.{name}"}
    return names


@pytest.fixture(autouse=True)
def only_marked_tests_start_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test without the mark `process` that starts one: a table in this file lacks what it uses."""
    if request.node.get_closest_marker("process") is None:
        start = subprocess.Popen._execute_child  # type: ignore[attr-defined]

        def refuse(*arguments: Any, **options: Any) -> None:
            # NumPy 1 asks it for the processor's features at the first comparison of arrays.
            if "lscpu" in str(arguments[1]):
                start(*arguments, **options)
                return
            pytest.fail(f"a test without the mark `process` starts {arguments[1]}; add what it uses to _MARKS")

        monkeypatch.setattr(subprocess.Popen, "_execute_child", refuse)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fork Python processes of the program instead of starting each, except for tests marked `exec`."""
    fork_server.server.is_used = item.get_closest_marker("exec") is None


def pytest_unconfigure() -> None:
    fork_server.server.close()


def pytest_collection_finish() -> None:
    """Exempt all that lives until the end from garbage collection, which each file's end asks for."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect a file's garbage when its last test ends: what it left open fails that file, and not any later one."""
    yield
    for item in request.session.items:
        # pytest keeps the arguments of the last test until it has ended.
        if isinstance(item, pytest.Function) and item.funcargs and item.path == request.path:
            item.funcargs.clear()
    # A collection does nothing while another thread collects, which may wait for the end of a process.
    deadline_s = time.monotonic() + 10
    gc.collect()
    while _model_processes() and time.monotonic() < deadline_s:
        gc.collect()
    # pytest also keeps the last error, and with it what the failed test held.
    assert not _model_processes() or request.session.testsfailed, "a model process is left running: close it"


def _model_processes() -> list[str]:
    """Return the commands of this process's children that run a model."""
    pids = [pid for listed in Path("/proc/self/task").glob("*/children") for pid in listed.read_text().split()]
    commands = [Path("/proc", pid, "cmdline").read_text() for pid in pids if int(pid) != fork_server.server.pid]
    return [text for text in commands if "outstation.ml.model.sandbox.worker" in text or "fork_server" in text]


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Return the path of a program: `program("mosquitto")`. A missing program skips the test, and fails it on CI."""
    return find_program


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """Return a folder on a disk, which the kernel counts writes to. `tmp_path` may be in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="outstation-") as folder:
        yield Path(folder)


@pytest.fixture
def shared_path(tmp_path: Path) -> Path:
    """Return `tmp_path`, which other users may enter, if it is in a folder for files of all users such as /tmp."""
    above = [tmp_path, *tmp_path.parents]
    for common, folder in enumerate(above):
        if folder.stat().st_mode & stat.S_ISVTX:
            for own in above[:common]:
                own.chmod(0o755)
            break
    return tmp_path


@pytest.fixture(scope="module", params=DATABASES)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], FleetStore]:
    """Return an empty fleet store: once in SQLite, once in PostgreSQL."""
    return fresh_in(request, tmp_path_factory)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Yield one server for all tests."""
    with run_server(FAST_SETTINGS) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """Return the URL of a new, empty database."""
    return postgres_server.create_database()

"""Confinement: native code of a hostile model reaches no file, network, process or secret."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from outstation.foundation.errors import BadBundle
from outstation.ml.model import activation
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.bundle.manifest import ResourceLimits
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.sandbox import confinement, probe
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel

pytestmark = pytest.mark.exec
# What native code of a model would try; each line is run in a confined process, where it must raise OSError.
ATTACKS = {
    "read a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "read its environment": "os.open('/proc/self/environ', os.O_RDONLY)",
    "read the memory of its parent": "os.open(f'/proc/{os.getppid()}/mem', os.O_RDONLY)",
    "write a file": "os.open('/tmp/dropped', os.O_WRONLY | os.O_CREAT)",
    "list a folder": "os.listdir('/')",
    "remove a file": "os.unlink('/tmp/dropped')",
    "make a link": "os.symlink('/etc/passwd', '/tmp/dropped')",
    "open a network connection": "socket.socket(socket.AF_INET)",
    "open a local socket": "socket.socket(socket.AF_UNIX)",
    "start a process": "os.fork()",
    "start a program": "os.execv('/bin/true', ['true'])",
    "stop its parent": "os.kill(parent, signal.SIGKILL)",
    "signal its group": "os.killpg(group, signal.SIGTERM)",
    "trace its parent": "call('ptrace', 16, parent, 0, 0)",
    "read its parent's memory by a call": "call('process_vm_readv', parent, 0, 0, 0, 0, 0)",
    "take a descriptor of its parent": "call('pidfd_open', parent, 0)",
    "make executable memory": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "make memory executable": "call('mprotect', page, 4096, 5)",
    "start a program from memory": "call('memfd_create', b'x', 0)",
    "use io_uring": "call('io_uring_setup', 1, 0)",
    "load a kernel program": "call('bpf', 0, 0, 0)",
    "leave its namespaces": "call('unshare', 0x10000000)",
    "change its user": "os.setuid(0)",
    "change the mode of a file": "os.chmod('/tmp', 0o777)",
    "open by handle": "call('open_by_handle_at', 0, 0, 0)",
    "raise its own limits": "resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))",
}
_CHILD = """
import ctypes, json, mmap, os, resource, signal, socket, sys
from outstation.ml.model.sandbox import confinement
attacks, parent, group = json.loads(sys.argv[1]), os.getppid(), os.getpgid(0)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
memory = mmap.mmap(-1, 4096)
page = ctypes.addressof(ctypes.c_char.from_buffer(memory))
numbers = {name: seccomp.seccomp_syscall_resolve_name(name.encode()) for name in json.loads(sys.argv[2])}
libc.syscall.restype = ctypes.c_long

def call(name, *arguments):
    if libc.syscall(numbers[name], *(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), name)

if sys.argv[3] == "confined":
    confinement.confine()
outcomes = {}
for name, attack in attacks.items():
    try:
        eval(attack)
        outcomes[name] = "done"
    except (OSError, ValueError) as error:
        outcomes[name] = getattr(error, "errno", 1)
os.write(1, json.dumps(outcomes).encode())
os._exit(0)
"""


def _attempt(attacks: dict[str, str], mode: str) -> dict[str, str | int]:
    calls = [part.split("'")[1] for part in attacks.values() if part.startswith("call(")]
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(attacks), json.dumps(calls), mode],
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "SECRET": "token"},
    )
    assert child.returncode == 0, child.stderr.decode()
    outcomes: dict[str, str | int] = json.loads(child.stdout)
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | int]:
    return _attempt(ATTACKS, "confined")


@pytest.mark.attack("confinement")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_model_cannot(attack: str, outcomes: dict[str, str | int]) -> None:
    assert outcomes[attack] == errno.EPERM


@pytest.mark.attack("confinement")
def test_threads_that_run_already_are_confined_too() -> None:
    code = (
        "import os, pathlib, threading; from outstation.ml.model.sandbox import confinement; stop = threading.Event(); "
    )
    code += "threading.Thread(target=stop.wait, daemon=True).start(); files = [open(p / 'status') for p in "
    code += "pathlib.Path('/proc/self/task').iterdir()]; confinement.confine(); "
    code += "os.write(1, ''.join(f.read() for f in files).encode()); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert [line for line in done.stdout.splitlines() if line.startswith("Seccomp:")] == ["Seccomp:\t2"] * 2


_FILLING = """
import os
from outstation.ml.model.sandbox import confinement
file = os.memfd_create("shared")
confinement.confine()
try:
    os.write(file, bytes(1 << 20))
except OSError as error:
    os.write(1, str(error.errno).encode())
os._exit(0)
"""


@pytest.mark.attack("confinement")
def test_a_hostile_model_cannot_fill_memory_through_a_shared_file() -> None:
    done = subprocess.run([sys.executable, "-c", _FILLING], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == str(errno.EFBIG)


def test_a_model_that_dies_by_a_signal_without_a_name_has_a_cause() -> None:
    assert "signal 40" in probe.describe_death(-40, b"", ResourceLimits())


@pytest.mark.attack("confinement", control=True)
@pytest.mark.parametrize(
    "attack", ["read a file", "read its environment", "list a folder", "open a network connection"]
)
def test_without_confinement_it_can(attack: str) -> None:
    assert _attempt({attack: ATTACKS[attack]}, "free") == {attack: "done"}


def test_a_model_process_is_confined_and_computes_the_bits_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_PASSWORD", "token")
    shipped = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    here = runtime.load_model(shipped.manifest, shipped.model_bytes)
    windows = np.random.default_rng(3).normal(size=(100, *here.input_shape)).astype(np.float32)
    with SubprocessModel(shipped) as there:
        assert np.array_equal(there.invoke(windows), here.invoke(windows))
        assert there.is_confined
        threads = list(Path(f"/proc/{there.pid}/task").glob("*/status"))
        assert all("Seccomp:\t2\n" in status.read_text(encoding="ascii") for status in threads)
        assert b"token" not in Path(f"/proc/{there.pid}/environ").read_bytes()


@pytest.mark.attack("confinement")
def test_a_model_that_runs_over_files_is_confined_and_loads_no_runtime_here(tmp_path: Path) -> None:
    with contextlib.closing(open_exercise()) as model:
        assert model.is_confined
    recordings = str(builtin.recordings_dir() / "exercise.npz")
    code = "import sys; from outstation.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit as end: "
    code += "print(end.code, sorted({'ai_edge_litert', 'tflite_runtime'} & set(sys.modules)))"
    for words in (["run", "exercise", recordings, "-o", str(tmp_path / "a.csv")], ["evaluate", "exercise", recordings]):
        command = [sys.executable, "-c", code, "model", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        # Some rows of the recordings are of no window, which `run` tells by its exit code.
        assert done.stdout.splitlines()[-1] in ("0 []", "1 []"), done.stderr


def open_exercise() -> SubprocessModel:
    shipped = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    model = activation.open_for_files(shipped).model
    assert isinstance(model, SubprocessModel)
    return model


def test_a_bundle_that_names_sixty_four_gib_gets_what_the_site_allows() -> None:
    assert ModelPolicy(memory_mib=256).cap(ResourceLimits(memory_mib=65_536)).memory_mib == 256
    assert ModelPolicy(memory_mib=256).cap(ResourceLimits(memory_mib=128)).memory_mib == 128


def test_where_nothing_can_confine_a_required_confinement_runs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "find_obstacle", lambda: "libseccomp.so.2 is missing")
    shipped = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    report = probe.probe(shipped, policy=ModelPolicy("required"))
    assert not report.ok
    assert "libseccomp.so.2 is missing" in report.checks[0][2]
    with pytest.raises(BadBundle, match="cannot confine a model"):
        activation.load_bundle(activation.ProvenBundle(shipped, None, None), policy=ModelPolicy("required"))
    assert probe.probe(shipped, policy=ModelPolicy("auto")).ok


def test_a_model_process_ends_with_the_last_use_of_its_model() -> None:
    shipped = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    model = SubprocessModel(shipped)
    pid = model.pid
    assert pid is not None
    os.kill(pid, 0)
    del model
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_tasks_of_one_bundle_and_one_policy_share_a_process_and_its_restart() -> None:
    shipped = bundle.read(builtin.bundles_dir() / "exercise", builtin.publisher_keys())
    proven = activation.ProvenBundle(shipped, None, None)
    first, second = (activation.load_bundle(proven).model for _ in range(2))
    other = activation.load_bundle(proven, policy=ModelPolicy(memory_mib=256)).model
    assert isinstance(first, SubprocessModel)
    assert isinstance(other, SubprocessModel)
    assert first is second
    assert first.pid != other.pid
    windows = np.zeros((1, *runtime.load_model(shipped.manifest, shipped.model_bytes).input_shape), np.float32)
    before, pid = first.invoke(windows), first.pid
    first.close()
    assert np.array_equal(second.invoke(windows), before), "one task closes it, and it starts again for the other"
    assert first.pid != pid


def test_the_name_of_the_runtime_is_known_without_loading_it() -> None:
    code = "import sys; from outstation.ml.model.inference.runtime_name import runtime_name as n; print(n()); "
    code += "print({'ai_edge_litert', 'tflite_runtime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    [package] = {"ai_edge_litert", "tflite_runtime"} & set(sys.modules)
    assert done.stdout.splitlines() == [f"{package.replace('_', '-')} {sys.modules[package].__version__}", "set()"]
    assert runtime_name() == done.stdout.splitlines()[0]

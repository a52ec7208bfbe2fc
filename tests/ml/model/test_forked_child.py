"""Model process by fork: it has the model's answers, and nothing that this process knows or has open."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outstation.device.cli.init import TEMPLATE
from outstation.ml.model.sandbox import forked_child
from outstation.ml.model.sandbox.forked_child import ForkedChild
from tests.kit.stations import ROOT

pytestmark = pytest.mark.process

_HEAD = """
import contextlib, json, os, re, signal, sys, threading, time
from pathlib import Path
from outstation.device.cli import spare
from outstation.ml.model.sandbox import launch
from outstation.ml.model.sandbox.forked_child import ForkedChild, can_fork

def holds(pid, text):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            begin, end, rights = re.match("(\\\\w+)-(\\\\w+) (...)", line).groups()
            if rights.startswith("rw"):
                memory.seek(int(begin, 16))
                if text in memory.read(int(end, 16) - int(begin, 16)):
                    return True
    return False
"""
_SECRETS = """
unlisted = os.open("/etc/passwd", os.O_RDONLY)
os.set_inheritable(unlisted, True)
with spare.prepared(sys.argv[1]):
    worker = launch._spare
    assert isinstance(worker.child, ForkedChild)
    # Asked for only now: no other copy of them is in this process's own memory before.
    secrets = os.environb[b"BROKER_TOKEN"], Path(sys.argv[2]).read_bytes().strip()
    shared = [worker.child.stdin, worker.child.stdout, worker.child.stderr, worker._job_fd, worker.shared.fd]
    own = {os.fstat(getattr(file, "fileno", lambda: file)()).st_ino for file in shared}

    def other_files():
        with contextlib.suppress(FileNotFoundError):
            found = [path.stat().st_ino for path in Path(f"/proc/{worker.child.pid}/fd").iterdir()]
            return [inode for inode in found if inode not in own]

    # It opens files of its own for a moment, while it imports the runtime.
    end = time.monotonic() + 60
    while other_files() != [] and time.monotonic() < end:
        time.sleep(0.05)
    print(json.dumps({
        "held": [holds(worker.child.pid, secret) for secret in secrets],
        "control": [holds(os.getpid(), secret) for secret in secrets],
        "files": other_files(),
        "is_alive": worker.child.poll() is None,
    }))
"""
_ANSWERS = """
import numpy as np
launch.fork_spare()
child = launch._spare.child
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import runtime
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
shipped = bundle.read(builtin.bundles_dir() / "exercise", None)
with SubprocessModel(shipped) as model:
    windows = np.random.default_rng(0).normal(0, 1, (40, *model.input_shape)).astype(np.float32)
    answers, is_confined = model.invoke(windows), model.is_confined
    status = Path(f"/proc/{child.pid}/status").read_text()
here = runtime.load_model(shipped.manifest, shipped.model_bytes).invoke(windows)
print(json.dumps({
    "is_fork": model.pid is None and isinstance(child, ForkedChild),
    "equal": bool((answers == here).all()),
    "is_confined": is_confined,
    "filters": re.findall("Seccomp:\\\\t(\\\\d)", status),
    "code": child.poll(),
}))
"""
_ENDS = """
os.environ["LATER"] = "set later"

def seen(name):
    return lambda: os.write(1, f"{os.environ.get(name)} {os.getenv(name)}".encode())

def end_of(run):
    child = ForkedChild(run, ())
    return child.stdout.read().decode(), child.stderr.read().decode()[-34:], child.wait(), child.poll()

child = ForkedChild(signal.pause, ())
child.kill()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(json.dumps({
    "normal": end_of(lambda: os.write(1, b"done")),
    "failed": end_of(lambda: 1 // 0),
    "killed": child.wait(),
    "variables": end_of(seen("BROKER_TOKEN"))[0] + " " + end_of(seen("LATER"))[0],
    "with threads": can_fork(),
}))
"""


def run(script: str, *arguments: str) -> dict[str, object]:
    """Run a script in a process with one thread; pytest's own has several."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _HEAD + script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=ROOT,
        env={**os.environ, "BROKER_TOKEN": "token-of-the-environment", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, object] = json.loads(done.stdout)
    return results


@pytest.mark.attack("confinement")
def test_a_forked_model_process_holds_no_variable_no_password_and_no_file_of_the_daemon(tmp_path: Path) -> None:
    config, password = tmp_path / "outstation.toml", tmp_path / "password"
    text = TEMPLATE.format(device="pi-07", fleet="acme", data_dir="data", collector="")
    text += '\n[tasks.sort]\nstream = "host"\nbundle = "sort.bundle"\n'
    password.write_text("password-of-the-broker")
    config.write_text(text.replace("[broker]", f'[broker]\npassword = "{password.read_text()}"'))
    assert password.read_text() in config.read_text()
    assert run(_SECRETS, str(config), str(password)) == {
        "held": [False, False],
        "control": [True, True],
        "files": [],
        "is_alive": True,
    }


def test_a_forked_model_process_is_confined_and_gives_the_same_answers() -> None:
    expected = {"is_fork": True, "equal": True, "is_confined": True, "code": -9}
    assert run(_ANSWERS) == {**expected, "filters": ["2"]}


def test_the_end_of_a_forked_child_is_seen_and_threads_prevent_a_fork() -> None:
    results = run(_ENDS)
    assert results.pop("failed")[1:] == ["integer division or modulo by zero\n"[-34:], 1, 1]  # type: ignore[index]
    assert results == {
        "normal": ["done", "", 0, 0],
        "killed": -9,
        "variables": "None None None None",
        "with threads": False,
    }


def test_a_fork_without_descriptors_for_its_pipes_leaves_none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, made = os.pipe, list[int]()

    def fail_at_third() -> tuple[int, int]:
        if len(made) == 4:
            raise OSError(errno.EMFILE, "Too many open files")
        made.extend(ends := pipe())
        return ends

    monkeypatch.setattr(os, "pipe", fail_at_third)
    with pytest.raises(OSError, match="Too many open files"):
        ForkedChild(lambda: None, ())
    assert len(made) == 4
    for fd in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_kernel_that_hides_the_environment_prevents_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text("1 (python) S " + " 0" * 49)
    monkeypatch.setattr(forked_child, "_STATUS", str(tmp_path / "stat"))
    with pytest.raises(OSError, match="place of the environment"):
        forked_child._erase_environment()
    assert os.environ


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", "2>/dev/null"])
def test_the_command_goes_on_when_standard_error_is_closed_or_full(stream: str) -> None:
    script = "import os\nfrom outstation.ml.model.inference.info_lines import hide_info_lines\n"
    script += "with hide_info_lines():\n    os.path.exists('/dev/fd/2') and os.write(2, b'a line')\nprint('done')"
    command = ["sh", "-c", f'exec "$0" -c "$1" {stream}', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n")

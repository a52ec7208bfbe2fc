"""Crash marker: the next start knows which model ended the daemon; power cuts and torn writes do not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outstation.device.bundles.quarantine import FILE, CrashMarker
from outstation.foundation import clock

_DIES = """\
import os, sys
from pathlib import Path
from outstation.device.bundles.quarantine import CrashMarker

with CrashMarker(Path(sys.argv[1])).guard_run("sort", "sha256:bad"):
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def died(folder: Path, signum: int) -> None:
    done = subprocess.run([sys.executable, "-c", _DIES, str(folder), str(signum)], check=False, timeout=60)
    assert done.returncode == -signum


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_process_that_dies_within_the_model_leaves_its_mark(tmp_path: Path, signum: int) -> None:
    died(tmp_path, signum)
    left = CrashMarker(tmp_path).previous
    assert left is not None
    assert (left.task, left.digest) == ("sort", "sha256:bad")


def test_two_crashes_leave_different_markers(tmp_path: Path) -> None:
    collected = []
    for _ in range(2):
        died(tmp_path, signal.SIGKILL)
        collected.append(CrashMarker(tmp_path).previous)
    assert collected[0] is not None
    assert collected[1] is not None
    assert collected[0].id != collected[1].id


def test_the_size_of_the_marker_does_not_depend_on_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices report the bytes that they write, the same in each run."""
    sizes = set()
    for pid, ns in ((7, 1), (4_194_303, 2**62)):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        monkeypatch.setattr(time, "monotonic_ns", lambda ns=ns: ns)
        with CrashMarker(tmp_path).guard_run("sort", "sha256:good"):
            sizes.add(len((tmp_path / FILE).read_bytes().rstrip(b"\0")))
    assert len(sizes) == 1


def test_a_run_that_ends_or_raises_leaves_none(tmp_path: Path) -> None:
    made = CrashMarker(tmp_path)
    with made.guard_run("sort", "sha256:good"):
        assert CrashMarker(tmp_path).previous is not None
    assert CrashMarker(tmp_path).previous is None
    with pytest.raises(ValueError, match="of the model"), made.guard_run("sort", "sha256:good"):
        raise ValueError("of the model")
    assert CrashMarker(tmp_path).previous is None


def test_a_mark_from_before_the_machine_was_started_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died(tmp_path, signal.SIGKILL)
    monkeypatch.setattr(clock, "boot_id", lambda: "another")
    assert CrashMarker(tmp_path).previous is None


def test_a_folder_that_takes_no_file_stops_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).mkdir()
    made = CrashMarker(tmp_path)
    assert made.previous is None
    for _ in range(3):
        with made.guard_run("sort", "sha256:good"):
            pass
    assert len(caplog.records) == 1
    assert "a model that ends the daemon is not detected" in caplog.text

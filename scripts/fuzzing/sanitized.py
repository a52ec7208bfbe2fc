"""Fuzzing under sanitizers: the kernel built by GCC for them, and a process that runs a target with it.

The process needs the sanitizer's library before all others. An error ends it; the input is in a file by then.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from outstation.ml.kernel import library
from scripts import fuzzing
from scripts.fuzzing import Target
from scripts.fuzzing.explore import ROOT, Crash, explore
from scripts.packaging import kernel
from scripts.packaging.kernel import CompilerError

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
_CHECK_S = 300  # beyond the seconds of a run, for its start and its last input


def run(target: Target, seed: int, seconds: int, folder: Path, runs: int = sys.maxsize) -> tuple[str, list[Crash]]:
    """Run a target in a process with the sanitized kernel; return its summary and the crash that ended it.

    Raises CompilerError if the kernel cannot be built so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    built, last = folder / "kernel.so", folder / f"{target.name}.last"
    kernel.compile_kernel(built, platform.machine(), [_find_gcc()], extra=SANITIZERS, link=("-shared", *SANITIZERS))
    environment = os.environ | {
        "LD_PRELOAD": _find_sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONMALLOC": "malloc",
    }
    arguments = [target.name, str(seed), str(seconds), str(runs), str(built), str(last)]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.fuzzing.sanitized", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + _CHECK_S,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip(), []
    lines = done.stderr.splitlines()
    place = next((line for line in lines if "ERROR:" in line or "runtime error:" in line), f"exit {done.returncode}")
    return f"{target.name} ended by an error", [
        Crash(target.name, last.read_bytes() if last.exists() else b"", place, done.stderr[-20_000:])
    ]


def _find_gcc() -> str:
    path = shutil.which("gcc")
    if path is None:
        raise CompilerError("no gcc, whose sanitizers are used: apt-get install gcc")
    return path


def _find_sanitizer() -> str:
    done = subprocess.run([_find_gcc(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        raise CompilerError("gcc has no libasan: apt-get install libgcc-12-dev, or that of its version")
    return str(path.resolve())


def main(arguments: list[str]) -> int:
    """Run a target with the library at a path; note each input before it runs."""
    name, seed, seconds, runs, built, last = arguments
    target, compiled, file = fuzzing.load()[name], library.load(Path(built)), Path(last)
    library.kernel = lambda: compiled

    def noted(data: bytes) -> None:
        file.write_bytes(data)
        target.run(data)

    watched = replace(target, run=noted)
    findings = explore(watched, int(seed), float(seconds), int(runs))
    for crash in findings.crashes.values():
        print(crash.trace, file=sys.stderr)
        file.write_bytes(crash.data)
        return 1
    print(f"{name:14} {findings.runs:8} inputs under sanitizers, variant {compiled.variant}, 0 crashes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

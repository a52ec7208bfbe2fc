"""Compiled kernel: `kernel.c` as a shared library for this machine, or for another one by Clang and LLD.

The library needs no header, no library and no symbol but memcpy and memset of the process that loads it: so one
compiler builds it for all platforms, and it runs with any C library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "agent/outstation/ml/kernel/kernel.c"
LIBRARY = SOURCE.with_name("kernel.so")
# Results have the same bits on all processors: no fused multiply-add, no relaxed arithmetic.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-ffreestanding",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
LINK = ("-shared", "-nostdlib", "-Wl,-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack")
# Machine of Python → target of Clang.
TRIPLES = {
    "x86_64": "x86_64-linux-gnu",
    "aarch64": "aarch64-linux-gnu",
    "armv7l": "armv7a-linux-gnueabihf",
}
# Sets of instructions beyond the least one of a machine, of which the loader selects one.
VARIANTS = {"x86_64": {"avx2": ("-mavx2", "-mpclmul")}}
_CLANGS = ("clang", *(f"clang-{version}" for version in range(22, 13, -1)))


class CompilerError(Exception):
    """The kernel cannot be built; the text says why."""


def find_compiler(machine: str) -> list[str]:
    """Return the command of a compiler for `machine`. Raises CompilerError."""
    if machine == platform.machine() and sys.platform == "linux":
        # Clang first: its loops are half as long.
        commands = [os.environ["CC"]] if os.environ.get("CC") else [*_CLANGS, "cc", "gcc"]
        for command in map(shlex.split, commands):
            if shutil.which(command[0]):
                return command
        raise CompilerError("no C compiler (clang, cc, gcc)")
    return find_clang(machine)


def find_clang(machine: str) -> list[str]:
    """Return the command of Clang for `machine`. Raises CompilerError."""
    if machine not in TRIPLES:
        raise CompilerError(f"no kernel for machine {machine!r}; there is one for {', '.join(TRIPLES)}")
    for name in _CLANGS:
        if shutil.which(name) and shutil.which(name.replace("clang", "ld.lld")):
            return [name, f"--target={TRIPLES[machine]}", "-fuse-ld=lld"]
    raise CompilerError(f"no C compiler for {machine}: install Debian's packages clang and lld")


def compile_kernel(
    output: Path, machine: str, compiler: Sequence[str], *, extra: Sequence[str] = (), link: Sequence[str] = LINK
) -> None:
    """Build the library, with `extra` flags of the compiler. Raises CompilerError."""
    variants = {"baseline": (), **VARIANTS.get(machine, {})}
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory(prefix="outstation-kernel-") as folder:
        objects = []
        for name, flags in variants.items():
            defined = [f"-DVARIANT={name}"]
            if name == "baseline":
                defined += [f'-DSOURCE_DIGEST="{digest}"', *(f"-DWITH_{other.upper()}" for other in variants)]
            objects.append(f"{name}.o")
            _run([*compiler, *FLAGS, *extra, *flags, *defined, "-c", str(SOURCE), "-o", objects[-1]], folder)
        _run([*compiler, *link, *objects, "-o", "kernel.so"], folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed, as a process may have the old one open.
        new = output.with_suffix(".new")
        content = (Path(folder) / "kernel.so").read_bytes()
        # The loader of libraries ignores what follows; ours refuses a file that does not end with its own digest.
        new.write_bytes(content + hashlib.sha256(content).digest())
        new.replace(output)


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise CompilerError(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()[-800:]}")


if __name__ == "__main__":
    compile_kernel(LIBRARY, platform.machine(), find_compiler(platform.machine()))
    print(LIBRARY)

"""Kernel library: a library is used only if it was built from the source beside it, and its absence is explained."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from outstation.ml.kernel import library
from scripts.packaging import kernel


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    try:
        return kernel.find_compiler(platform.machine())
    except kernel.CompilerError as error:
        pytest.skip(f"the kernel cannot be built: {error}")


@pytest.fixture(scope="module")
def built(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    kernel.compile_kernel(path, platform.machine(), compiler)
    return path


def test_a_library_built_here_runs_in_each_of_its_variants(built: Path) -> None:
    best = library.load(built)
    assert library.load(built, "baseline").variant == "baseline"
    assert best.variant in ("baseline", "avx2")
    with pytest.raises(OSError, match="no variant 'avx9'"):
        library.load(built, "avx9")


def test_a_library_of_another_source_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "digest_source", lambda: "0" * 64)
    with pytest.raises(OSError, match="another source: install the program again"):
        library.load(built)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_library_that_a_power_cut_left_in_part_is_refused(
    built: Path, tmp_path: Path, share: float, zeros: bool
) -> None:
    content, path = built.read_bytes(), tmp_path / "kernel.so"
    size = int(len(content) * share)
    path.write_bytes(content[:size] + bytes(len(content) - size if zeros else 0))
    with pytest.raises(OSError, match=r"kernel\.so is damaged: install the program again"):
        library.load(path)


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF" + b"\0" * 60])
def test_a_missing_or_damaged_library_is_an_error_that_says_so(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "kernel.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError, match="not built" if content is None else str(path)):
        library.load(path)


def test_a_build_without_a_working_compiler_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(kernel.CompilerError, match="no C compiler"):
        kernel.find_compiler(platform.machine())
    with pytest.raises(kernel.CompilerError, match="failed with 1"):
        kernel.compile_kernel(tmp_path / "kernel.so", "x86_64", [sys.executable, "-c", "raise SystemExit(1)"])
    assert not (tmp_path / "kernel.so").exists()


@pytest.mark.parametrize("machine", kernel.TRIPLES)
def test_a_library_for_each_machine_needs_nothing_but_memory_functions(machine: str, tmp_path: Path) -> None:
    try:
        compiler = kernel.find_clang(machine)
    except kernel.CompilerError as error:
        pytest.skip(str(error))
    if shutil.which("readelf") is None:
        pytest.skip("no readelf: apt-get install binutils")
    path = tmp_path / "kernel.so"
    kernel.compile_kernel(path, machine, compiler)
    listing = subprocess.run(["readelf", "-dW", "--dyn-syms", str(path)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listing.stdout.splitlines() if " UND " in line]
    undefined = {name for name in names if name != "UND"}
    assert undefined <= {"memcpy", "memset"}
    assert "(NEEDED)" not in listing.stdout

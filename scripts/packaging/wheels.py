"""Wheels: the program's own, and its locked libraries, unpacked for any suite and architecture.

Wheels of a foreign architecture are only unpacked, so that no emulator is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from scripts.packaging import kernel
from scripts.packaging.targets import ROOT, Architecture, PackagingError, Suite, run

ANY_MACHINE = "none"  # as the build hook calls it
LOCK = ROOT / "deploy" / "requirements.txt"
_VERSION_MARKER = re.compile(r"python_version == '([\d.]+)'")
# Never needed on a device: tests, type stubs, headers, GPUs, compilers for vendors' accelerators, pip, which
# sqlite-utils would install plugins with, and Arrow's remote procedure calls and cloud storage.
_UNUSED_NAMES = ("tests", "*.pyi", "*.pxd", "*.pyx", "*.pxi", "*.a", "*.h", ".gitignore")
_UNUSED = ("bin", "pip", "pip-*.dist-info", "numpy/f2py", "ai_edge_litert/aot", "ai_edge_litert/tools",
           "ai_edge_litert/vendors", "ai_edge_litert/*WebGpu*", "pyarrow/include", "pyarrow/src", "pyarrow/*_flight*",
           "pyarrow/*_s3*", "pyarrow/_gcsfs*", "pyarrow/_azurefs*", "_duckdb-stubs")  # fmt: skip


def select_locked(lock: str, sections: Sequence[str], python: str, without: Sequence[str] = ()) -> str:
    """Return the requirements of `sections` of a lock, with their hashes, that apply to a Python version.

    Those of the sections `without` are left out, and each is listed once.
    """
    current, requirements, applies = "", [], False
    listed = set(select_locked(lock, without, python).splitlines()) if without else set()
    known = set(re.findall(r"^# section (\S+)$", lock, re.MULTILINE))
    if missing := set(sections) - known:
        raise PackagingError(f"{LOCK.name}: no section {', '.join(sorted(missing))}; run: python -m scripts.lock")
    for line in lock.splitlines():
        if line.startswith("# section "):
            current = line.removeprefix("# section ")
        elif line and not line.startswith(("#", " ")):
            requirement, _, marker = line.removesuffix(" \\").partition(" ; ")
            versions = _VERSION_MARKER.findall(marker)
            if marker and not versions:
                raise PackagingError(f"{LOCK.name}: the marker of {line!r} is not about Python's version")
            pinned = f"{requirement} \\"
            applies = current in sections and (not versions or python in versions) and pinned not in listed
            if applies:
                listed.add(pinned)
                requirements.append(pinned)
        elif applies and line.startswith(" "):
            requirements.append(line)
    return "\n".join(requirements) + "\n"


def build_wheel(folder: Path, epoch: int, kind: str = "wheel", machine: str = ANY_MACHINE) -> Path:
    """Build the program's wheel or sdist in `folder` with the locked build tools; equal sources give equal bytes.

    A wheel for a `machine` has the compiled kernel for it; one for any machine has none.
    """
    tools = folder / "build-tools"
    if not tools.exists():
        requirements = folder / "build-requirements.txt"
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        requirements.write_text(select_locked(LOCK.read_text(encoding="utf-8"), ["build"], version), encoding="utf-8")
        _pip("install", "--no-deps", "--require-hashes", "--target", str(tools), "-r", str(requirements))
    made = folder / kind
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    script = f"import os, hatchling.build as build; os.chdir({str(ROOT)!r}); build.build_{kind}({str(made)!r})"
    environment = os.environ | {
        "PYTHONPATH": str(tools),
        "SOURCE_DATE_EPOCH": str(epoch),
        "OUTSTATION_KERNEL_MACHINE": machine,
    }
    # Generated archives of another run must not become part of this one.
    run([sys.executable, "-c", script], env=environment)
    (archive,) = made.iterdir()
    return archive


def choose_machine(machine: str) -> str:
    """Return `machine`, or `ANY_MACHINE` with a warning if no compiler for it is here."""
    try:
        kernel.find_clang(machine)
    except kernel.CompilerError as error:
        print(f"without the compiled kernel: {error}", file=sys.stderr)
        return ANY_MACHINE
    return machine


def unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel into a site-packages folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


def install_compiled(site: Path, locked: str, folder: Path, architecture: Architecture) -> str:
    """Unpack the wheels of the libraries that the package index has only as sources.

    Return `locked` without them, and without what Debian provides. Raises PackagingError if `folder` has not those of
    the locked versions.
    """
    provided = {name for name, _ in architecture.debian}
    blocks = re.findall(r"^(\S+)==(\S+) \\\n((?: .+\n)+)", locked, re.MULTILINE)
    for name, version, _ in blocks:
        if name in architecture.compiled:
            wheels = sorted(folder.glob(f"{name}-{version}-*.whl"))
            if len(wheels) != 1:
                raise PackagingError(f"{folder}: has not one wheel of {name} {version}, which the lock names")
            unpack(wheels[0], site)
    return "".join(
        f"{name}=={version} \\\n{hashes}"
        for name, version, hashes in blocks
        if name not in provided and name not in architecture.compiled
    )


def install_locked(site: Path, locked: str, suite: Suite, architecture: Architecture, folder: Path) -> None:
    """Install what `select_locked` returned into a site-packages folder. Raises PackagingError."""
    requirements = folder / "requirements.txt"
    requirements.write_text(locked, encoding="utf-8")
    platforms = [argument for platform in architecture.platforms for argument in ("--platform", platform)]
    _pip(
        *("install", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-compile", "--target", str(site)),
        *("--implementation", "cp", "--python-version", suite.python, *platforms, "-r", str(requirements)),
    )
    unused = [path for name in _UNUSED_NAMES for path in site.rglob(name)]
    for path in [*unused, *(path for pattern in _UNUSED for path in site.glob(pattern))]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _pip(*arguments: str) -> None:
    run([sys.executable, "-m", "pip", *arguments[:1], "--disable-pip-version-check", "-q", *arguments[1:]])

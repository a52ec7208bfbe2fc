"""Targets of the packages: Debian suites, architectures, and the wheels that fit them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]


class PackagingError(Exception):
    """A package cannot be made; the text says why and what to do."""


class Suite(msgspec.Struct, frozen=True):
    """A Debian release: `release` orders its packages, `python` is its only Python."""

    name: str
    release: int
    python: str

    @property
    def next_python(self) -> str:
        major, minor = self.python.split(".")
        return f"{major}.{int(minor) + 1}"


class Architecture(msgspec.Struct, frozen=True):
    """A processor: Debian's name, Python's, and that of container images.

    `compiled` are libraries without wheels for it; `debian` maps libraries that Debian provides to their packages.
    """

    name: str
    machine: str
    image: str
    lock: str = "requirements.txt"
    suites: tuple[str, ...] = ("bookworm", "trixie")
    compiled: tuple[str, ...] = ()
    debian: tuple[tuple[str, str], ...] = ()

    @property
    def platforms(self) -> list[str]:
        """Platform tags of wheels that run on glibc 2.36, Debian 12's."""
        versions = range(36, 4, -1)
        older = ("manylinux2014", "manylinux2010", "manylinux1")
        return [f"manylinux_2_{minor}_{self.machine}" for minor in versions] + [
            f"{tag}_{self.machine}" for tag in older
        ]


SUITES = {suite.name: suite for suite in (Suite("bookworm", 12, "3.11"), Suite("trixie", 13, "3.13"))}
ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("amd64", "x86_64", "amd64"),
        Architecture("arm64", "aarch64", "arm64"),
        Architecture(
            *("armhf", "armv7l", "arm", "requirements-armv7.txt"),
            # The last TFLite runtime for 32 bits is for Python 3.11.
            suites=("bookworm",),
            compiled=("cffi", "msgspec", "psutil"),
            debian=(("numpy", "python3-numpy"),),
        ),
    )
}
DEFAULT_ARCHITECTURES = ("amd64", "arm64")  # those whose libraries all have wheels


def program_version() -> str:
    """Return the version in `agent/outstation/__init__.py`."""
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "agent/outstation/__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise PackagingError("agent/outstation/__init__.py: has no line __version__ = …")
    return match[1]


def source_date() -> int:
    """Return the time of all packed files, in s since 1970: $SOURCE_DATE_EPOCH, or that of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise PackagingError("no time for the packed files: this is no git checkout; set SOURCE_DATE_EPOCH")
    return int(done.stdout)


def run(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
    """Run a command and return it with its output. Raises PackagingError with the end of its messages."""
    done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload]
    if done.returncode != 0:
        end = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise PackagingError(f"{' '.join(command[:4])} … failed with {done.returncode}:\n{end}")
    return done

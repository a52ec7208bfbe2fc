"""Locks of what deploy/install.sh installs: every version pinned, every file's hash named.

    python -m scripts.lock           resolve anew with uv, from the package index
    python -m scripts.lock --check   compare the locks with pyproject.toml, without network
    python -m scripts.lock --audit   ask pip-audit for known vulnerabilities of the pinned versions

A lock has one section for the device and one for each extra, each with what its extra adds. 64-bit Linux and 32-bit ARM
have a lock each: their runtimes and numpy differ. The last section builds the package from a checkout, and
on 32-bit ARM the libraries that have no wheels.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from scripts.kit.usage import answer_help

ROOT = Path(__file__).parents[1]
EXTRAS = ("fleet", "images", "notify", "parquet", "plot", "postgres", "sql")
BUILD = "build"
# Lock → processor, Python versions.
TARGETS = {
    "requirements.txt": ("x86_64", ("3.11", "3.12", "3.13", "3.14")),
    "requirements-armv7.txt": ("armv7l", ("3.11",)),
}
# Extras whose libraries have no wheels for 32-bit ARM; pip would build them for hours.
NOT_FOR_ARM = ("images", "parquet", "plot", "postgres", "sql")
# What compiles cffi, msgspec and psutil on 32-bit ARM, where they have no wheels either.
COMPILE_FOR_ARM = ("setuptools>=80", "setuptools-scm>=8")
_UV, _PIP_AUDIT = "uv>=0.9", "pip-audit>=2.10"
_AUDIT_TIMEOUT_S = 300.0
# Later versions exclude Python 3.11 and above, a bound that uv does not read.
_CONSTRAINTS = ("backports-strenum<1.3",)

# Package and version → its lines; by Python version.
Resolved = dict[str, str]


def digest_of_dependencies() -> str:
    """Return the SHA-256 of everything in pyproject.toml that a lock depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = {name: project["project"]["optional-dependencies"][name] for name in EXTRAS}
    depends = [project["project"]["dependencies"], extras, project["build-system"]["requires"]]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def check() -> list[str]:
    """Return what is wrong with the locks."""
    problems = []
    for name in TARGETS:
        text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
        if f"# sha256 of the dependencies: {digest_of_dependencies()}\n" not in text:
            problems.append(
                f"deploy/{name} is older than the dependencies in pyproject.toml; run: python -m scripts.lock"
            )
        blocks = text.replace(" \\\n", " ").splitlines()
        pins = [line for line in blocks if line and not line.startswith("#")]
        problems += [
            f"deploy/{name}: no version or hash: {p}" for p in pins if "==" not in p or "--hash=sha256:" not in p
        ]
    return problems


def audit() -> list[str]:
    """Return the known vulnerabilities of what the locks pin; print one line if the database cannot be reached."""
    known: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            _install(Path(folder), _PIP_AUDIT)
            for name in TARGETS:
                command = [f"{folder}/bin/pip-audit", "-r", str(ROOT / "deploy" / name), "--require-hashes"]
                command += ["--disable-pip", "--progress-spinner", "off", "--format", "json"]
                ran = subprocess.run(command, capture_output=True, text=True, timeout=_AUDIT_TIMEOUT_S)
                known += list_vulnerabilities(name, ran.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            print(f"lock: not audited, the database of vulnerabilities cannot be reached: {str(error)[:120]}")
    return known


def list_vulnerabilities(lock: str, document: str) -> list[str]:
    """Return one line for each known vulnerability in pip-audit's JSON. Raises ValueError if nothing was audited."""
    packages = json.loads(document)["dependencies"]
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        raise ValueError(f"none of the {len(packages)} packages of {lock} is known there")
    return [
        f"deploy/{lock}: {package['name']} {package['version']}: {entry['id']}, "
        f"mended in {', '.join(entry['fix_versions']) or 'no version yet'}"
        for package in audited
        for entry in package["vulns"]
    ]


def _install(folder: Path, tool: str) -> None:
    """Install a tool into an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", tool], check=True, capture_output=True
    )


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        problems = check()
        print("\n".join(problems), end="\n" if problems else "")
        sys.exit(bool(problems))
    if sys.argv[1:] == ["--audit"]:
        known = sorted(set(audit()))
        print("\n".join(known), end="\n" if known else "")
        sys.exit(bool(known))
    with tempfile.TemporaryDirectory() as folder:
        _install(Path(folder), _UV)
        for name, (platform, pythons) in TARGETS.items():
            (ROOT / "deploy" / name).write_text(_render(Path(folder), platform, pythons), encoding="utf-8")


def _render(folder: Path, platform: str, pythons: Sequence[str]) -> str:
    extras = [extra for extra in EXTRAS if not (platform == "armv7l" and extra in NOT_FOR_ARM)]
    sections: dict[str, dict[str, list[str]]] = {name: {} for name in ("device", *extras, BUILD)}
    for python in pythons:
        everything = folder / "everything.txt"
        everything.write_text("".join(_resolve(folder, platform, python, extras).values()), encoding="utf-8")
        device = _resolve(folder, platform, python, (), everything)
        resolved = {"device": device, BUILD: _resolve(folder, platform, python, None)}
        for extra in extras:
            more = _resolve(folder, platform, python, (extra,), everything)
            resolved[extra] = {name: lines for name, lines in more.items() if name not in device}
        for section, packages in resolved.items():
            for lines in packages.values():
                sections[section].setdefault(lines, []).append(python)
    text = "# Made by `python -m scripts.lock`: do not edit.\n"
    text += f"# sha256 of the dependencies: {digest_of_dependencies()}\n"
    for section, blocks in sections.items():
        text += f"# section {section}\n" + "".join(_with_marker(*block, pythons) for block in sorted(blocks.items()))
    return text


def _with_marker(lines: str, versions: Sequence[str], pythons: Sequence[str]) -> str:
    if len(versions) == len(pythons):
        return lines
    condition = " or ".join(f"python_version == '{python}'" for python in versions)
    return lines.replace(" \\\n", f" ; {condition} \\\n", 1)


def _resolve(
    folder: Path, platform: str, python: str, extras: Sequence[str] | None, constraints: Path | None = None
) -> Resolved:
    """Return package → its lines of a lock; `extras` None: what builds the package."""
    command = [str(folder / "bin" / "uv"), "pip", "compile", "-q", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--python-version", python]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # uv knows no platform for 32-bit ARM: it resolves for an environment, which is named in a copy of the project.
    environment = f"sys_platform == 'linux' and platform_machine == '{platform}' and python_version == '{python}'"
    requires = project["build-system"]["requires"]
    if extras is None:
        project["project"]["dependencies"] = [*requires, *(COMPILE_FOR_ARM if platform == "armv7l" else ())]
    else:
        command += [part for extra in extras for part in ("--extra", extra)]
    copy = {"name": "outstation", "version": "0", "dependencies": project["project"]["dependencies"]}
    tables = {"project": copy, "project.optional-dependencies": project["project"]["optional-dependencies"]}
    tables["tool.uv"] = {"environments": [environment]}
    # A JSON list or string is also a TOML one.
    text = "".join(
        f"[{t}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items()) for t, table in tables.items()
    )
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    command += ["--universal", "pyproject.toml"]
    (folder / "constraints.txt").write_text("\n".join(_CONSTRAINTS), encoding="utf-8")
    command += ["--constraint", "constraints.txt"]
    if constraints is not None:
        command += ["--constraint", str(constraints)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    packages: Resolved = {}
    for line in text.splitlines(keepends=True):
        if not line.startswith(" "):
            name = line.partition("==")[0]
            packages[name] = ""
            line = re.sub(r" ; .*(?= \\\n)", "", line)
        packages[name] += line
    return packages


if __name__ == "__main__":
    answer_help(__doc__)
    main()

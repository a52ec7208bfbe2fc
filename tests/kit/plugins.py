"""Packages of others with entry points, as pip installs them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path


def install_module(folder: Path, package: str, text: str, group: str, name: str, attribute: str = "") -> None:
    """Write a package of one module, with one entry point, to a folder of `sys.path`."""
    place = f"{package}:{attribute}" if attribute else package
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{package}.py").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {place}\n")


def pip_install(project: Path, folder: Path) -> None:
    """Install a project of plain modules into a folder: build its wheel (PEP 427) without a backend, then run pip."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    stem = f"{settings['name'].replace('-', '_')}-{settings['version']}"
    wheel, info = folder / f"{stem}-py3-none-any.whl", f"{stem}.dist-info"
    entry_points = [
        line
        for group, names in settings["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {place}" for name, place in names.items()))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as file:
        for module in project.glob("*.py"):
            file.write(module, module.name)
        metadata = f"Metadata-Version: 2.1\nName: {settings['name']}\nVersion: {settings['version']}\n"
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/entry_points.txt", "\n".join(entry_points))
        file.writestr(f"{info}/RECORD", "")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True)

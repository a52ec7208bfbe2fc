"""Finder and loader of the package's modules: they give what Python's own give."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli.module_finder import ModuleFinder, ModuleLoader


@pytest.mark.parametrize("name", ["agent.clock", "agent.cli.direct", "agent.drift", "agent.device.store.tables"])
def test_a_module_and_a_package_have_the_spec_of_the_standard_finder(name: str) -> None:
    spec, standard = ModuleFinder.find_spec(name, None), importlib.util.find_spec(name)
    assert spec is not None
    assert standard is not None
    assert (spec.origin, spec.cached, spec.parent) == (standard.origin, standard.cached, standard.parent)
    assert spec.submodule_search_locations == standard.submodule_search_locations


@pytest.mark.parametrize("name", ["agent.missing", "agent.kernel.kernel", "agentless.clock", "json.decoder"])
def test_what_is_no_module_of_the_package_is_left_to_other_finders(name: str) -> None:
    assert ModuleFinder.find_spec(name, None) is None


def test_the_command_line_uses_it() -> None:
    code = "import sys; from agent.cli import main\ntry: main()\nfinally: print(sys.meta_path[0].__name__)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "ModuleFinder"


def _constants(file: Path) -> tuple[object, ...]:
    code = ModuleLoader("module", str(file), file.stat()).get_code("module")
    assert code is not None
    return code.co_consts


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "compiled"))
    file = tmp_path / "module.py"
    file.write_text("answer = 111_111", encoding="utf-8")
    return file


def test_compiled_code_of_the_same_source_is_read(source: Path) -> None:
    before = source.stat()
    py_compile.compile(str(source), doraise=True)
    source.write_text("answer = 222_222", encoding="utf-8")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    # Time and size are those of the compiled source.
    assert 111_111 in _constants(source)


def test_a_changed_source_is_compiled_again(source: Path) -> None:
    py_compile.compile(str(source), doraise=True)
    source.write_text("answer = 333", encoding="utf-8")
    assert 333 in _constants(source)


def test_code_checked_by_a_hash_is_left_to_python(source: Path) -> None:
    py_compile.compile(str(source), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    source.write_text("answer = 222_222", encoding="utf-8")
    assert 222_222 in _constants(source)


@pytest.mark.parametrize("damage", [b"", b"no bytecode", bytes(1 << 17)])
def test_a_damaged_file_of_compiled_code_is_compiled_again(source: Path, damage: bytes) -> None:
    Path(str(py_compile.compile(str(source), doraise=True))).write_bytes(damage)
    assert 111_111 in _constants(source)

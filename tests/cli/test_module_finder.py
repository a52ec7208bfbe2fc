"""Finder of the package's modules: it gives what Python's own finders give."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from agent.cli.module_finder import ModuleFinder


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

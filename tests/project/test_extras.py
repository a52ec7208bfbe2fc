"""Commands that add an optional dependency, by the way this program was installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from outstation.foundation.extras import find_extra, install_command


def test_pip_adds_an_extra_to_an_environment_of_ones_own() -> None:
    assert install_command("sql") == "pip install 'outstation[sql]'"


def test_the_installer_is_called_with_the_extras_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".extras").write_text("images,notify\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert install_command("parquet") == "sudo deploy/install.sh --extras images,notify,parquet"


def test_the_debian_package_is_named_where_it_has_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/opt/outstation")
    assert install_command("plot") == "sudo apt-get install outstation-fleet"
    assert install_command("sql") == "sudo apt-get install outstation-extras"
    assert "venv" in install_command("ray")


def test_a_missing_module_is_looked_up_among_the_extras() -> None:
    assert find_extra("duckdb") == "sql"
    assert find_extra("prometheus_client") == "fleet"
    assert find_extra("duck") is None

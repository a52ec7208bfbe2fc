"""Command `outstation run`: the previous daemon is gone when it starts over."""

from __future__ import annotations

import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.device import run
from agent.errors import StorageForked
from tests.kit.commands import call_outstation


def test_a_daemon_ends_before_the_next_one_starts_in_a_new_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call_outstation("init", str(tmp_path), "--id", "pi-07").returncode == 0
    made, before = [], [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]

    class Forking:
        def run(self) -> None:
            made.append(weakref.ref(self))
            if len(made) == 1:
                raise StorageForked("the store went back in time")

    def daemon(*_: Any) -> Forking:
        assert [reference() for reference in made] == [None] * len(made)
        assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
        return Forking()

    monkeypatch.setattr(run, "build_daemon", daemon)
    done = CliRunner().invoke(run.run, ["-c", str(tmp_path / "outstation.toml")], catch_exceptions=False)
    assert (done.exit_code, len(made)) == (0, 2)

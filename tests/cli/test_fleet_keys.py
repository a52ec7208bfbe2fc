"""Command `outstation fleet keys`: arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.commands import call_outstation


@pytest.mark.parametrize("words", [("add", "operator"), ("revoke",), ("reset-counter",)])
def test_a_key_that_begins_with_a_dash_is_no_option(tmp_path: Path, words: tuple[str, ...]) -> None:
    key = "-yh" + "A" * 40
    done = call_outstation("fleet", "keys", *words, key, "--dir", str(tmp_path))
    assert "No such option" not in done.stderr
    assert "outstation fleet init" in done.stderr, "it went on to the folder, which has no fleet"

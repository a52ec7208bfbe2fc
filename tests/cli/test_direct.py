"""Arguments that `run` and `batch` parse without click: the same as click finds, or none."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.cli import processing
from outstation.foundation.cli import direct

WORDS = [
    "-c",
    "--config",
    "-cx",
    "--config=y",
    "--config=",
    "--json",
    "-v",
    "--verbose",
    "--",
    "-",
    "task",
    "-vc",
    "-h",
]


@given(st.sampled_from(["run", "batch"]), st.lists(st.sampled_from(WORDS), max_size=5))
def test_parsed_arguments_are_those_that_click_parses(name: str, words: list[str]) -> None:
    parameters = direct.parse([name, *words])
    if parameters is not None:
        command: click.Command = getattr(processing, name)
        assert command.make_context("", list(words)).params == parameters


@pytest.mark.parametrize("words", [["run"], ["run", "-v", "-c", "x"], ["batch", "task", "--json", "--config=x"]])
def test_plain_arguments_need_no_click(words: list[str]) -> None:
    assert direct.parse(words) is not None


@pytest.mark.parametrize("words", [["run", "--help"], ["run", "task"], ["batch", "--fast"], ["batch", "-c"]])
def test_click_explains_what_is_wrong(words: list[str]) -> None:
    assert direct.parse(words) is None

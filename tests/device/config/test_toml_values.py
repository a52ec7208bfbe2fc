"""Values as TOML: whatever is written is read back."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from outstation.foundation.config.toml_files import did_you_mean, encode_key, encode_value


@pytest.mark.parametrize(
    "value",
    [
        'Ünter "Null" \\ 1',
        "😀 behind the basic plane",
        "\x00\x1f\x7f\n",
        1e-7,
        float("inf"),
        True,
        2**62,
        [1, [2.5, "a.b"]],
        {"a key": {"b.c": False}, "": []},
    ],
)
def test_an_encoded_value_is_read_back_as_it_was(value: Any) -> None:
    assert tomllib.loads(f"x = {encode_value(value)}") == {"x": value}


def test_a_key_with_a_dot_names_no_section_below() -> None:
    assert tomllib.loads(f"[streams.{encode_key('pump.1')}]") == {"streams": {"pump.1": {}}}


def test_members_of_a_table_that_are_none_are_left_out() -> None:
    assert encode_value({"kind": "mqtt", "t": None}) == '{ kind = "mqtt" }'


def test_a_list_of_known_words_says_how_many_it_leaves_out() -> None:
    words = [f"table{i:02}" for i in range(14)]
    assert did_you_mean("results", words[:12]) == f"; there is {', '.join(words[:12])}"
    assert did_you_mean("results", words).endswith("table11 and 2 more")

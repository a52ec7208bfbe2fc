"""Singular JSONPath queries."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.intake.sources.jsonpath import MISSING, find, parse

DOCUMENT = {"a": {"b c": [1, {"d": 2.5}], "é": "x"}, "0": None, "it's": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$", DOCUMENT),
        ("a", DOCUMENT["a"]),
        ("$.a.é", "x"),
        ("$.a['b c'][1].d", 2.5),
        ('a["b c"][-1]["d"]', 2.5),
        ("$['0']", None),
        (r"$['it\'s']", True),
        ("$[0]", MISSING),
        ("a.b", MISSING),
        ("$.a['b c'][2]", MISSING),
        ("$.a['b c'][-3]", MISSING),
        ("$.a.é.deeper", MISSING),
    ],
)
def test_a_path_selects_one_value_or_none(text: str, value: object) -> None:
    assert find(DOCUMENT, parse(text)) == value


@pytest.mark.parametrize("text", ["", "$.", "$..a", "a.", "$.a[*]", "$[01]", "$[-0]", "$['a]", "a b", "$.a[1:2]", "$?"])
def test_what_is_no_path_to_one_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a path to a value"):
        parse(text)


@given(st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_every_value_has_a_path_that_leads_to_it(document: object) -> None:
    def walk(value: object, path: str) -> None:
        assert find(document, parse(path)) == value
        if isinstance(value, dict):
            for name, inner in value.items():
                quoted = name.replace("\\", "\\\\").replace("'", "\\'")
                walk(inner, f"{path}['{quoted}']")
        if isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, f"{path}[{index}]")

    walk(document, "$")


@given(st.text())
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        path = parse(text)
    except ValueError:
        return
    assert json.dumps(find(DOCUMENT, path), default=str)

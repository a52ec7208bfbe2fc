"""Strict JSON: duplicate keys at any depth and in any spelling, nesting, UTF-8."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outstation.foundation.strict_json import DuplicateKey, check_key_count, check_strict_json

NAMES = st.sampled_from(["a", "b", "a:b", ":", "", "é", 'q"', "\\", '":', "a\n"])
SCALARS = st.none() | st.integers(-9, 9) | st.sampled_from([0.5, "", ":", "a:b", '":', '\\":', '"a":', "é:", "{"])
# Objects as lists of pairs, so that a key may be there twice.
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(NAMES, inner), max_size=4).map(tuple),
    max_leaves=12,
)
ESCAPES = st.booleans()
COLONS = st.sampled_from([":", " : ", ": ", "\n:\t"])


def write(value: Any, ascii_only: bool, colon: str) -> str:
    if isinstance(value, tuple):
        pairs = (f"{json.dumps(k, ensure_ascii=ascii_only)}{colon}{write(v, ascii_only, colon)}" for k, v in value)
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(write(v, ascii_only, colon) for v in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


def repeats(value: Any) -> bool:
    """Return True if an object in `value` has a key twice; the reference implementation."""
    if isinstance(value, tuple):
        return len({key for key, _ in value}) < len(value) or any(repeats(inner) for _, inner in value)
    return isinstance(value, list) and any(map(repeats, value))


def key_count(value: Any) -> tuple[int, list[str]]:
    """Return the number of keys that a decoder returns of `value`, and all strings in it."""
    if isinstance(value, dict):
        inner = [key_count(v) for v in value.values()]
        return len(value) + sum(n for n, _ in inner), [*value, *(s for _, texts in inner for s in texts)]
    if isinstance(value, list):
        inner = [key_count(v) for v in value]
        return sum(n for n, _ in inner), [s for _, texts in inner for s in texts]
    return 0, [value] if isinstance(value, str) else []


def finds(text: bytes) -> bool:
    try:
        check_strict_json(text)
    except DuplicateKey:
        return True
    return False


@given(VALUES, ESCAPES, COLONS, st.sampled_from([0, 20_000]))
@example((("a", 1), ("a", 1)), False, ":", 0)
@example((("a", 1), ("b", ":")), False, " :", 20_000)
@example(((":", 1), (":", 1)), False, ":", 20_000)
@example((("a:b", 1), ("x:b", 1)), False, ":", 20_000)
def test_exactly_duplicate_keys_are_reported(value: Any, escapes: bool, colon: str, padding: int) -> None:
    text = (write(value, escapes, colon) + " " * padding).encode()
    assert finds(text) == repeats(value)


@given(VALUES, ESCAPES, COLONS, st.sampled_from([0, 20_000]))
@example((("a", ""), ("a", ":")), False, ":", 0)
@example((("a", ":"), ("a", "")), True, ":", 20_000)
def test_counting_colons_agrees_with_parsing(value: Any, escapes: bool, colon: str, padding: int) -> None:
    text = (write(value, escapes, colon) + " " * padding).encode()
    is_refused = False
    try:
        check_key_count(text, *key_count(msgspec.json.decode(text)))
    except DuplicateKey:
        is_refused = True
    assert is_refused == repeats(value)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}',
        b'{"a":1,"\\u0061":2}',
        b'{"a" :1,"a": 2}',
        b'{"x":{"y":[{"a":1},{"a":1,"a":1}]}}',
        b'{"a":' + b"[" * 60 + b"]" * 60 + b',"a":1}',
        b'{"a":' + b"9" * 9000 + b',"a":1e999}',
        b'{"' + b"a" * 70_000 + b'":1,"' + b"a" * 70_000 + b'":1}',
        b"{" + b",".join(b'"k%d":0' % i for i in range(9000)) + b',"k77":1}',
    ],
    ids=["plain", "escaped", "spaced", "deep inside", "around depth", "huge numbers", "long", "one of thousands"],
)
def test_no_spelling_hides_a_second_key(text: bytes) -> None:
    with pytest.raises(DuplicateKey, match="duplicate key"):
        check_strict_json(text)


@pytest.mark.parametrize("text", [b'{"a":"\xff"}', b'{"\xed\xa0\x80":1}', b'{"a":"\xc0\xaf"}'])
def test_invalid_utf8_in_skipped_members_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="utf-8"):
        check_strict_json(text)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\a1 ', max_size=40).map(str.encode))
def test_of_any_bytes_nothing_else_is_raised(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        check_strict_json(text)
        assert finds(text) is False


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ('[{"]":', "}]")])
def test_the_nesting_limit(opening: str, closing: str) -> None:
    levels = opening.count("[") + opening.count("{")

    def nested(depth: int) -> bytes:
        return ("[" + (opening * (depth // levels) + "1" + closing * (depth // levels)) + "]").encode()

    check_strict_json(nested(62))
    for depth in (64, 66, 1_000, 100_000):
        with pytest.raises(ValueError, match="nested deeper than 64 levels"):
            check_strict_json(nested(depth))


def test_many_brackets_side_by_side_or_in_strings_are_not_deep() -> None:
    check_strict_json(b"[" + b"[[]]," * 1_000 + b"[]]")
    check_strict_json(json.dumps(["[" * 200, '\\"' + "{" * 200]).encode())

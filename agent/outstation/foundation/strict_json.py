"""Strict JSON: reject texts that two readers may understand differently (RFC 8259 sections 4 and 9).

A signature covers bytes, not their meaning. Decoders silently take one value of a duplicate key, and they differ in how
deeply they nest: some stop at 64 levels, others at the interpreter's stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

# Up to this length encoding the text again is faster than a look at each colon; longer texts are mostly arrays with few
# colons.
_SHORT_BYTES = 16_384
_MAX_COLONS_SPLIT = 64
_LONG_BYTES, _MANY_COLONS = 4096, 256
_WHITESPACE = b" \t\r\n"
# The lowest limit of a widespread reader (System.Text.Json).
_MAX_DEPTH = 64
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NON_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")


class DuplicateKey(ValueError):
    """An object that contains `key` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key {key[:80]!r} in one object; two readers could see different values")
        self.key = key


def check_strict_json(text: bytes) -> None:
    """Check text that a decoder has accepted as JSON. Raises DuplicateKey, ValueError or RecursionError.

    ValueError: nested too deeply, or not UTF-8. The two fast checks cost a few percent of decoding and suffice for
    nearly all honest texts.
    """
    if not text.isascii():
        text.decode("utf-8")
    if _is_too_deep(text):
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    first, second = (
        (_round_trips, _has_distinct_keys) if len(text) <= _SHORT_BYTES else (_has_distinct_keys, _round_trips)
    )
    if not (first(text) or second(text)):
        json.loads(text.decode("utf-8"), object_pairs_hook=_reject_duplicate_keys, parse_int=str, parse_float=str)


def check_key_count(text: bytes, key_count: int, strings: Iterable[Any] = ()) -> None:
    """Check like `check_strict_json`, but by counting colons if a decoder returned `key_count` keys in all objects.

    `strings`: values that may be text; other values among them are ignored.
    """
    # Each written key has a colon. As many colons as returned keys leave none for a dropped key.
    colons = _count_colons(text)
    if colons == key_count:
        return
    # Without escapes a string has as many colons in JSON as in its value.
    if b"\\" in text or colons - sum(s.count(":") for s in strings if isinstance(s, str)) != key_count:
        check_strict_json(text)


def _count_colons(text: bytes) -> int:
    # bytes.count looks at one byte at a time, which takes as long as decoding a long line; `find` looks at many.
    if len(text) < _LONG_BYTES:
        return text.count(b":")
    count, at = 0, text.find(b":")
    while at >= 0 and count < _MANY_COLONS:
        count, at = count + 1, text.find(b":", at + 1)
    return count + text.count(b":", at) if at >= 0 else count


def _is_too_deep(text: bytes) -> bool:
    if text.count(b"[") + text.count(b"{") <= _MAX_DEPTH:
        return False
    brackets = _STRING.sub(b"", text).translate(_BRACES_TO_BRACKETS, _NON_BRACKETS)
    for _ in range(_MAX_DEPTH):
        if not brackets:
            return False
        # Each round removes the empty brackets: one level.
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _has_distinct_keys(text: bytes) -> bool:
    """Return True if all quoted texts before colons differ. Each is a key, or part of a string."""
    # An escape could hide a quote or spell one key in two ways.
    if b"\\" in text:
        return False
    before = text.split(b":", _MAX_COLONS_SPLIT)
    if len(before) > _MAX_COLONS_SPLIT:
        return False
    seen = set()
    for part in before[:-1]:
        part = part.rstrip(_WHITESPACE)
        if part.endswith(b'"'):
            key = part[part.rfind(b'"', 0, -1) + 1 :]
            if key in seen:
                return False
            seen.add(key)
    return True


def _round_trips(text: bytes) -> bool:
    """Return True if encoding the decoded values gives the same text: a dropped value would be missing."""
    try:
        return msgspec.json.encode(msgspec.json.decode(text)) == text
    except msgspec.MsgspecError:
        # A number too large for this decoder, which another may skip.
        return False


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise DuplicateKey(key)
        seen.add(key)

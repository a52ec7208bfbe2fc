"""JSON that two readers may see differently (RFC 8259 sections 4 and 9), while signatures and digests hold for either.

Of a key that is twice in one object decoders take one of the values without a word. How deep they follow differs: some
end at 64 levels, others at the interpreter's stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

# Up to this length it is faster to write the text again than to look at each colon, if that is enough; beyond it, long
# arrays have few colons.
_SHORT_BYTES = 16_384
_MAX_COLONS_SPLIT = 64
_LONG_BYTES, _MANY_COLONS = 4096, 256
_WHITESPACE = b" \t\r\n"
# The least that widespread readers stop at (System.Text.Json).
_MAX_DEPTH = 64
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NON_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")


class DuplicateKey(ValueError):
    """An object has `key` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key[:80]!r} is there twice in one object; two readers would see two values")
        self.key = key


def check_strict_json(text: bytes) -> None:
    """Raises RepeatedKey, and ValueError or RecursionError where `text` is nested too deep or no JSON in UTF-8.

    `text` is what a decoder took for JSON. The first two looks, at a few percent of a decoder's price, are enough for
    nearly all that is honest.
    """
    if not text.isascii():
        text.decode("utf-8")
    if _is_too_deep(text):
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    first, second = (
        (_round_trips, _has_distinct_keys) if len(text) <= _SHORT_BYTES else (_has_distinct_keys, _round_trips)
    )
    if not (first(text) or second(text)):
        _parse_strictly(text)


def check_key_count(text: bytes, key_count: int, strings: Iterable[Any] = ()) -> None:
    """The same for the price of counting colons, where a decoder found `kept` keys in `text`, in objects of any depth.

    `strings`: the values that may be text; what else is among them does not matter.
    """
    # Each key that was written has its colon: as many colons as keys that were kept leave none for one that was not.
    colons = _count_colons(text)
    if colons == key_count:
        return
    # Without escapes a string has as many colons as its text.
    if b"\\" in text or colons - sum(s.count(":") for s in strings if isinstance(s, str)) != key_count:
        check_strict_json(text)


def _count_colons(text: bytes) -> int:
    # bytes.count looks at one byte at a time, for as long as the decoder where a line is long; `find` at many.
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
        # What holds nothing goes, so that each round takes one level.
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _has_distinct_keys(text: bytes) -> bool:
    """Whether no key is there twice anywhere: what stands between quotes before a colon is a key, or in a string."""
    # An escape could hide a quote, or spell one key in two ways.
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
    """Whether the text is what its values are written as: a value that was dropped is not written."""
    try:
        return msgspec.json.encode(msgspec.json.decode(text)) == text
    except msgspec.MsgspecError:
        # A number too large for this decoder, which another may skip.
        return False


def _parse_strictly(text: bytes) -> None:
    json.loads(text.decode("utf-8"), object_pairs_hook=_reject_duplicate_keys, parse_int=str, parse_float=str)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise DuplicateKey(key)
        seen.add(key)

"""Mutation of valid bytes, driven by a seeded random number generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

# Values that have broken decoders before.
_WORDS = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"0123", b"9" * 400, b"1" + b"0" * 5000, b"9223372036854775808", b"0.1e-9",
    b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"', b'":', b":", b"\\", b'"', b",", b"\n", b"\r\n",
    b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"[" * 3000, b'{"":' * 1500, b"..", b"/", b"=",
    b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"PK\x05\x06", b"\xdf\xff\xff\xff\xff", b"2026-99-99T99:99:99Z",
)  # fmt: skip
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|null|true|false')
_MEMBER = re.compile(rb'"[^"\\]*"\s*:')


def mutated(seeds: Sequence[bytes], random: Random, longest: int) -> bytes:
    """Return one of `seeds` after one to eight changes, at most `longest` bytes."""
    data = random.choice(seeds)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 8))):
        data = random.choice(_CHANGES)(data, seeds, random)
    return data[:longest]


Change = Callable[[bytes, Sequence[bytes], Random], bytes]


def _flip(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    first, last = _span(data, random)
    return data[:first] + data[last:]


def _repeat(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    first, last = _span(data, random)
    return data[:last] + data[first:last] * random.choice((1, 1, 2, 50)) + data[last:]


def _insert(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.choice((random.choice(_WORDS), random.randbytes(random.randint(1, 8)))) + data[at:]


def _overwrite(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    at, word = random.randint(0, len(data)), random.choice(_WORDS)
    return data[:at] + word + data[at + len(word) :]


def _splice(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(seeds)
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


def _replace_value(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    matches = list(_VALUE.finditer(data))
    if not matches:
        return _insert(data, seeds, random)
    place = random.choice(matches)
    other = random.choice(
        (random.choice(matches)[0], random.choice(_WORDS), str(random.getrandbits(70) - 2**69).encode())
    )
    return data[: place.start()] + other + data[place.end() :]


def _repeat_member(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    matches = list(_MEMBER.finditer(data))
    if not matches:
        return _repeat(data, seeds, random)
    place = random.choice(matches)
    member = random.choice(matches)[0] + random.choice((b"null", b"1", b'":"', b"[]"))
    return data[: place.start()] + member + b"," + data[place.start() :]


def _span(data: bytes, random: Random) -> tuple[int, int]:
    first = random.randint(0, len(data))
    return first, min(len(data), first + random.choice((1, 2, 4, 16, 64, 1024)))


_CHANGES: tuple[Change, ...] = (
    *(_flip, _cut, _repeat, _insert, _overwrite, _splice),
    *(_replace_value, _replace_value, _repeat_member),
)

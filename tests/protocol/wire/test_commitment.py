"""Commitment: rows cannot be computed back from it, and one disclosed message opens no other."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.protocol.wire import commitment
from outstation.protocol.wire.commitment import Disclosure

pytestmark = pytest.mark.attack("privacy")

SECRET = bytes(range(32))
LOG = "7e57ab1e-0000-4000-8000-000000000000"
FIELDS = [("x", "f32"), ("n", "i64"), ("who", "category")]
TIMES = [1_000, 2_000]
T = [np.array(TIMES, "<i8").tobytes()]
COLUMNS = [
    [np.array([1.5], "<f4").tobytes(), np.array([np.nan], "<f4").tobytes()],
    [np.array([7, -8], "<i8").tobytes()],
    [np.array([2, 1], "<u2").tobytes()],
]
TEXTS = {"who": [(1, "patient 17"), (2, "patient 4")]}


def key_of(task: str = "tiny", rows: tuple[int, int] = (1, 2), log: str = LOG) -> bytes:
    return commitment.derive_key(SECRET, log, task, rows)


def disclosure() -> Disclosure:
    codes = {"who": {"patient 17": 1, "patient 4": 2}}
    columns: list[list[float | int | str | None]] = [[1.5, None], [7, -8], ["patient 4", "patient 17"]]
    return Disclosure(
        device="pi-07",
        log=LOG,
        task="tiny",
        rows=(1, 2),
        key=commitment.encode_key(key_of()),
        fields=FIELDS,
        t=TIMES,
        columns=columns,
        categories=codes,
    )


def test_a_reading_of_few_possible_values_cannot_be_computed_back_from_its_message() -> None:
    """The unkeyed digest of one row gave way to a search over a sensor's values."""
    values = np.arange(-400, 1250, dtype=np.float32) / 10
    t, fields = np.array([1_764_022_680_000_000], "<i8"), [("temperature", "f32")]
    signed = commitment.commit(key_of(rows=(1, 1)), fields, [t], [[values[631:632]]], {})
    guesses = {commitment.commit(b"", fields, [t], [[values[i : i + 1]]], {}) for i in range(len(values))}
    guesses |= {f"sha256:{hashlib.sha256(t.tobytes() + values[i].tobytes()).hexdigest()}" for i in range(len(values))}
    assert signed not in guesses
    # With the key of the message the same search succeeds.
    key = key_of(rows=(1, 1))
    assert signed in {commitment.commit(key, fields, [t], [[values[i : i + 1]]], {}) for i in range(len(values))}


def test_a_disclosed_key_opens_no_other_message() -> None:
    keys = [
        key_of(),
        key_of(task="other"),
        key_of(rows=(1, 3)),
        key_of(rows=(2, 2)),
        key_of(log=LOG.replace("7", "8")),
        commitment.derive_key(bytes(32), LOG, "tiny", (1, 2)),
    ]
    assert len(set(keys)) == len(keys)


def test_disclosed_rows_give_the_commitment_of_the_message() -> None:
    assert disclosure().commit() == commitment.commit(key_of(), FIELDS, T, COLUMNS, TEXTS)


@pytest.mark.parametrize(
    "change",
    [
        {"t": [1_000, 2_001]},
        {"columns": [[1.5, 0.0], [7, -8], ["patient 4", "patient 17"]]},
        {"columns": [[1.5, None], [7, -9], ["patient 4", "patient 17"]]},
        {"columns": [[1.5, None], [7, -8], ["patient 17", "patient 4"]]},
        {"categories": {"who": {"patient 17": 2, "patient 4": 1}}},
        {
            "columns": [[1.5, None], [7, -8], ["nobody", "patient 17"]],
            "categories": {"who": {"patient 17": 1, "nobody": 2}},
        },
        {"fields": [("y", "f32"), ("n", "i64"), ("who", "category")]},
    ],
)
def test_a_device_cannot_disclose_other_rows_than_it_signed(change: dict[str, object]) -> None:
    signed = commitment.commit(key_of(), FIELDS, T, COLUMNS, TEXTS)
    assert replace(disclosure(), **change).commit() != signed


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "t": st.lists(st.integers(-(2**70), 2**70), max_size=3),
            "columns": st.lists(
                st.lists(st.none() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3), max_size=3),
                max_size=4,
            ),
            "key": st.text(max_size=4),
            "rows": st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
            "fields": st.lists(st.tuples(st.just("x"), st.sampled_from(["f32", "i64", "category", "no"])), max_size=3),
        },
    )
)
def test_hostile_disclosures_are_refused_or_do_not_match(change: dict[str, object]) -> None:
    signed = commitment.commit(key_of(), FIELDS, T, COLUMNS, TEXTS)
    other = replace(disclosure(), **change)
    with contextlib.suppress(ValueError):
        assert other == disclosure() or other.commit() != signed

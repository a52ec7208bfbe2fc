"""Label store: packed predictions, found by row and time, trimmed by uptime, within the quota."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.recovery.open import open_store
from outstation.device.store import label_store
from outstation.device.store.label_store import label_capacity
from outstation.device.store.predictions import (
    PredictionRow,
    PredictionSpan,
    StoredPredictions,
    output_key,
    pack_predictions,
    unpack_predictions,
)
from outstation.device.store.store import Store
from outstation.ml.performance.labels import Label

T0 = 1_764_000_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as opened:
        yield opened


def given_rows(
    first: int, n: int = 10, step: int = 5, bundle: str = "sha256:a", **slices: list[str]
) -> StoredPredictions:
    row = np.arange(first, first + n * step, step, dtype=np.int64)
    return StoredPredictions(bundle, row, T0 + row * 20_000, row % 3, row / 1000, None, slices)


def keep(store: Store, *batches: StoredPredictions, at_s: float = 100.0) -> None:
    with store.transaction() as tx:
        for batch in batches:
            tx.labels.store_predictions("judge", batch, at_s)


@given(st.integers(1, 60), st.integers(1, 2**31), st.lists(st.integers(-(10**9), 10**12), min_size=60, max_size=60))
def test_what_is_packed_comes_back(n: int, first: int, times: list[int]) -> None:
    row = np.arange(first, first + n, dtype=np.int64)
    before = StoredPredictions(
        *("sha256:a", row, np.array(times[:n], np.int64), row % 7, np.full(n, 0.25), np.linspace(0, 1, n)),
        {"mode": [str(i % 3) for i in range(n)]},
        expected_bin=(row % 32).astype(np.uint8),
    )
    data = pack_predictions(before)
    after = unpack_predictions(first, data)
    for name in ("row", "t", "predicted_class", "score", "value", "expected_bin"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert after.slices == before.slices


def test_predictions_that_an_earlier_version_stored_have_no_bin_of_the_error_to_expect(store: Store) -> None:
    row = np.arange(1, 5, dtype=np.int64)
    packed = pack_predictions(StoredPredictions("sha256:a", row, T0 + row, None, None, row / 2, {}))
    members = msgspec.msgpack.decode(zlib.decompress(packed[4:]))
    old = zlib.compress(msgspec.msgpack.encode(members[:-1]))
    assert members[-1] == b""
    keep(store, StoredPredictions("sha256:a", row, T0 + row, None, None, row / 2, {}))
    with store.transaction() as tx:
        sealed = zlib.crc32(old, 1).to_bytes(4, "little") + old
        tx.connection.execute("UPDATE predictions SET data = ?", (sealed,))
        known = tx.labels.find_by_row("judge", 3)
    assert known is not None
    assert (known.value, known.expected_bin) == (1.5, None)


def test_a_label_copies_the_bin_of_its_prediction_and_an_earlier_label_has_none(store: Store) -> None:
    row = np.arange(1, 5, dtype=np.int64)
    bins = np.array([3, 31, 0, 7], np.uint8)
    keep(store, StoredPredictions("sha256:a", row, T0 + row, None, None, row / 2, {}, expected_bin=bins))
    with store.transaction() as tx:
        for at in (2, 3):
            known = tx.labels.find_by_row("judge", at)
            assert known is not None
            tx.labels.store_label("judge", Label(at, None, "1.0"), known, T0)
        [(number, data)] = tx.connection.execute("SELECT number, data FROM labels WHERE row = 3").fetchall()
        record = msgspec.msgpack.decode(data)
        del record[3]["expected_bin"]
        tx.connection.execute("UPDATE labels SET data = ? WHERE number = ?", (msgspec.msgpack.encode(record), number))
    stored = store.query(label_store.load_labelled, "judge", "sha256:a", 9, 9)
    assert [label.prediction.expected_bin for label in stored] == [31, None]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_results_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        unpack_predictions(1, zlib.crc32(data, 1).to_bytes(4, "little") + data)


def test_a_prediction_is_looked_up_by_its_exact_row(store: Store) -> None:
    keep(store, given_rows(5, site=["a"] * 10), given_rows(55))
    with store.transaction() as tx:
        value_read = tx.labels.find_by_row("judge", 15)
        assert value_read is not None
        assert (value_read.row, value_read.predicted_class, value_read.slices) == (15, 0, {"site": "a"})
        assert value_read.score == pytest.approx(0.015)
        assert tx.labels.find_by_row("judge", 16) is None
        assert tx.labels.find_by_row("judge", 4) is None
        assert tx.labels.find_by_row("judge", 101) is None
        assert tx.labels.find_by_row("other", 15) is None


@pytest.mark.parametrize(
    ("off_us", "row"), [(0, 15), (300, 15), (49_000, 15), (51_000, 20), (-49_000, 15), (-51_000, 10)]
)
def test_a_time_belongs_to_the_nearest_result(store: Store, off_us: int, row: int) -> None:
    keep(store, given_rows(5), given_rows(55))
    with store.transaction() as tx:
        value_read = tx.labels.find_nearest("judge", T0 + 15 * 20_000 + off_us)
    assert value_read is not None
    assert value_read.row == row


def test_a_time_far_from_every_result_belongs_to_none(store: Store) -> None:
    keep(store, given_rows(5), given_rows(555))
    with store.transaction() as tx:
        assert tx.labels.find_nearest("judge", T0) is None
        # Between the two batches.
        assert tx.labels.find_nearest("judge", T0 + 300 * 20_000) is None
        assert tx.labels.find_nearest("judge", T0 + 10**12) is None


def test_single_predictions_are_looked_up_by_time(store: Store) -> None:
    keep(store, *(given_rows(row, n=1) for row in range(5, 100, 5)))
    with store.transaction() as tx:
        value_read = tx.labels.find_nearest("judge", T0 + 50 * 20_000 + 40_000)
    assert value_read is not None
    assert value_read.row == 50


def test_a_damaged_batch_of_results_is_as_if_it_were_not_there(store: Store) -> None:
    keep(store, given_rows(5), given_rows(55))
    store._db.execute(
        "UPDATE predictions SET data = CAST(substr(data, 1, 10) || x'00' || substr(data, 12) AS BLOB) "
        "WHERE first_row = 5"
    )
    with store.transaction() as tx:
        assert tx.labels.find_by_row("judge", 15) is None
        assert tx.labels.find_by_row("judge", 60) is not None
        assert tx.labels.find_nearest("judge", T0 + 15 * 20_000) is None


def test_results_go_by_the_time_the_device_was_on(store: Store) -> None:
    keep(store, given_rows(5), at_s=100)
    keep(store, given_rows(55), at_s=200)
    with store.transaction() as tx:
        assert tx.labels.trim_predictions("judge", 150, 100) == 1
        assert tx.labels.trim_predictions("judge", 150, 100) == 0
        assert tx.labels.load_span("judge") == PredictionSpan(55, 100, T0 + 100 * 20_000)


def test_a_label_of_a_row_that_has_one_takes_its_place_and_counts_anew(store: Store) -> None:
    keep(store, given_rows(5))
    with store.transaction() as tx:
        result = tx.labels.find_by_row("judge", 15)
        assert result is not None
        put = [tx.labels.store_label("judge", Label(15, None, text), result, 1) for text in ("a", "a", "b")]
    assert put == ["new", "same", "replaced"]
    value_read = store.query(label_store.load_labelled, "judge", "sha256:a", 10, 10)
    assert [(item.number, item.first_number, item.label) for item in value_read] == [(2, 1, "b")]


def test_replaced_labels_do_not_push_out_more_labels_than_necessary(store: Store) -> None:
    keep(store, given_rows(5, n=100))
    with store.transaction() as tx:
        for text in ("a", "b"):
            for row in range(5, 505, 5):
                result = tx.labels.find_by_row("judge", row)
                assert result is not None
                tx.labels.store_label("judge", Label(row, None, text), result, 1)
        tx.labels.trim_labels(["judge"], 120, 1000)
        tx.labels.trim_labels(["judge"], 100, 1000)
    value_read = store.query(label_store.load_labelled, "judge", "sha256:a", 1000, 1000)
    assert [(item.number, item.first_number) for item in value_read] == [(100 + i, i) for i in range(1, 101)]


def test_a_label_outlives_the_result_it_is_of(store: Store) -> None:
    keep(store, given_rows(5, site=["x"] * 10))
    with store.transaction() as tx:
        result = tx.labels.find_by_row("judge", 15)
        assert result is not None
        tx.labels.store_label("judge", Label(15, None, "a"), result, 7)
        tx.labels.trim_predictions("judge", 10**9, 100)
    [value_read] = store.query(label_store.load_labelled, "judge", "sha256:a", 10, 10)
    assert (value_read.prediction, value_read.received, value_read.source) == (result, 7, "human")


def test_trimming_leaves_the_newest_labels(store: Store) -> None:
    keep(store, given_rows(5, n=100))
    with store.transaction() as tx:
        for row in range(5, 505, 5):
            result = tx.labels.find_by_row("judge", row)
            assert result is not None
            tx.labels.store_label("judge", Label(row, None, "a"), result, 1)
        tx.labels.trim_labels(["judge"], 30, 1000)
    value_read = store.query(label_store.load_labelled, "judge", "sha256:a", 1000, 1000)
    assert [item.number for item in value_read] == list(range(71, 101))


def test_a_flood_of_labels_without_an_author_pushes_out_none_with_one(store: Store) -> None:
    keep(store, given_rows(5, n=100))
    with store.transaction() as tx:
        for row in range(5, 505, 5):
            result = tx.labels.find_by_row("judge", row)
            assert result is not None
            tx.labels.store_label("judge", Label(row, None, "a", by="eva" if row <= 100 else ""), result, 1)
        tx.labels.trim_labels(["judge"], 30, 1000)
    value_read = store.query(label_store.load_labelled, "judge", "sha256:a", 1000, 1000)
    assert [item.number for item in value_read] == [*range(1, 21), *range(91, 101)]


OUTPUTS = ("judge", output_key("judge", "wear"), output_key("judge", "flags"))


def put_labels(store: Store, count: int, task: str, by: str = "") -> None:
    with store.transaction() as tx:
        first = tx.labels.newest_number(task) + 1
        for row in range(first, first + count):
            result = PredictionRow("sha256:a", row, T0 + row, 0, 0.5, None, {})
            assert tx.labels.store_label(task, Label(row, None, "a", by=by), result, 1) == "new"


def trim_all(store: Store, capacity: int) -> list[int]:
    """Trim labels until nothing changes; return the count of each output."""
    counts: list[int] = []
    for _ in range(100):
        with store.transaction() as tx:
            tx.labels.trim_labels(OUTPUTS, capacity, 70)
        before, counts = counts, [store.query(label_store.count_labels, task).truth for task in OUTPUTS]
        if counts == before:
            return counts
    raise AssertionError("trimming goes on")


@pytest.mark.parametrize(
    ("counts", "capacity", "left"),
    [
        ((200, 0, 0), 200, [200, 0, 0]),
        ((200, 10, 0), 200, [190, 10, 0]),
        ((200, 120, 30), 200, [85, 85, 30]),
        ((200, 120, 30), 90, [40, 40, 30]),
        ((30, 20, 10), 90, [30, 20, 10]),
    ],
)
def test_outputs_share_one_capacity_and_those_with_most_labels_lose_the_oldest(
    store: Store, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], capacity: int, left: list[int]
) -> None:
    monkeypatch.setattr(label_store, "_MIN_OUTPUT_LABELS", 40)
    for task, count in zip(OUTPUTS, counts, strict=True):
        put_labels(store, count, task)
    assert trim_all(store, capacity) == left
    newest = [item.number for item in store.query(label_store.load_labelled, "judge", "sha256:a", 1000, 1000)]
    assert newest == [*range(counts[0] - left[0] + 1, counts[0] + 1)]


def test_a_flood_of_labels_of_other_outputs_pushes_out_no_label_with_an_author(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_store, "_MIN_OUTPUT_LABELS", 20)
    put_labels(store, 90, "judge", by="eva")
    for task in OUTPUTS:
        put_labels(store, 150, task)
    assert trim_all(store, 100) == [93, 20, 20]
    assert store.query(label_store.count_labels, "judge").authenticated == 90
    # Authors share the capacity among themselves.
    put_labels(store, 80, OUTPUTS[1], by="eva")
    assert trim_all(store, 100) == [50, 50, 20]


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_a_shared_capacity_is_used_up_and_never_exceeded(counts: list[int], capacity: int) -> None:
    share = label_store.share_capacity(counts, capacity)
    total = sum(min(count, share) for count in counts)
    assert total <= capacity
    assert total == sum(counts) or sum(min(count, share + 1) for count in counts) > capacity


@pytest.mark.parametrize("pages", [2**19, 2**24, 2**30, 2**40])
def test_labels_take_a_small_share_of_any_store(pages: int) -> None:
    stored = label_capacity(pages)
    assert 100 <= stored <= 5000
    assert stored * 300 <= max(pages // 20, 100 * 300)


def test_too_many_early_labels_are_turned_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_store, "MAX_EARLY_LABELS", 4)
    monkeypatch.setattr(label_store, "MAX_OPEN_EARLY_LABELS", 3)
    with store.transaction() as tx:
        put = [tx.labels.store_early_label("judge", Label(row, None, "a"), 1, 1.0) for row in range(1, 6)]
        by_eva = [tx.labels.store_early_label("judge", Label(6, None, "a", by="eva"), 1, 1.0) for _ in range(2)]
    assert put == [True, True, True, False, False]
    assert by_eva == [True, False], "a flood without an author keeps no author out"
    with store.transaction() as tx:
        assert not tx.labels.store_early_label(OUTPUTS[1], Label(7, None, "a"), 1, 1.0), "of all outputs"
        # No other task counts, also not one whose name begins alike.
        assert tx.labels.store_early_label("judge-2", Label(7, None, "a"), 1, 1.0)
        tx.labels.delete_early_labels("judge", [-1, -2])
        assert tx.labels.store_early_label(OUTPUTS[1], Label(7, None, "a"), 1, 1.0)
        assert not tx.labels.store_early_label(OUTPUTS[2], Label(7, None, "a"), 1, 1.0)


@pytest.mark.parametrize(
    ("query", "values"),
    [
        ("SELECT n FROM predictions WHERE task = ? AND first_row <= ? ORDER BY first_row DESC LIMIT 1", ("judge", 5)),
        ("SELECT data FROM labels WHERE task = ? AND row = ?", ("judge", 5)),
        ("SELECT number FROM labels WHERE task = ? AND number > ? ORDER BY number LIMIT ?", ("judge", 5, 5)),
    ],
)
def test_look_ups_go_by_an_index(store: Store, query: str, values: tuple[Any, ...]) -> None:
    plan = " ".join(row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {query}", values))
    assert "SEARCH" in plan
    assert "TEMP B-TREE" not in plan


def test_all_tables_are_described_in_the_first_page(store: Store) -> None:
    # The watermark keeps a copy of it: without that, a damaged first page would cost every row.
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    leaf = 0x0D
    assert store.path.read_bytes()[100] == leaf


def test_results_of_a_batch_take_few_bytes() -> None:
    row = np.arange(1, 513, dtype=np.int64) * 100
    given = StoredPredictions(
        "sha256:a", row, T0 + row * 20_000, row % 7, np.random.default_rng(0).random(512), None, {}
    )
    assert len(pack_predictions(given)) < 512 * 6

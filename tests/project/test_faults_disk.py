from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.faults.disk import Card, flip_bit, no_card

MISSING = no_card()


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    if MISSING:
        pytest.skip(MISSING)
    made = Card(tmp_path / "image", tmp_path / "mount")
    made.make(8)
    yield made
    made.unmount()


@pytest.mark.parametrize("journal", [False, True])
def test_a_power_cut_keeps_what_was_synced_and_drops_the_rest(card: Card, journal: bool) -> None:
    with (card.mount_point / "file").open("wb") as file:
        file.write(b"synced")
        file.flush()
        os.fsync(file.fileno())
        file.write(b", not synced")
        file.flush()
    assert (card.mount_point / "file").read_bytes() == b"synced, not synced"
    card.cut(journal=journal)
    # The journal may record the longer file; its bytes are lost anyway.
    assert (card.mount_point / "file").read_bytes().rstrip(b"\0") == b"synced"


def test_a_full_card_takes_nothing_more_until_it_is_freed(card: Card) -> None:
    card.fill()
    with pytest.raises(OSError, match="No space left"):
        (card.mount_point / "file").write_bytes(bytes(1 << 16))
    card.free()
    (card.mount_point / "file").write_bytes(bytes(1 << 16))


def test_a_failed_card_is_read_only_until_it_is_mounted_again(card: Card) -> None:
    card.fail()
    with pytest.raises(OSError, match="Read-only file system"):
        (card.mount_point / "file").write_bytes(b"x")
    card.unmount()
    card.mount()
    (card.mount_point / "file").write_bytes(b"x")


def test_a_flipped_bit_is_one_bit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4))
    flip_bit(tmp_path / "file", 17)
    assert (tmp_path / "file").read_bytes() == b"\0\0\2\0"

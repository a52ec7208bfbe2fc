"""Training data: columns by name, pauses between recordings, and each error with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from outstation.foundation.errors import UsageError
from outstation.ml.datasets import training_data
from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from scripts.kit.bundles import npz

PLAIN = ModelInput(fields=["a", "b"])


def csv(folder: Path, text: str) -> training_data.TrainingData:
    (folder / "data.csv").write_text(text, encoding="utf-8")
    return training_data.read(folder / "data.csv", PLAIN)


def test_csv_columns_are_read_by_name_and_empty_cells_are_missing(tmp_path: Path) -> None:
    data = csv(tmp_path, '\ufeffb , note,a\r\n1.5,"x, y",2\r\n\r\n,z,"3"\r\n')
    np.testing.assert_array_equal(data.features, np.array([[2, 1.5], [3, np.nan]], np.float32))
    assert data.t.tolist() == [1, 2]


def test_csv_times_are_epoch_seconds(tmp_path: Path) -> None:
    assert csv(tmp_path, "t,a,b\n1764022680.123456,1,2\n").t.tolist() == [1764022680123456]


def test_csv_of_one_column_or_one_row_keeps_its_shape(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("a\n1\n2\n3\n")
    assert training_data.read(tmp_path / "one.csv", ModelInput(fields=["a"])).features.shape == (3, 1)
    assert csv(tmp_path, "a,b\n1,2\n").features.shape == (1, 2)
    assert csv(tmp_path, "a,b\n").features.shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the file is empty"),
        ("a,c\n1,2\n", "no column b; there is a, c"),
        ("a,b\n1,2\n1,two\n", "line 3: b: 'two' is no number"),
        ("a,b\n1,2,3\n", "line 2: 3 values, the header names 2"),
        ("a,b\n1\n", "line 2: 1 values, the header names 2"),
        ("t,a,b\n1,1,1\n,1,1\n", "row 2 has no time in column t"),
        ("t,a,b\n1,1,1\n1e13,1,1\n", "row 2 has no time in column t, in seconds since 1970"),
        ("t,a,b\n2026-11-24 noon,1,1\n", "line 2: t: '2026-11-24 noon' is no time"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError) as problem:
        csv(tmp_path, text)
    assert str(problem.value).startswith(f"{tmp_path / 'data.csv'}: {why}")


def damaged_zip(at: int, value: int) -> bytes:
    """Return recordings with `value` at byte `at` of the archive's first directory entry: 6 version, 10 compression."""
    content = bytearray(npz(rows=np.zeros((3, 2)), fields=["a", "b"]))
    content[content.index(b"PK\x01\x02") + at] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "No data left in file"),
        (b"no archive", "not readable as recordings"),
        (npz(rows=np.zeros((3, 2)), fields=["a", "c"]), "no column b; there is a, c"),
        (npz(fields=["a", "b"]), "rows"),
        (npz(rows=np.zeros((3, 2)), fields=["a", "b"], starts=[0, 4]), "starts must ascend from 0 to the number"),
        (npz(rows=np.zeros((3, 2)), fields=["a", "b"], starts=[0, 2, 1, 3]), "starts must ascend from 0"),
        (npz(rows=np.zeros(3), fields=["a", "b"]), "not readable as recordings"),
        (npz(rows=np.array([{}]), fields=["a", "b"]), "allow_pickle=False"),
        (npz(rows=np.zeros((3, 2)), fields=["a", "b"], starts=[]), "not readable as recordings"),
        (npz(rows=np.zeros((3, 2)), fields=["a", "b"], rate=0.0), "rate is 0; give rows per second"),
        (
            npz(rows=np.zeros((3, 2)), fields=["a", "b"], starts=[0, 1, 3], label=[1]),
            "label has shape (1,), there are 2",
        ),
        (damaged_zip(10, 99), "compression"),
        (damaged_zip(6, 99), "not readable as recordings"),
    ],
)
def test_recordings_that_are_no_data_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"data\.npz: ") as problem:
        training_data.read(tmp_path / "data.npz", PLAIN)
    assert why in str(problem.value)


def test_recordings_cut_anywhere_are_refused(tmp_path: Path) -> None:
    whole = npz(rows=np.zeros((30, 2)), fields=["a", "b"])
    for length in range(0, len(whole) - 1, 31):
        (tmp_path / "data.npz").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"data\.npz: "):
            training_data.read(tmp_path / "data.npz", PLAIN)


def test_between_recordings_there_is_a_gap_and_each_row_has_its_label(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(
        npz(rows=np.zeros((5, 2)), fields=["a", "b"], starts=[0, 2, 5], rate=10.0, label=[7, 8])
    )
    spec = ModelInput(fields=["a", "b"], window=WindowSpec(rows=2, step=2, max_gap_s=5))
    data = training_data.read(tmp_path / "data.npz", spec)
    assert np.diff(data.t).tolist() == [100_000, 60_100_000, 100_000, 100_000]
    assert data.label is not None
    assert data.label.tolist() == [7, 7, 8, 8, 8]

"""Reference: built, stored, read back, refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outstation.foundation.errors import BadBundle
from outstation.ml.drift import Reference
from outstation.ml.drift.baseline.learning import build_reference
from tests.kit.machine import FIELDS, LABELS, ROWS, WINDOW, readings, reference


@pytest.fixture(scope="module")
def shipped() -> Reference:
    return reference()


def test_the_same_data_give_the_same_bytes_and_digest(shipped: Reference) -> None:
    again = reference()
    assert again.to_json() == shipped.to_json()
    assert again.digest == shipped.digest
    assert reference(seed=2).digest != shipped.digest


def test_a_reference_survives_its_file(shipped: Reference) -> None:
    assert Reference.from_json(shipped.to_json()).to_json() == shipped.to_json()


def test_each_inner_bin_holds_the_same_share_of_the_reference(shipped: Reference) -> None:
    assert shipped.counts[:, 1:-1].sum(1).tolist() == [12_000] * 3
    np.testing.assert_allclose(shipped.counts[:, 1:-1], 375, atol=2)
    assert shipped.counts[:, [0, -1]].sum() == 0


def test_moments_are_those_of_the_rows(shipped: Reference) -> None:
    rows = readings(1, 60).features.astype(np.float64)
    np.testing.assert_allclose(shipped.mean, rows.mean(0))
    np.testing.assert_allclose(shipped.sd, rows.std(0))


def test_class_means_are_those_of_the_windows_the_model_named_so(shipped: Reference) -> None:
    r = readings(1, 60)
    windows = r.features.astype(np.float64).reshape(-1, ROWS, 3)
    for label in range(3):
        named = windows[r.labels == label]
        np.testing.assert_allclose(shipped.class_mean[label, :3], named.mean(1).mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shipped.class_mean[label, 3:], np.log(named.var(1)).mean(0), rtol=1e-5, atol=1e-6)


def test_a_class_with_few_windows_falls_back_to_all_classes() -> None:
    r = readings(1, 60)
    labels = np.where(r.labels == 2, 1, r.labels)
    labels[:7] = 2
    starts = np.arange(600) * ROWS
    got = build_reference(r.features, starts, ROWS, labels, None, WINDOW, fields=FIELDS, labels=LABELS)
    np.testing.assert_allclose(got.class_mean[2, :3], r.features.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    assert (got.class_sd[2] > got.class_sd[0]).all()


def test_a_reference_from_too_few_drift_windows_is_refused() -> None:
    with pytest.raises(BadBundle, match="19 drift windows"):
        reference(drift_windows=19)


def test_a_reference_from_few_drift_windows_carries_a_warning(shipped: Reference) -> None:
    few = reference(drift_windows=20).warning
    assert few is not None
    assert "20 drift windows" in few
    assert shipped.warning is None


def test_a_reference_with_different_halves_is_refused() -> None:
    r = readings(1, 60)
    r.features[6_000:, 1] += 5
    with pytest.raises(BadBundle, match=r"changed between the first and the second half \(y mean\)"):
        build_reference(r.features, np.arange(600) * ROWS, ROWS, r.labels, None, WINDOW, fields=FIELDS, labels=LABELS)


def test_a_field_without_values_is_refused_by_name() -> None:
    r = readings(1, 60)
    r.features[:, 2] = np.nan
    with pytest.raises(BadBundle, match="no values of z"):
        build_reference(r.features, np.arange(600) * ROWS, ROWS, r.labels, None, WINDOW, fields=FIELDS, labels=LABELS)


def test_a_constant_field_has_a_reference() -> None:
    r = readings(1, 60)
    r.features[:, 2] = 3.5
    got = build_reference(r.features, np.arange(600) * ROWS, ROWS, r.labels, None, WINDOW, fields=FIELDS, labels=LABELS)
    assert got.rest[2] == (3.5,)
    assert Reference.from_json(got.to_json()).digest == got.digest


def test_missing_values_are_left_out_of_moments_and_bins() -> None:
    r = readings(1, 60)
    r.features[::50, 0] = np.nan
    got = build_reference(r.features, np.arange(600) * ROWS, ROWS, r.labels, None, WINDOW, fields=FIELDS, labels=LABELS)
    assert got.missing.tolist() == [240, 0, 0]
    assert got.n.tolist() == [11_760, 12_000, 12_000]
    np.testing.assert_allclose(got.mean[0], np.nanmean(r.features[:, 0].astype(np.float64)))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"version":1}'])
def test_what_is_no_reference_is_refused(data: bytes) -> None:
    with pytest.raises(BadBundle, match="malformed"):
        Reference.from_json(data)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("version", 2),
        ("made", "up"),
        ("fields", ["x", "x", "z"]),
        ("window", 0),
        ("edges", [[1.0]]),
        ("edges", [list(range(31, 0, -1))] * 3),
        ("edges", "many"),
        ("counts", [[-1] * 34] * 3),
        ("counts", [[0.5] * 34] * 3),
        ("low", [None, 1, 2]),
        ("test_sd", [0.0] * 6),
        ("class_sd", [[1.0] * 6] * 2),
        ("score_correct", [10**6] * 32),
        ("score_correct", [-1] * 32),
        ("score_n", [2**62] * 32),
        ("rest", [[]]),
        ("mean", [[1.0], [1.0, 2.0], [3.0]]),
        ("mean", [1e999, 1, 3]),
        ("n", [2**70, 1, 1]),
        ("n", [2**62, 1, 1]),
        ("counts", [[2**62] * 34] * 3),
        ("missing", [2**62] * 3),
        ("longest", [2**62] * 3),
        ("class_n", [[2**62] * 6] * 3),
        ("class_n", [[-1] * 6] * 3),
        ("output", [2**62, 1, 1]),
        ("output", [-1, 1, 1]),
        ("window", 2**70),
        ("drift_windows", -1),
    ],
)
def test_a_reference_that_does_not_hold_together_is_refused(shipped: Reference, member: str, value: object) -> None:
    document = json.loads(shipped.to_json())
    document[member] = value
    data = json.dumps(document).replace("Infinity", "1e999").encode()
    with pytest.raises(BadBundle, match=r"malformed|does not hold together"):
        Reference.from_json(data)


@pytest.mark.parametrize("cut", [1, 100, 2000, -2])
def test_a_truncated_reference_is_refused(shipped: Reference, cut: int) -> None:
    with pytest.raises(BadBundle, match="malformed"):
        Reference.from_json(shipped.to_json()[:cut])


@pytest.mark.parametrize("member", ["made", "counts", "test_sd", "rest"])
def test_a_reference_with_a_member_twice_is_refused(shipped: Reference, member: str) -> None:
    text = shipped.to_json()
    value = json.dumps({member: json.loads(text)[member]})[1:-1].encode()
    with pytest.raises(BadBundle, match=f"duplicate key '{member}'"):
        Reference.from_json(b"{" + value + b"," + text[1:])


@given(data=st.data())
def test_a_damaged_reference_is_read_as_a_sound_one_or_refused(shipped: Reference, data: st.DataObject) -> None:
    content = bytearray(shipped.to_json())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.sampled_from(b'0123456789.,-eE[]{}":n\\ \xff\x00'))
    try:
        result = Reference.from_json(bytes(content))
    except BadBundle:
        return
    assert Reference.from_json(result.to_json()).digest == result.digest


@given(st.binary(max_size=200) | st.text(alphabet='[]{}":,0e-', max_size=80).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"version":' * 50_000)
def test_any_bytes_for_a_reference_are_refused(data: bytes) -> None:
    with pytest.raises(BadBundle, match=r"reference\.json"):
        Reference.from_json(data)

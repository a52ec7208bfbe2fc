"""`manifest.json`: what makes no sense is refused even when it is signed, and nothing but BadBundle is raised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle import builtin, manifest
from scripts.kit.bundles import change_manifest, resign
from tests.ml.model.test_bundle import refused


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("format", 2, "the bundle has format 2, this agent reads format 1; update the agent"),
        ("name", "../../etc", "must be 1-64 of a-z"),
        ("name", "Übung", "must be 1-64 of a-z"),
        ("version", "", "version"),
        ("kind", "guess", "kind"),
        ("input", {"fields": []}, "input.fields"),
        ("input", {"fields": ["a", "a"]}, "a field is named twice"),
        ("input", {"fields": ["output.x"]}, "alerts about outputs have names that begin with 'output.'"),
        ("input", {"fields": ["a"], "mean": [1, 2]}, "mean has 2 entries for 1 fields"),
        ("input", {"fields": ["a"], "std": [0]}, "every std must be above 0"),
        ("input", {"fields": ["a"], "window": {"rows": 10, "step": 11}}, "step 11 above rows 10"),
        ("input", {"fields": ["a"], "window": {"rows": 0, "step": 1}}, "rows"),
        ("input", {"fields": ["a"], "window": {"rows": 1, "step": 1, "max_gap_s": 0}}, "max_gap_s"),
        ("output", {"labels": ["one"]}, "needs at least two output.labels"),
        ("output", {"labels": ["one", "one"]}, "a label is named twice"),
        ("output", {"labels": ["one", ""]}, "output.labels"),
        ("output", {"labels": ["one", "two\u2028"]}, "has a line break"),
        ("output", {"labels": ["one", "x" * 257]}, "output.labels"),
        ("output", {"labels": ["one", "two"], "temperature": 0}, "temperature"),
        ("output", {"labels": ["one", "two"], "activation": "relu"}, "activation"),
        ("limits", {"memory_mib": 10**9}, "memory_mib"),
        ("limits", {"cpu_seconds": 0}, "cpu_seconds"),
        ("drift", {"window": 1}, "drift.window"),
        ("files", {"model.tflite": "md5:00"}, "files"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_even_when_signed(
    folder: Path, key: str, value: Any, why: str
) -> None:
    change_manifest(folder, lambda head: head.update({key: value}))
    assert why in refused(folder)


@pytest.mark.parametrize("member", ["format", "name", "version", "created", "kind", "input", "output", "files"])
def test_a_manifest_without_a_needed_member_is_refused(folder: Path, member: str) -> None:
    change_manifest(folder, lambda head: head.pop(member))
    assert member in refused(folder)


TWO = {"kind": "classify", "labels": ["u", "v"]}


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ({"low": {"kind": "regress"}}, "two results would have one column name"),
        ({"high": {"kind": "anomaly"}}, "two results would have one column name"),
        ({"a": {"kind": "anomaly", "names": ["p", "q"]}}, "outputs: names are for kind regress"),
        ({"a": {"kind": "classify", "labels": ["u", "v"], "names": ["p"]}}, "outputs: names are for kind regress"),
        ({"a": {"kind": "regress", "residual_bounds": [-1, 1]}}, "outputs: residual_bounds are for the first output"),
        ({"a": {"kind": "regress", "names": ["p", "q"], "size": 1}}, "outputs: size 1 for 2 names"),
        ({"a": {**TWO, "size": 5}}, "outputs: size 5 for 2 labels"),
        ({"a": {**TWO, "multi_label": True, "size": 1}}, "outputs: size 1 for 2 labels"),
        ({"a": {"kind": "classify", "labels": ["u", "v", "w"], "size": 1}}, "outputs: size 1 for 3 labels"),
    ],
)
def test_a_further_output_that_no_result_could_be_made_of_is_refused(outputs: dict[str, Any], why: str) -> None:
    with pytest.raises(BadBundle, match=re.escape(why)):
        manifest.decode(json.dumps(GOOD | {"output": {"residual_bounds": [-1, 1]}, "outputs": outputs}).encode())


def test_a_further_output_of_one_sigmoid_or_unnamed_values_is_read() -> None:
    outputs = {"a": {**TWO, "size": 1}, "b": {"kind": "regress", "size": 3}, "c": {"kind": "anomaly", "size": 3}}
    read = manifest.decode(json.dumps(GOOD | {"outputs": outputs}).encode())
    assert [output.values for output in read.further.values()] == [1, 3, 3]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["fields", "rows", "step", "labels", "std", "window"]), inner, max_size=4)
    ),
    max_leaves=10,
)
GOOD: dict[str, Any] = {
    "format": 1,
    "name": "tiny",
    "version": "1",
    "created": "",
    "kind": "regress",
    "input": {"fields": ["a"]},
    "output": {},
    "files": {},
}


@given(st.dictionaries(st.sampled_from([*GOOD, "drift", "limits", "more"]), JSON, max_size=4))
def test_any_manifest_is_read_or_refused(change: dict[str, Any]) -> None:
    data = json.dumps(GOOD | change).encode()
    try:
        outcome = f"format {manifest.decode(data).format}"
    except BadBundle as problem:
        outcome = str(problem)[:13]
    assert outcome in ("format 1", "manifest.json")


@given(st.binary(max_size=100))
def test_any_bytes_for_a_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(BadBundle, match=r"manifest\.json"):
        manifest.decode(data)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"name":' * 50_000, b"\xff\xfe{}", b"nul", b"1e999"])
def test_manifests_that_are_meant_to_hurt_are_refused(data: bytes) -> None:
    with pytest.raises(BadBundle, match=r"manifest\.json"):
        manifest.decode(data)


def test_a_manifest_has_one_spelling() -> None:
    once = manifest.encode(manifest.decode(json.dumps(GOOD).encode()))
    assert manifest.encode(manifest.decode(once)) == once
    assert once.endswith(b"}\n")
    assert list(json.loads(once)) == sorted(json.loads(once))


def test_a_signed_but_ambiguous_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    for twice in ('"version": "9.9.9",\n', '"files": {},\n'):
        path.write_text(text.replace("{\n", "{\n  " + twice, 1))
        resign(folder)
        assert "in one object" in refused(folder)
    path.write_text(text.replace('"fields": [', '"fields": ["x"], "fields": [', 1))
    resign(folder)
    assert "duplicate key 'fields'" in refused(folder)


def test_drift_options_are_left_out_of_a_manifest_that_does_not_use_them() -> None:
    plain = manifest.DriftSettings(window=20)
    assert msgspec.to_builtins(plain) == {"window": 20}
    requested = msgspec.convert({"window": 20, "min_count": 10, "seasonality": "hour"}, manifest.DriftSettings)
    assert (requested.min_count, requested.seasonality) == (10, "hour")
    for wrong in ({"min_count": 1}, {"seasonality": "month"}, {"class_field": ""}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, manifest.DriftSettings)


def test_a_shipped_manifest_is_encoded_to_the_same_bytes() -> None:
    head = (builtin.bundles_dir() / "exercise" / "manifest.json").read_bytes()
    assert manifest.encode(manifest.decode(head)) == head


def test_members_with_default_values_are_omitted() -> None:
    written = json.loads(manifest.encode(manifest.decode(json.dumps(GOOD).encode())))
    assert (written["input"], written["output"]) == ({"fields": ["a"]}, {})

"""Target metadata of bundles, which come from untrusted repositories."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import BadBundle
from outstation.protocol.wire import target_metadata
from outstation.protocol.wire.target_metadata import TargetMetadata

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TEXT, COUNT = st.text(max_size=20), st.integers(0, 2**53)
OFFERS = st.builds(
    TargetMetadata,
    name=TEXT,
    version=TEXT,
    digest=TEXT,
    kind=TEXT,
    fields=st.lists(TEXT, max_size=4),
    window=COUNT,
    agent=TEXT,
    runtimes=st.lists(TEXT, max_size=2),
    memory=COUNT,
    unpacked=COUNT,
    features=st.none() | st.tuples(TEXT, TEXT, TEXT),
)


@given(OFFERS, st.dictionaries(st.text(min_size=12), JSON, max_size=2))
def test_metadata_round_trip_and_ignore_unknown_members(metadata: TargetMetadata, more: dict[str, object]) -> None:
    custom = msgspec.json.decode(msgspec.json.encode(target_metadata.encode(metadata)))
    custom[target_metadata.MEMBER] |= more
    assert target_metadata.decode(custom) == metadata


@given(JSON)
def test_invalid_metadata_are_refused_in_one_sentence(custom: object) -> None:
    with pytest.raises(BadBundle, match="does not describe this target"):
        target_metadata.decode(custom)


@given(OFFERS, st.sampled_from([name for name in TargetMetadata.__struct_fields__ if name != "features"]), JSON)
def test_a_missing_or_mistyped_member_is_refused(metadata: TargetMetadata, name: str, value: object) -> None:
    members = msgspec.to_builtins(metadata)
    before = members.pop(name)
    with pytest.raises(BadBundle):
        target_metadata.decode({target_metadata.MEMBER: members})
    if type(value) is not type(before) and not isinstance(value, int | float):
        with pytest.raises(BadBundle):
            target_metadata.decode({target_metadata.MEMBER: {**members, name: value}})


@given(st.text(max_size=80))
def test_a_version_is_a_plain_folder_name_or_refused(version: str) -> None:
    try:
        path = target_metadata.target_path("tiny", version, "sha256:" + "ab" * 32)
    except BadBundle:
        return
    assert path == f"tiny/{version}/{'ab' * 8}.zip"
    assert path.count("/") == 2
    assert version.isascii()
    assert not version.startswith(".")

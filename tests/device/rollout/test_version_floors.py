"""The laws of the floors, and what fits a device."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from outstation.device.rollout.fetch import compatibility, version_floors
from outstation.device.rollout.fetch.compatibility import DISK_RESERVE_BYTES, DeviceProfile
from outstation.device.rollout.fetch.protocol import FetchResponse
from outstation.device.rollout.fetch.version_floors import VersionFloor, VersionFloors
from outstation.foundation.errors import FetchFailed
from tests.kit.update_repositories import custom

ROLES = ("root", "timestamp", "snapshot", "targets", "exercise")
SETS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)
SEEN = st.dictionaries(st.sampled_from(ROLES), st.builds(VersionFloor, st.integers(1, 9), SETS))
HERE = DeviceProfile(
    "watch", {"ax": "f32", "ay": "i64", "mode": "category"}, "1.4.0", "ai-edge-litert 2.1.0", 1 << 30, 1 << 30
)


@given(st.lists(SEEN, max_size=6))
def test_no_version_falls_while_its_keys_are_valid(looks: list[dict[str, VersionFloor]]) -> None:
    """Hypothesis fails if too few series change a floor that exists."""
    known, compared = VersionFloors("anchor"), 0
    for seen in looks:
        with contextlib.suppress(FetchFailed):
            after = version_floors.raise_floors(known, seen, None)
            for role, before in known.roles.items():
                revoked = set(before.keys) - set(after.roles[role].keys)
                assert after.roles[role].version >= before.version or (revoked and role != "root")
                compared += after.roles[role] != before
            known = after
    assume(compared)


@given(SEEN, SEEN)
def test_a_version_below_its_floor_is_refused_and_nothing_else_is(
    first: dict[str, VersionFloor], then: dict[str, VersionFloor]
) -> None:
    known = version_floors.raise_floors(VersionFloors("anchor"), first, 5.0)
    below = [
        role
        for role in then
        if role in first
        and then[role].version < first[role].version
        and (role == "root" or set(first[role].keys) <= set(then[role].keys))
    ]
    if below:
        with pytest.raises(FetchFailed, match=f"BadVersionNumberError: {below[0]} has version"):
            version_floors.raise_floors(known, then, None)
    else:
        assert version_floors.raise_floors(known, then, None).roles == first | then
        assert version_floors.raise_floors(known, then, None).expires_s == 5.0


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_valid_response_or_none(data: bytes) -> None:
    try:
        answer = msgspec.json.decode(data, type=FetchResponse)
    except msgspec.MsgspecError:
        return
    assert isinstance(answer.floors, VersionFloors)


def custom_metadata(**other: Any) -> dict[str, Any]:
    result: dict[str, Any] = custom("exercise", "1.0.0", "sha256:00", **{"agent": "1.0.0"} | other)["outstation"]
    return result


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({}, ""),
        ({"fields": ["ax", "ay"], "agent": "1.4.0"}, ""),
        ({"agent": "1.4"}, ""),
        ({"agent": "1.10.0"}, "needs agent 1.10.0 or newer, this is 1.4.0"),
        ({"fields": ["az"]}, "needs field 'az', which stream 'watch' of this device does not have"),
        ({"fields": ["mode"]}, "needs numbers in field 'mode', but stream"),
        ({"runtimes": ["tflite-runtime", "ai-edge-litert"]}, ""),
        ({"runtimes": ["ai-edge-litert 9.9"]}, ""),
        ({"runtimes": ["tflite-runtime"]}, "it has: tflite-runtime"),
        ({"runtimes": []}, "it has: none"),
        ({"memory": (1 << 30) + 1}, "1024.0 MiB are free here"),
        ({"unpacked": (1 << 30) - DISK_RESERVE_BYTES - 1000}, ""),
        ({"unpacked": (1 << 30) - DISK_RESERVE_BYTES - 999}, "of disk"),
        ({"memory": -1}, "target metadata are incomplete"),
        ({"runtimes": "ai-edge-litert"}, "target metadata are incomplete"),
        ({"more": "of a newer publisher"}, ""),
    ],
)
def test_an_incompatibility_is_a_sentence(other: dict[str, Any], why: str) -> None:
    result = compatibility.find_incompatibility(custom_metadata(**other), 2000, 1000, HERE)
    assert why in result
    assert bool(why) == bool(result)


def test_a_target_without_metadata_is_incompatible() -> None:
    assert "target metadata are incomplete" in compatibility.find_incompatibility({}, 2000, 1000, HERE)

"""Identifiers for Home Assistant: what it allows, reversible, and never the same for two devices."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.integrations.homeassistant.discovery import device_id, parse_device_id

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)


@given(NAMES, NAMES)
def test_an_identifier_is_one_that_home_assistant_allows_and_leads_back(fleet: str, device: str) -> None:
    identifier = device_id(fleet, device)
    assert re.fullmatch(r"[a-zA-Z0-9_-]+", identifier)
    assert parse_device_id(identifier) == (fleet, device)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("acme", "pi.1"), ("acme", "pi_1")),
        (("b", "a_at"), ("at_b", "a")),
        (("a-b", "c"), ("b", "c-a")),
        (("a.", "b"), ("a", "b")),
    ],
)
def test_similar_names_get_different_identifiers(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert device_id(*first) != device_id(*second)


@pytest.mark.parametrize(
    "foreign",
    [
        *("zigbee2mqtt_bridge", "outstation_pi-01", "outstation__AT_acme", "outstation_PI_AT_acme", ""),
        "outstation_a.b_AT_acme",
    ],
)
def test_an_identifier_of_somebody_else_is_none_of_ours(foreign: str) -> None:
    with pytest.raises(ValueError, match=r"device of ours|stands for no name"):
        parse_device_id(foreign)

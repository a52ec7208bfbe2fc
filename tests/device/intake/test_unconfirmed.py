"""Limit of unconfirmed messages: what a broker announces, corrected by what arrives."""

from __future__ import annotations

from outstation.device.intake.sources.unconfirmed import UnconfirmedMessages


def arrive(messages: UnconfirmedMessages, *times_s: float) -> None:
    for now_s in times_s:
        messages.add(now_s)


def test_an_announced_limit_is_reached_by_its_count() -> None:
    messages = UnconfirmedMessages(3)
    arrive(messages, 0, 1)
    assert not messages.is_at_limit
    arrive(messages, 2)
    assert messages.is_at_limit
    messages.confirm(1, 2.1)
    assert not messages.is_at_limit


def test_messages_beyond_the_announced_limit_raise_it() -> None:
    messages = UnconfirmedMessages(3)
    arrive(messages, 0, 0, 0, 0, 0)
    messages.confirm(5, 0.01)
    arrive(messages, 1, 1, 1, 1)
    assert not messages.is_at_limit
    arrive(messages, 1)
    assert messages.is_at_limit


def test_a_message_that_waited_for_a_confirmation_shows_a_lower_limit() -> None:
    messages = UnconfirmedMessages(65_535)
    arrive(messages, 0, 0, 0)
    messages.confirm(3, 1)
    arrive(messages, 1.001, 1.001)
    assert not messages.is_at_limit
    arrive(messages, 1.001)
    assert messages.is_at_limit


def test_a_confirmation_of_a_part_or_without_a_silence_shows_no_limit() -> None:
    part = UnconfirmedMessages(100)
    arrive(part, 0, 0, 0)
    part.confirm(2, 1)
    arrive(part, 1.001)
    flowing = UnconfirmedMessages(100)
    arrive(flowing, 0, 0.01, 0.02)
    flowing.confirm(3, 0.021)
    arrive(flowing, 0.022)
    assert (part.limit, flowing.limit) == (100, 100)


def test_a_lower_limit_is_forgotten_once_nothing_waits_for_a_confirmation() -> None:
    messages = UnconfirmedMessages(100)
    arrive(messages, 0)
    messages.confirm(1, 1)
    arrive(messages, 1.001)
    assert messages.is_at_limit
    messages.confirm(1, 1.002)
    arrive(messages, 2)
    assert messages.limit == 100

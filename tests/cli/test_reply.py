"""Replies to remote commands as text: whatever a device sent is shown, and steers no terminal."""

from __future__ import annotations

from typing import Any

import pytest

from outstation.device.cli import reply
from outstation.fleet.cli.reports import FollowedAlerts


def shown(capsys: pytest.CaptureFixture[str], command: str, data: dict[str, Any]) -> str:
    reply.print_reply(command, data)
    return capsys.readouterr().out


def test_members_are_aligned_and_nested_ones_indented(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"rows": 12, "accuracy": 0.91234567, "tags": ["a", "b"], "none": None, "bundle": {"name": "x", "ok": True}}
    assert shown(capsys, "run", data) == (
        "rows      12\naccuracy  0.912346\ntags      a, b\nnone      –\nbundle\n  name  x\n  ok    yes\n"
    )


@pytest.mark.parametrize(
    "data",
    [
        {"device": 3},
        {"device": "pi", "fleet": "f", "clock": {"boot": "\x1b]0;owned\x07", "error_us": None}},
        {"device": "pi", "fleet": "f", "clock": {"boot": 1, "error_us": 10**400}},
        {"a\x1b[2J": {"b": [{"c\u202e": "\x07"}]}},
        {"deep": [[[[[[[[[[[[{"x": "\x1b[2J"}]]]]]]]]]]]]},
    ],
)
def test_a_reply_of_another_form_is_shown_and_escaped(capsys: pytest.CaptureFixture[str], data: dict[str, Any]) -> None:
    text = shown(capsys, "report", data)
    assert text.strip()
    assert all(char.isprintable() or char == "\n" for char in text)


def test_alerts_that_are_raised_changed_or_cleared_meanwhile_are_followed() -> None:
    def alert(identity: str, status: str = "raised") -> dict[str, Any]:
        return {"source": "device", "device": "pi", "log": "l", "id": identity, "status": status, "open": True}

    steps = iter([[alert("a")], [alert("a")], [alert("a", "muted"), alert("b")], [alert("b")], []])
    followed = FollowedAlerts(lambda: next(steps))
    changes = [[(row["id"], row["status"]) for row in followed.read_changes()] for _ in range(5)]
    assert changes == [
        [("a", "raised")],
        [],
        [("a", "muted"), ("b", "raised")],
        [("a", "cleared")],
        [("b", "cleared")],
    ]

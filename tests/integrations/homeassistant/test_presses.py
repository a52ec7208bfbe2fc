"""Presses of Home Assistant's buttons: which result they mean, and which are refused."""

from __future__ import annotations

import pytest

from outstation.foundation.errors import UsageError
from outstation.integrations.homeassistant.device_state import Result
from outstation.integrations.homeassistant.discovery import Place
from outstation.integrations.homeassistant.presses import BURST, MAX_REFUSALS, PressReader
from outstation.protocol.transport.packets import IncomingMessage

PLACE = Place("acme", "collector", "homeassistant", takes_verdicts=True)
TOPIC = PLACE.press_topic("pi-07", "exercise")


def result(row: int = 10, label: str | None = "PEN") -> Result:
    return Result(row, 1_764_022_680_000_000, label, 0.9, None, {}, "m", "1", [])


class Desk:
    """A reader with its clock and what it stored."""

    def __init__(self) -> None:
        self.now_s, self.stored = 100.0, list[tuple[str, str, int, str]]()
        self.reader = PressReader(PLACE, self.store, lambda: self.now_s)
        self.shown: Result | None = result()

    def store(self, device: str, task: str, row: int, label: str) -> str:
        if label == "sideways":
            raise UsageError("no label of this model")
        self.stored.append((device, task, row, label))
        return "stored"

    def press(self, topic: str = TOPIC, payload: bytes = b"confirm", *, retained: bool = False) -> str:
        message = IncomingMessage(topic=topic, payload=payload, tokens=(), retained=retained, mid=1, qos=1)
        return self.reader.read(message, lambda device, task: self.shown)


def test_a_button_confirms_the_answer_that_is_shown_and_a_text_corrects_it() -> None:
    desk = Desk()
    desk.press()
    desk.press(f"{TOPIC}/label", b" ABD ")
    assert desk.stored == [("pi-07", "exercise", 10, "PEN"), ("pi-07", "exercise", 10, "ABD")]


def test_a_press_just_after_another_answer_is_refused_because_it_may_mean_the_one_before() -> None:
    desk = Desk()
    desk.reader.observe("pi-07", "exercise", result(9, "ABD"), result())
    assert "press again" in desk.press()
    desk.now_s += 3.0
    desk.press()
    desk.reader.observe("pi-07", "exercise", result(), result(11))
    desk.press()
    assert len(desk.stored) == 2, "the same answer again is no change"


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        (TOPIC, b"CONFIRM"),
        (TOPIC, b""),
        (f"{TOPIC}/label", b""),
        (f"{TOPIC}/label", b"x" * 300),
        (f"{TOPIC}/label", b"sideways"),
        (f"{TOPIC}/other", b"confirm"),
        ("outstation-bridge/other/verdict/pi-07/exercise", b"confirm"),
    ],
)
def test_a_press_that_says_nothing_stores_nothing(topic: str, payload: bytes) -> None:
    desk = Desk()
    line = desk.press(topic, payload)
    assert desk.stored == []
    assert "refused: " in line


def test_a_flood_of_presses_is_cut_off() -> None:
    desk = Desk()
    for _ in range(3 * BURST):
        desk.press()
    assert len(desk.stored) == BURST


def test_a_retained_press_is_nobodys_and_is_refused() -> None:
    desk = Desk()
    assert "retained" in desk.press(retained=True)
    assert desk.stored == []


def test_without_an_answer_on_the_screen_a_press_means_nothing() -> None:
    desk = Desk()
    desk.shown = None
    assert "no answer" in desk.press()
    desk.shown = result(label=None)
    assert "no answer" in desk.press()


def test_a_flood_of_refused_presses_with_long_names_writes_few_short_lines() -> None:
    desk, topic = Desk(), PLACE.press_topic("d" * 30_000, "t" * 30_000)
    desk.shown = None
    lines = [line for _ in range(1000) if (line := desk.press(topic))]
    assert len(lines) == MAX_REFUSALS
    assert max(len(line) for line in lines) < 300
    desk.now_s += 60.0
    assert f"({1000 - MAX_REFUSALS} more were refused before)" in desk.press(topic)

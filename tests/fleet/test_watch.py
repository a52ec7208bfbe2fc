"""Live table of a fleet: filled from the database, changed by each verified message, 80 characters wide."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from outstation.fleet import watch
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.fleet.watch import FleetWatcher
from outstation.foundation import clock
from outstation.workbench.testing.messages import MessageSender, SignedMessage

NOW = "2026-11-24T22:20:00.000000Z"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FleetStore]:
    with FleetStore(tmp_path / "fleet.db") as opened:
        yield opened


def enrol(store: FleetStore, name: str) -> MessageSender:
    sender = MessageSender(name)
    store.enrol(name, sender.key.public, replace=False, now=NOW)
    return sender


def add(store: FleetStore, sender: MessageSender, *sent: SignedMessage) -> None:
    store.ingest([Arrival(sender.verify(item)) for item in sent], [], NOW)


def load(store: FleetStore) -> FleetWatcher:
    watcher = FleetWatcher("acme", Keyring(store, {}))
    watcher.load(store)
    return watcher


def draw(watcher: FleetWatcher, *, width: int = 80, color: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(watch.render_table(watcher, "", width=width))
    return out.getvalue()


def test_the_table_is_filled_before_any_message_arrives(store: FleetStore) -> None:
    sender = enrol(store, "pi-07")
    enrol(store, "pi-08")
    add(
        store,
        sender,
        sender.state("online"),
        sender.alert("exercise/ax/drift/1", summary="ax: mean rose."),
        sender.alert("exercise/wz/fault/1", alert="fault", subject="wz", severity="critical", summary="wz: stuck."),
        sender.alert("exercise/ay/drift/1", summary="ay: rose."),
        sender.alert("exercise/ay/drift/1", "cleared", summary="ay: as before.", subject="ay"),
    )
    watcher = load(store)
    assert {name: view.state for name, view in watcher.devices.items()} == {"pi-07": "online", "pi-08": "enrolled"}
    shown = draw(watcher)
    [line] = [line for line in shown.splitlines() if "pi-07" in line]
    assert "online" in line
    assert "fault wz; drift ax" in line
    assert "2: wz: stuck." in line
    [line] = [line for line in shown.splitlines() if "pi-08" in line]
    assert "never" in line


def test_each_message_changes_what_the_database_knew(store: FleetStore) -> None:
    sender = enrol(store, "pi-07")
    add(store, sender, sender.alert("exercise/ax/drift/1", summary="ax: mean rose."))
    watcher = load(store)
    for message in (
        sender.drift("ok"),
        sender.alert("exercise/ax/drift/1", "cleared", summary="ax: as before."),
        sender.alert("exercise/fall/result/1", alert="result", subject="fall", summary="fell"),
        sender.state("stopped"),
    ):
        assert watcher.verify(message.to_incoming()).message is not None
    view = watcher.devices["pi-07"]
    assert (view.state, [alert.summary for alert in view.alerts.values()]) == ("stopped", ["fell"])
    [line] = [line for line in draw(watcher).splitlines() if "pi-07" in line]
    assert "ok" in line
    assert "0 s" in line


def test_every_line_fits_into_eighty_characters_and_long_text_ends_in_dots(store: FleetStore) -> None:
    sender = enrol(store, "d" * 64)
    subject = "a" * 60
    alert = sender.alert(f"exercise/{subject}/drift/1", subject=subject, summary="s" * 1000)
    add(store, sender, sender.state("online"), alert)
    lines = draw(load(store)).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("…" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 130])
def test_a_long_alert_leaves_device_state_and_age_whole(store: FleetStore, width: int) -> None:
    sender = enrol(store, "pi-11")
    alert = sender.alert("exercise/ax/drift/1", subject="ax", summary="ax: spread fell to 0.6 of this site's. " * 20)
    add(store, sender, sender.state("online"), alert)
    lines = draw(load(store), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split()[:3] == ["device", "state", "seen"] for line in lines)
    [row] = [line for line in lines if "pi-11" in line]
    assert re.match(r" pi-11 +online(, unsynced)? +\d+ \w+ +drift ax", row), row


def test_in_a_small_terminal_the_devices_with_the_worst_alerts_are_shown(store: FleetStore) -> None:
    senders = [enrol(store, f"pi-{number:02}") for number in range(30)]
    add(store, senders[25], senders[25].alert("x/1", severity="critical", summary="burns"))
    add(store, senders[28], senders[28].alert("x/1", summary="drifts"))
    out = io.StringIO()
    Console(file=out, width=80).print(watch.render_table(load(store), "", 3))
    shown = [line.split()[0] for line in out.getvalue().splitlines() if "pi-" in line]
    assert shown == ["pi-25", "pi-28", "pi-00"]
    assert "27 more; `outstation fleet devices` lists all" in " ".join(out.getvalue().split())


def test_text_of_a_device_is_no_markup_and_steers_no_terminal(store: FleetStore) -> None:
    sender = enrol(store, "pi-07")
    watcher = load(store)
    out = io.StringIO()
    Console(file=out, width=80).print(watch.render_table(watcher, "[Errno 111] refused\x1b]"))
    assert "[Errno 111] refused\\x1b]" in out.getvalue()
    hostile = "[bold red]x[/]\x1b]0;owned\x07\u202e"
    watcher.verify(sender.alert("exercise/ax/drift/1", subject="[red]ax", summary=hostile).to_incoming())
    shown = draw(watcher, width=200)
    assert "[bold red]x[/]\\x1b]0;owned\\x07\\u202e" in shown
    assert "drift [red]ax" in shown
    assert "\x1b]" not in draw(watcher, width=200, color=True)


def test_states_and_severities_have_colours(store: FleetStore) -> None:
    sender = enrol(store, "pi-07")
    watcher = load(store)
    watcher.verify(sender.state("online").to_incoming())
    watcher.verify(sender.alert("x/1", severity="critical", summary="burns").to_incoming())
    shown = draw(watcher, color=True)
    assert "\x1b[32monline" in shown
    assert "\x1b[1;31m1: burns" in shown


def test_a_retained_state_of_yesterday_does_not_count_as_seen_now(store: FleetStore) -> None:
    sender = enrol(store, "pi-07")
    watcher = load(store)
    watcher.verify(sender.state("online").to_incoming(retained=True))
    assert watcher.devices["pi-07"].seen_us == clock.parse_rfc3339("2026-11-24T22:18:01.000000Z")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (200_000, "2 d"), (-5, "0 s")]
)
def test_an_age_is_shown_in_its_largest_unit(seconds: int, shown: str) -> None:
    view = watch.DeviceView(seen_us=10**15)
    assert watch._format_age(view, 10**15 + seconds * 1_000_000) == shown


def test_a_revoked_device_is_shown_as_revoked_after_its_last_state(store: FleetStore) -> None:
    sender = enrol(store, "pi-07")
    add(store, sender, sender.state("online"))
    store.revoke("pi-07", None, NOW)
    assert load(store).devices["pi-07"].state == "revoked"


def test_a_message_of_an_unknown_key_changes_nothing(store: FleetStore) -> None:
    watcher = load(store)
    assert watcher.verify(MessageSender("pi-99").state("online").to_incoming()).message is None
    assert (watcher.devices, watcher.refused) == ({}, 1)

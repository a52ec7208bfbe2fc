"""Wipe: confirmed by a second command, finished whatever crashes, and never half undone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs

from outstation.device.commands import erasure, wipe
from outstation.device.commands.wipe import Wipe
from outstation.device.config.config import Config
from outstation.device.config.device import DeviceConfig as DeviceSection
from outstation.device.config.updates import UpdatesConfig
from outstation.device.recovery.open import acquire_lock
from outstation.device.store.command_log import CommandAnswer
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import UsageError
from outstation.protocol.transport.broker_config import UplinkBrokerConfig
from outstation.protocol.wire import keys
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.process import run_outstation
from tests.kit.commands import call_outstation
from tests.kit.operators import NOW, Desk, Operator, trusted_keys


class Halted:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def halted() -> Halted:
    return Halted()


def arm(desk: Desk, halted: Halted, delay_s: float = 0.0) -> Wipe:
    """Give the desk its wipe commands, as after a start."""
    made = Wipe(desk.store, desk.author, desk.trusted, halted, delay_s)
    desk.control._actions = {"cancel-wipe": made.cancel}
    desk.control._signer_actions = {"wipe": made.request}
    return made


@pytest.fixture
def desk(tmp_path: Path, halted: Halted) -> Iterator[Desk]:
    made = Desk(tmp_path / "data")
    arm(made, halted)
    yield made
    made.store.close()


def later(seconds: float) -> ClockReading:
    return ClockReading(NOW.wall_us + round(seconds * 1e6), NOW.boot_s + seconds, "synced")


def word(desk: Desk) -> str:
    answer = desk.obey(desk.operator.command("wipe"))[-1]
    assert answer.ok
    return str(answer.data["confirm"])


def confirm(desk: Desk, text: str, now: ClockReading = NOW) -> bool:
    return desk.obey(desk.operator.command("wipe", args={"confirm": text}), now=now)[-1].ok


def test_the_first_wipe_erases_nothing_and_the_second_with_its_word_does(desk: Desk, halted: Halted) -> None:
    text = word(desk)
    assert (halted.times, wipe.is_pending(desk.store)) == (0, False)
    assert confirm(desk, text)
    assert (halted.times, wipe.is_pending(desk.store)) == (1, True)
    assert desk.audit("wiped") == [{"kids": [desk.operator.key.public.kid]}]


def test_a_wrong_word_an_old_one_and_a_used_one_erase_nothing(desk: Desk, halted: Halted) -> None:
    text = word(desk)
    assert not confirm(desk, "guess")
    assert not confirm(desk, text), "a wrong guess spends the word"
    text = word(desk)
    assert not confirm(desk, text, later(wipe.CONFIRM_VALID_S + 1))
    assert (halted.times, wipe.is_pending(desk.store)) == (0, False)


def test_a_confirmation_expires_by_the_boot_clock(desk: Desk) -> None:
    text = word(desk)
    desk.operator.now_us = NOW.wall_us + 86_400_000_000
    assert confirm(desk, text, ClockReading(NOW.wall_us + 86_400_000_000, NOW.boot_s + 5, "synced"))


def test_a_word_is_forgotten_by_a_restart(desk: Desk, halted: Halted) -> None:
    text = word(desk)
    arm(desk, halted)
    assert not confirm(desk, text)


DELAY_S = 3600.0
SECOND = Operator(key=new_key(78))


class Guarded:
    """A device with the default delay that two operators' keys may command."""

    def __init__(self, folder: Path, halted: Halted) -> None:
        self.desk, self.halted = Desk(folder), halted
        self.start()

    def start(self) -> None:
        desk = self.desk
        desk.trusted = desk.commands.trusted = trusted_keys(
            desk.store, desk.author, desk.operator.key, SECOND.key, THIRD.key
        )
        self.wipe = arm(desk, self.halted, DELAY_S)

    def restart(self) -> None:
        self.desk.crash()
        self.start()

    def send(self, operator: Operator, name: str, now: ClockReading = NOW, **args: str) -> CommandAnswer:
        operator.now_us = now.wall_us
        return self.desk.obey(operator.command(name, args=args), now=now)[-1]

    def confirm(self, operator: Operator, now: ClockReading = NOW) -> CommandAnswer:
        return self.send(operator, "wipe", now, confirm=str(self.send(operator, "wipe", now).data["confirm"]))

    def alerts(self) -> list[str]:
        return [str(alert["state"]) for alert in self.desk.store.recent_alerts(10) if alert["subject"] == "wipe"]

    def revoke(self, operator: Operator) -> None:
        del self.desk.trusted._signers[False, operator.key.public.kid]


THIRD = Operator(key=new_key(80))


@pytest.fixture
def guarded(tmp_path: Path, halted: Halted) -> Iterator[Guarded]:
    made = Guarded(tmp_path / "data", halted)
    yield made
    made.desk.store.close()


def test_one_stolen_key_does_not_wipe_a_device_alone_before_the_delay(guarded: Guarded, halted: Halted) -> None:
    thief = guarded.desk.operator
    assert guarded.confirm(thief).data["due"]
    assert guarded.alerts() == ["raised"]
    for _ in range(3):
        guarded.confirm(thief)
    guarded.wipe.tick(later(DELAY_S - 1))
    assert (halted.times, wipe.is_pending(guarded.desk.store)) == (0, False)
    guarded.wipe.tick(later(DELAY_S))
    assert (halted.times, wipe.is_pending(guarded.desk.store)) == (1, True)


def test_a_second_operators_key_wipes_at_once(guarded: Guarded, halted: Halted) -> None:
    guarded.confirm(guarded.desk.operator)
    assert guarded.confirm(SECOND).ok
    assert halted.times == 1
    assert guarded.desk.audit("wiped") == [{"kids": [guarded.desk.operator.key.public.kid, SECOND.key.public.kid]}]


def test_any_operator_cancels_a_wipe_also_after_a_restart(guarded: Guarded, halted: Halted) -> None:
    guarded.confirm(guarded.desk.operator)
    guarded.restart()
    assert guarded.send(SECOND, "cancel-wipe").ok
    assert guarded.alerts() == ["cleared", "raised"]
    assert not guarded.send(SECOND, "cancel-wipe").ok
    guarded.restart()
    guarded.wipe.tick(later(DELAY_S + 1))
    assert halted.times == 0


def test_a_restart_neither_forgets_a_wipe_nor_hastens_it(guarded: Guarded, halted: Halted) -> None:
    guarded.confirm(guarded.desk.operator)
    guarded.restart()
    guarded.wipe.tick(later(DELAY_S - 1))
    assert halted.times == 0
    guarded.wipe.tick(later(DELAY_S))
    assert halted.times == 1


def test_a_clock_without_time_service_that_jumps_ahead_hastens_no_wipe(guarded: Guarded, halted: Halted) -> None:
    guarded.confirm(guarded.desk.operator)
    guarded.restart()
    jumped = ClockReading(NOW.wall_us + 10 * 86_400_000_000, 5.0, "restored")
    guarded.wipe.tick(jumped)
    guarded.wipe.tick(structs.replace(jumped, boot_s=4 + DELAY_S))
    assert halted.times == 0
    guarded.wipe.tick(structs.replace(jumped, boot_s=5 + DELAY_S))
    assert halted.times == 1


def test_a_wipe_of_a_key_that_is_revoked_meanwhile_does_not_happen(guarded: Guarded, halted: Halted) -> None:
    guarded.confirm(guarded.desk.operator)
    guarded.revoke(guarded.desk.operator)
    guarded.wipe.tick(later(1))
    assert guarded.alerts() == ["cleared", "raised"]
    guarded.wipe.tick(later(DELAY_S + 1))
    assert halted.times == 0


def test_a_revoked_key_is_no_first_signature(guarded: Guarded, halted: Halted) -> None:
    guarded.confirm(guarded.desk.operator)
    guarded.revoke(guarded.desk.operator)
    assert guarded.confirm(SECOND).data["due"]
    assert halted.times == 0


def test_a_word_given_to_one_key_still_needs_a_second_key(guarded: Guarded, halted: Halted) -> None:
    text = str(guarded.send(SECOND, "wipe").data["confirm"])
    assert guarded.send(guarded.desk.operator, "wipe", confirm=text).data["due"]
    assert halted.times == 0


def data_dir(folder: Path) -> tuple[Path, list[Path], list[Path]]:
    """Return a data folder with the device's files and keys, and files that a wipe preserves."""
    data = folder / "data"
    for name in ("keys", "quarantine/1", "bundles/.copies/ab", "bundles/.fetched", "updates/ab", "bundles/mine"):
        (data / name).mkdir(parents=True)
    for name in (
        *("outstation.db", "outstation.db-wal", "intake.sock", "keys/k.key", "quarantine/1/outstation.db"),
        *("bundles/.fetched/ab.zip", "bundles/.fetched/ab.part", "updates/ab/timestamp.json"),
        *("bundles/.copies/ab/model.tflite", "bundles/mine/model.tflite", "outstation.toml", "device.crt"),
    ):
        (data / name).write_text("secret")
    keys.generate(folder / "device.key")
    return data, [data / "outstation.toml", data / "device.crt"], [folder / "device.key", folder / "device.key.pub"]


def left(data: Path) -> set[str]:
    return {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}


def test_nothing_is_left_but_what_belongs_to_the_installation(tmp_path: Path) -> None:
    data, spared, own = data_dir(tmp_path)
    done = erasure.erase(data, spared, own)
    assert left(data) == {"wiped", "outstation.toml", "device.crt", "bundles/mine/model.tflite"}
    assert not any(path.exists() for path in own)
    assert (done["state"], done["left"]) == ("wiped", [])
    with pytest.raises(UsageError, match="wiped by an operator"):
        erasure.require_unwiped(data)


@pytest.mark.parametrize("after", range(8))
def test_killed_anywhere_it_does_not_start_and_the_next_start_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    data, spared, own = data_dir(tmp_path)
    deleted: list[Path] = []
    delete: Callable[[Path], bool] = erasure._delete

    def die(path: Path) -> bool:
        if len(deleted) == after:
            raise KeyboardInterrupt
        deleted.append(path)
        return delete(path)

    with monkeypatch.context() as patched:
        patched.setattr(erasure, "_delete", die)
        with pytest.raises(KeyboardInterrupt):
            erasure.erase(data, spared, own)
    result = erasure.read_marker(data)
    assert result is not None
    assert result["state"] == "wiping"
    with pytest.raises(UsageError, match="wiped"):
        erasure.require_unwiped(data)
    erasure.erase(data, spared, own)
    assert left(data) == {"wiped", "outstation.toml", "device.crt", "bundles/mine/model.tflite"}


def test_a_key_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, spared, own = data_dir(tmp_path)

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda self, missing_ok=False: read_only(self) if self in own else None)
        done = erasure.erase(data, spared, own)
    assert done["left"] == [str(path) for path in own]
    assert str(own[0]) in erasure.describe_marker(data, done)


def test_a_marker_that_is_damaged_still_keeps_the_device_down(tmp_path: Path) -> None:
    (tmp_path / erasure.MARKER).write_text("{")
    assert erasure.read_marker(tmp_path) == {"state": "wiping"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert call_outstation("init", str(tmp_path / "device"), "--id", "pi-07").returncode == 0
    (tmp_path / "device" / "data").mkdir(exist_ok=True)
    return tmp_path / "device"


def test_a_marker_that_cannot_be_read_erases_nothing_and_is_named(home: Path) -> None:
    """Simulate a bad sector under the marker."""
    (home / "data" / erasure.MARKER).mkdir()
    before = sorted(home.rglob("*"))
    done = run_outstation("run", "-c", str(home / "outstation.toml"))
    assert done.returncode == 1
    assert f"{erasure.MARKER}: Is a directory; the daemon cannot tell whether this device was wiped" in done.stderr
    assert sorted(home.rglob("*")) == before


def test_a_wipe_that_another_process_finishes_is_left_to_it(home: Path) -> None:
    (home / "data" / erasure.MARKER).write_text('{"state": "wiping"}')
    descriptor = acquire_lock(home / "data")
    done = run_outstation("run", "-c", str(home / "outstation.toml"))
    os.close(descriptor)
    assert (done.returncode, "uses this data folder; stop it first" in done.stderr) == (1, True)
    assert (home / "device.key").exists()


def test_the_config_and_its_certificates_are_spared() -> None:
    conf = Config(
        device=DeviceSection(id="pi-07", fleet="acme"),
        broker=UplinkBrokerConfig(url="mqtts://b", ca_file="/x/ca.pem", cert_file="/x/a.crt", tls_key_file="/x/a.key"),
        updates=UpdatesConfig(url="https://u", ca_file="/x/u.pem", root="/x/root.json"),
    )
    names = [path.name for path in erasure.installation_files(Path("/x/outstation.toml"), conf)]
    assert names == ["outstation.toml", "ca.pem", "a.crt", "a.key", "u.pem", "root.json"]


def test_the_marker_says_when(tmp_path: Path) -> None:
    data, spared, own = data_dir(tmp_path)
    erasure.erase(data, spared, own)
    document = json.loads((data / erasure.MARKER).read_text(encoding="utf-8"))
    assert document["time"].endswith("Z")
    assert document["time"] in erasure.describe_marker(data, document)

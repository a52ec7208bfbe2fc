"""Commands `request`, `devices token`, `fleet enrol --request`, `join`: keys stay on the device, and so do its data."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outstation.__main__ import main
from outstation.device import config
from outstation.device.bootstrap import device as installation
from outstation.device.bootstrap import joining
from outstation.device.recovery import new_log
from outstation.device.recovery.open import open_store
from outstation.device.store.store import Store
from outstation.foundation import durable_files
from outstation.foundation.clock import read as read_clock
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import keys
from tests.kit.marks import root_only


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def documents(capsys: pytest.CaptureFixture[str]) -> Any:
    def document(*arguments: object) -> Any:
        capsys.readouterr()
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return document


def test_a_device_joins_with_a_token_and_its_keys_stay_with_it(tmp_path: Path, documents: Any) -> None:
    fleet, device, bundle = tmp_path / "acme", tmp_path / "pi", tmp_path / "pi-07.tar.gz"
    documents("fleet", "init", fleet, "--broker", "mqtts://broker")
    token = documents("fleet", "token", "pi-07", "--dir", fleet)["token"]
    joined = documents("request", device, "--fleet", "acme", "--id", "pi-07", "--token", token)
    before = {path.name: path.read_bytes() for path in device.iterdir()}
    assert stat.S_IMODE((device / "device-tls.key").stat().st_mode) == 0o600
    request = joined["request"]
    done = documents("fleet", "enrol", "pi-07", "--request", request, "--bundle-out", bundle, "--dir", fleet)
    assert (done["made_by"], done["thumbprint"]) == ("device", joined["thumbprint"])
    assert documents("join", bundle, "--dir", device)["store_moved"] is False
    assert config.load(device / "outstation.toml").device.fleet == "acme"
    assert {name: (device / name).read_bytes() for name in before} == before
    assert not any(before["device.key"] in path.read_bytes() for path in fleet.rglob("*") if path.is_file())


def test_requesting_again_keeps_the_keys(tmp_path: Path, documents: Any) -> None:
    first = documents("request", tmp_path, "--fleet", "acme", "--id", "pi-07")
    assert documents("request", tmp_path, "--fleet", "acme", "--id", "pi-07") == first
    assert keys.load_private(tmp_path / "device.key").public.kid == first["thumbprint"]


def test_files_that_answer_another_devices_request_are_refused(
    tmp_path: Path, documents: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, bundle, other = tmp_path / "acme", tmp_path / "pi-07.tar.gz", tmp_path / "other"
    documents("fleet", "init", fleet, "--broker", "mqtts://broker")
    joined = documents("request", tmp_path / "pi", "--fleet", "acme", "--id", "pi-07")
    words = ("--request", joined["request"], "--thumbprint", joined["thumbprint"], "--bundle-out", bundle)
    documents("fleet", "enrol", "pi-07", *words, "--dir", fleet)
    assert run("join", bundle, "--dir", tmp_path / "empty") == 2
    assert "has no device.key" in capsys.readouterr().err
    documents("request", other, "--fleet", "acme", "--id", "pi-07")
    assert run("join", bundle, "--dir", other) == 2
    assert "answers another request" in capsys.readouterr().err
    assert not (other / "outstation.toml").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--id", "Pi", "--fleet", "acme"], "--id 'Pi'"), (["--id", "pi", "--fleet", "a", "--token", "x"], "--token")],
)
def test_wrong_use_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert run("request", tmp_path, *words) == 2
    assert problem in capsys.readouterr().err


# --- the answer ---


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def answer(tmp_path: Path, documents: Any) -> Any:
    """Return a function: the fleet's answer to the request of the device in a folder."""

    def enrol(home: Path) -> Path:
        fleet = tmp_path / "acme"
        if not fleet.exists():
            documents("fleet", "init", fleet, "--broker", "mqtts://broker")
        joined = documents("request", home, "--fleet", "acme", "--id", "pi-07")
        file = tmp_path / f"{home.name}.tar.gz"
        words = ("--request", joined["request"], "--thumbprint", joined["thumbprint"], "--bundle-out", file)
        documents("fleet", "enrol", "pi-07", *words, "--replace", "--dir", fleet)
        return file

    return enrol


def alone(home: Path, more: str = "") -> str:
    """Set up a device without a fleet, with one message in its store; return its log."""
    assert run("init", home, "--standalone", "--id", "garden") == 0
    file = home / "outstation.toml"
    file.write_text(file.read_text() + more)
    conf = config.load(file)
    with installation.open_store(conf) as store:
        log = installation.open_message_log(file, conf, store)
        with store.transaction() as tx:
            log.append(tx, "audit", None, {"event": "started", "summary": "Alone.", "evidence": {}}, read_clock())
        return log.log_id


STREAM = """
# My sensor.
[streams.watch]
fields = [
  { name = "ax" },
]

[buffer]
commit_every = "10 s"
"""


def messages_of(home: Path) -> list[dict[str, Any]]:
    """Start once as the daemon does, and return the stored messages."""
    file = home / "outstation.toml"
    conf = config.load(file)
    with installation.open_store(conf) as store:
        installation.open_message_log(file, conf, store)
        return [json.loads(message.payload) for message in store.unacknowledged_messages(0, 100)]


@contextmanager
def killed_at(write: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """End the process before the durable step number `write`: a file, or the commit that moves the store."""
    steps: list[str] = []
    real_write, real_move = durable_files.write, new_log.plan_move

    def step(name: str) -> None:
        steps.append(name)
        if len(steps) == write:
            raise Killed

    def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
        if path.parent.name != "data":
            step(path.name)
        real_write(path, data, mode)

    def move(store: Store, fleet: str, device: str) -> bool:
        step("store")
        return real_move(store, fleet, device)

    with monkeypatch.context() as patched:
        patched.setattr(durable_files, "write", write_file)
        patched.setattr(new_log, "plan_move", move)
        yield steps


def test_a_device_that_joins_later_keeps_its_data(tmp_path: Path, documents: Any, answer: Any) -> None:
    home = tmp_path / "pi"
    former = alone(home)
    done = documents("join", answer(home), "--dir", home)
    assert (done["replaced"], done["store_moved"]) == ([], True)
    conf = config.load(home / "outstation.toml")
    assert (conf.device.id, conf.device.fleet, conf.collector.delivery) == ("pi-07", "acme", "collector")
    first, *_ = messages_of(home)
    assert (first["summary"], first["device"], first["reissued"]["log"]) == ("Alone.", "pi-07", former)
    assert documents("join", tmp_path / "pi.tar.gz", "--dir", home)["store_moved"] is False


def test_a_changed_config_needs_consent_and_its_own_sections_stay(
    tmp_path: Path, documents: Any, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "pi"
    alone(home, STREAM)
    before = {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}
    file = answer(home)
    assert run("join", file, "--dir", home) == 2
    assert "outstation.toml would be replaced (of the config: broker, collector, operators" in capsys.readouterr().err
    assert {name: (home / name).read_bytes() for name in before} == before
    assert not (home / "ca.pem").exists()
    documents("join", file, "--dir", home, "--replace")
    text = (home / "outstation.toml").read_text()
    assert STREAM in text
    document = tomllib.loads(text)
    assert document["device"] == {"id": "pi-07", "fleet": "acme", "data_dir": "data"}
    assert document["broker"]["url"] == "mqtts://broker"
    assert (home / "outstation.toml.before-join").read_bytes() == before["outstation.toml"]
    assert documents("join", file, "--dir", home)["replaced"] == []


def test_what_a_metered_device_may_spend_stays_in_its_config(tmp_path: Path) -> None:
    theirs = '[device]\nid = "p"\nfleet = "f"\n[broker]\nurl = "mqtts://b"\n# x = 1\n'
    theirs += '[updates]\nurl = "u"\nmax_rate = 9\n'
    ours = """[device]
id = "a"
fleet = "home"
[broker]
url = "mqtt://127.0.0.1"
max_message_bytes = 5000
[broker.metered]
monthly_budget = "50 MB"
is_example = [true, "x"]
[updates]
url = "v"
window = "02:00-04:00"
max_rate = 1
[streams.s]
x = 1
"""
    merged = tomllib.loads(joining.merge_configs(tmp_path / "outstation.toml", ours, theirs))
    metered = {"monthly_budget": "50 MB", "is_example": [True, "x"]}
    assert merged["broker"] == {"url": "mqtts://b", "max_message_bytes": 5000, "metered": metered}
    assert merged["updates"] == {"url": "u", "max_rate": 9, "window": "02:00-04:00"}


def test_a_join_that_is_killed_at_any_step_can_be_repeated(
    tmp_path: Path, documents: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    while True:
        number += 1
        home = tmp_path / f"pi-{number}"
        former = alone(home, STREAM)
        file = answer(home)
        with killed_at(number, monkeypatch) as steps:
            try:
                documents("join", file, "--dir", home, "--replace")
            except Killed:
                pass
            else:
                break
        documents("join", file, "--dir", home, "--replace")
        assert STREAM in (home / "outstation.toml").read_text()
        assert messages_of(home)[0]["reissued"]["log"] == former
    names = {"outstation.toml.before-join", "ca.pem", "device.crt", "outstation.toml", "store"}
    assert (names <= {*steps}, number) == (True, len(steps) + 1)


def test_a_newer_certificate_for_the_same_key_needs_no_consent(tmp_path: Path, documents: Any, answer: Any) -> None:
    home = tmp_path / "pi"
    alone(home, STREAM)
    documents("join", answer(home), "--dir", home, "--replace")
    before = (home / "device.crt").read_bytes()
    (tmp_path / "acme" / "devices" / "pi-07" / "device.crt").unlink()
    (tmp_path / "pi.tar.gz").unlink()
    assert documents("join", answer(home), "--dir", home)["replaced"] == []
    assert (home / "device.crt").read_bytes() != before
    assert STREAM in (home / "outstation.toml").read_text()


def test_a_running_daemon_is_named_before_anything_is_written(
    tmp_path: Path, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "pi"
    alone(home)
    file = answer(home)
    with open_store(home / "data"):
        assert run("join", file, "--dir", home) == 2
    assert "a daemon uses this store; stop it first" in capsys.readouterr().err
    assert not (home / "ca.pem").exists()


@root_only
def test_what_root_writes_belongs_to_the_user_of_the_data_folder(tmp_path: Path) -> None:
    home, enrolment = tmp_path / "pi", tmp_path / "pi.tar.gz"
    (home / "data").mkdir(parents=True)
    os.chown(home / "data", 65534, 65534)
    key = keys.create()
    keys.generate(home / "device-tls.key", write_public=False)
    (home / "root.txt").write_text("secret")
    (home / "root.txt").chmod(0o600)
    pack(enrolment, {"outstation.toml": CONFIG, "device.key": key.pem, "ca.pem": b"x"})
    plan = joining.plan(enrolment, home, lambda text: False)
    with pytest.MonkeyPatch.context() as patched:
        # This process goes on as root.
        patched.setattr(joining, "become_owner", lambda folder: None)
        joining.apply(plan)
    owners = {path.name: (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in home.iterdir()}
    assert owners["device.key"] == owners["device-tls.key"] == (65534, 0o600)
    assert (owners["ca.pem"], owners["outstation.toml"]) == ((0, 0o640), (0, 0o640))
    # It belongs to root alone, not to the device.
    assert owners["root.txt"] == (0, 0o600)


def test_another_fleets_key_is_replaced_only_on_request(tmp_path: Path, documents: Any) -> None:
    fleet, home, file = tmp_path / "acme", tmp_path / "pi", tmp_path / "pi.tar.gz"
    documents("fleet", "init", fleet, "--broker", "mqtts://broker")
    documents("fleet", "enrol", "pi-07", "--bundle-out", file, "--dir", fleet)
    alone(home)
    former = (home / "device.key").read_bytes()
    assert run("join", file, "--dir", home) == 2
    assert (home / "device.key").read_bytes() == former
    assert documents("join", file, "--dir", home, "--replace")["replaced"] == ["device.key"]
    assert (home / "device.key.before-join").read_bytes() == former
    assert keys.load_public_for(home / "device.key").kid == keys.load_private(home / "device.key").public.kid


def test_an_ambiguous_config_is_refused(tmp_path: Path) -> None:
    theirs = '[device]\nid = "pi-07"\nfleet = "acme"\n[broker]\nurl = "mqtts://b"\n'
    for ours in ('device = { id = "a", fleet = "home" }\n', 'device.id = "a"\ndevice.fleet = "home"\n'):
        with pytest.raises(UsageError, match="cannot be told from the rest"):
            joining.merge_configs(tmp_path / "outstation.toml", ours, theirs)
    ours = '[device]\nid = "a"\nfleet = "home"\n[streams.x]\nnote = """\n[broker]\n"""\n'
    with pytest.raises(UsageError, match="cannot be told from the rest"):
        joining.merge_configs(tmp_path / "outstation.toml", ours, theirs)


# --- enrolment files ---


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


CONFIG = b'[device]\nid = "pi-07"\nfleet = "acme"\ndata_dir = "data"\n'


def test_an_enrolment_file_brings_its_config_and_keys(tmp_path: Path) -> None:
    key = keys.create()
    file = pack(tmp_path / "pi.tar.gz", {"outstation.toml": CONFIG, "device.key": key.pem})
    assert run("join", file, "--dir", tmp_path / "home", "--data-dir", "elsewhere") == 0
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "home").iterdir()}
    assert (modes["device.key"], modes["outstation.toml"]) == ("0o600", "0o640")
    assert keys.load_public_for(tmp_path / "home" / "device.key").kid == key.public.kid
    assert config.load(tmp_path / "home" / "outstation.toml").data_dir == tmp_path / "home" / "elsewhere"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"outstation.toml": CONFIG, "../evil": b"x"}, "'../evil' does not belong"),
        ({"outstation.toml": CONFIG, "notes": b"x"}, "'notes' does not belong"),
        ({"ca.pem": b"x"}, "no outstation.toml in it"),
        ({"outstation.toml": b"x" * (2 << 20)}, "'outstation.toml' does not belong"),
        ({"outstation.toml": b"[device", "device.key": b"x"}, "names no device and fleet"),
        ({"outstation.toml": b"\xff", "device.key": b"x"}, "names no device and fleet"),
        ({"outstation.toml": CONFIG, "device.key": b"x", "device.crt": b"x", "device-tls.key": b"x"}, "cannot be read"),
    ],
)
def test_an_enrolment_file_with_anything_else_in_it_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: dict[str, bytes], message: str
) -> None:
    file = pack(tmp_path / "pi.tar.gz", members)
    assert run("join", file, "--dir", tmp_path / "home") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "evil").exists()


def test_an_enrolment_file_that_is_damaged_or_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pack(tmp_path / "good.tar.gz", {"outstation.toml": CONFIG}).read_bytes()
    file = tmp_path / "pi.tar.gz"
    for content in (None, b"", b"not a tar", good[:-20], good[:40], good[:60] + b"\xff" * 9 + good[69:]):
        if content is not None:
            file.write_bytes(content)
        assert run("join", file, "--dir", tmp_path / "home") == 2
        assert f"{file}: not readable as an enrolment file" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()

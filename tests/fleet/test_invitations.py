"""Enrolment with an invitation: over a real Mosquitto with TLS, and attacks by brokers and by holders of codes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from msgspec.structs import replace

from outstation.device.bootstrap import invited
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import broker_access, broker_control, invitations, join_tokens, pki
from outstation.fleet.enrolment.enrol import device_folder, init_fleet
from outstation.fleet.enrolment.registrar import MAX_REFUSED, InvitationEvent, Registrar
from outstation.foundation import clock
from outstation.foundation.errors import LinkDown, UsageError
from outstation.protocol.documents import enrolment_request
from outstation.protocol.transport import tls
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import invitation, keys
from outstation.protocol.wire.invitation import Invitation
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from scripts.kit.broker_client import NOT_AUTHORIZED, publish_one, subscribe_anyway

pytestmark = pytest.mark.attack("enrolment")

NOW_US = 1_800_000_000_000_000
DAY_US = 86_400_000_000


@dataclass
class Site:
    """A fleet, an invited device and the operator's side; no broker runs."""

    folder: Path
    config: FleetConfig
    store: FleetStore
    invited: Invitation
    device: Path

    def __post_init__(self) -> None:
        self.seconds = 0.0
        self.registrar = Registrar(self.folder, self.config, self.store)
        assert self.registrar.refresh(NOW_US, 0.0) == []

    def request(self, token: str | None = None) -> bytes:
        return invited.make_request(self.device, "acme", "pi-07", token or self.invited.token)[0]

    def ask(self, request: bytes, account: str = "", at_us: int = NOW_US) -> InvitationEvent | None:
        self.seconds += 1.0
        return self.registrar.handle(account or self.invited.account, request, at_us, self.seconds)

    def enrolled(self) -> str | None:
        key = self.store.active_key("pi-07")
        return None if key is None else key.kid


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "acme"
    # No broker listens there: access changes go to the file of its plugin.
    config = init_fleet(folder, "acme", BrokerConfig(url=f"mqtts://localhost:{free_port()}"))
    code, _ = invitations.create(folder, config, "pi-07", NOW_US, DAY_US)
    store = FleetStore(Path(config.fleet.db))
    yield Site(folder, config, store, invitation.parse(code), tmp_path / "pi")
    store.close()


def access_of(folder: Path, name: str) -> list[str] | None:
    document = json.loads((folder / "broker" / broker_control.ACCESS_FILE).read_bytes())
    client = broker_access.find_client(document, name)
    return None if client is None else [role["rolename"] for role in client["roles"]]


def test_the_device_that_asks_with_its_code_is_enrolled_once(site: Site) -> None:
    request = site.request()
    event = site.ask(request)
    assert event is not None
    assert event.reply is not None
    content = invitation.open_answer(site.invited.token, request, event.reply)
    assert content is not None
    with tarfile.open(fileobj=BytesIO(content.removeprefix(invitation.FILES))) as files:
        assert sorted(files.getnames()) == ["ca.pem", "device.crt", "outstation.toml"]
    assert (event.state, event.detail) == ("answered", site.enrolled())
    # The device was killed before it had the answer: the same one comes again.
    again = site.ask(request)
    assert again is not None
    assert again.reply == event.reply
    assert access_of(site.folder, site.invited.account) is not None
    done = site.ask(invitation.build_receipt(site.invited.token, event.reply))
    assert done is not None
    assert done.state == "joined"
    assert access_of(site.folder, site.invited.account) is None
    assert site.ask(request) is None
    assert invitations.list_open(site.folder) == []


def test_a_stolen_code_lets_no_second_key_in(site: Site, tmp_path: Path) -> None:
    assert site.ask(site.request()) is not None
    kid = site.enrolled()
    thief = invited.make_request(tmp_path / "thief", "acme", "pi-07", site.invited.token)[0]
    event = site.ask(thief)
    assert event is not None
    assert (event.state, event.reply) == ("refused", None)
    assert "already let key" in event.detail
    assert site.enrolled() == kid


def test_requests_without_the_secret_are_refused_until_the_invitation_is_withdrawn(site: Site) -> None:
    guess = keys.b64url_encode(bytes(16))
    requests = [site.request(guess), b"{}\n", b"\xff" * 200]
    events = [site.ask(requests[turn % len(requests)]) for turn in range(MAX_REFUSED)]
    assert [event and (event.state, event.reply) for event in events] == [
        *[("refused", None)] * (MAX_REFUSED - 1),
        ("withdrawn", None),
    ]
    assert site.enrolled() is None
    # The honest device comes too late, and nothing is let in that nobody can tell from it.
    assert site.ask(site.request()) is None
    assert access_of(site.folder, site.invited.account) is None


def test_a_request_for_another_device_or_fleet_is_refused(site: Site, tmp_path: Path) -> None:
    for fleet, device in (("acme", "pi-08"), ("other", "pi-07")):
        request = invited.make_request(tmp_path / fleet, fleet, device, site.invited.token)[0]
        event = site.ask(request)
        assert event is not None
        assert (event.state, event.reply) == ("refused", None)
    assert site.store.active_key("pi-08") is None


def test_a_flood_is_dropped_unread(site: Site) -> None:
    assert site.ask(site.request(keys.b64url_encode(bytes(16)))) is not None
    request = site.request()
    for _ in range(1000):
        assert site.registrar.handle(site.invited.account, request, NOW_US, site.seconds) is None
    assert site.registrar.handle(site.invited.account, b"x" * (enrolment_request.MAX_BYTES + 1), NOW_US, 99.0) is None
    assert site.registrar.handle("_join-0000000000000000", site.request(), NOW_US, 99.0) is None
    assert site.registrar.ignored == 1002
    assert site.enrolled() is None


def test_a_flood_is_reported_once_a_minute_and_at_the_end_though_the_clock_steps_back(site: Site) -> None:
    def flood() -> None:
        for _ in range(3):
            site.registrar.handle("_join-0000000000000000", b"x", NOW_US, 0.0)

    flood()
    [report] = site.registrar.refresh(NOW_US, 100.0)
    assert (report.state, report.detail.split()[0]) == ("ignored", "3")
    flood()
    assert site.registrar.refresh(NOW_US + DAY_US // 2, 159.0) == []
    flood()
    [report] = site.registrar.refresh(NOW_US - 1000 * DAY_US, 160.0)
    assert report.detail.split()[0] == "6"
    flood()
    assert site.registrar.refresh(NOW_US, 161.0) == []
    assert [report.detail.split()[0] for report in site.registrar.report_ignored()] == ["3"]
    assert site.registrar.report_ignored() == []


def test_an_expired_code_is_worth_nothing(site: Site) -> None:
    assert site.ask(site.request(), at_us=NOW_US + DAY_US) is None
    assert [event.state for event in site.registrar.refresh(NOW_US + DAY_US, 1.0)] == ["expired", "ignored"]
    assert access_of(site.folder, site.invited.account) is None
    assert site.enrolled() is None


def test_another_invitation_ends_the_one_before(site: Site) -> None:
    invitations.create(site.folder, site.config, "pi-07", NOW_US, DAY_US)
    assert access_of(site.folder, site.invited.account) is None
    assert site.registrar.refresh(NOW_US, 1.0) == []
    assert site.ask(site.request()) is None


def test_a_refused_device_receives_the_reason(site: Site) -> None:
    site.store.enrol("pi-07", keys.create().public, replace=False, now="2026-01-01T00:00:00Z")
    request = site.request()
    event = site.ask(request)
    assert event is not None
    assert event.reply is not None
    content = invitation.open_answer(site.invited.token, request, event.reply)
    assert content is not None
    assert content.startswith(invitation.REFUSAL)


def test_an_answer_that_the_operator_did_not_make_is_none(site: Site) -> None:
    request = site.request()
    event = site.ask(request)
    assert event is not None
    assert event.reply is not None
    token, answer = site.invited.token, event.reply
    assert invitation.open_answer(token, request, answer) is not None
    swapped = [
        answer[:-1] + bytes([answer[-1] ^ 1]),
        answer[: invitation.MAC_BYTES] + invitation.FILES + b"other files",
        # Its own words back, and the answer to another request.
        request,
        invitation.build_receipt(token, answer),
        invitation.seal_answer(keys.b64url_encode(bytes(16)), request, invitation.FILES),
        b"",
    ]
    assert [invitation.open_answer(token, request, forged) for forged in swapped] == [None] * len(swapped)
    assert invitation.open_answer(token, site.request(keys.b64url_encode(bytes(16))), answer) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_code_is_refused_before_anything_is_sent(site: Site, damage: str) -> None:
    code = site.invited.code
    damaged = {"cut": code[:-7], "flipped": code[:40] + ("A" if code[40] != "A" else "B") + code[41:], "other": "abc"}
    with pytest.raises(UsageError, match=r"--code"):
        invited.parse_code(damaged[damage], None)
    wrapped = "\n ".join(code[i : i + 60] for i in range(0, len(code), 60))
    assert invited.parse_code(wrapped, None)[0] == site.invited
    with pytest.raises(UsageError, match="not encrypted"):
        invited.parse_code(code, "mqtt://127.0.0.1:1883")


def test_names_that_are_no_names_are_refused(site: Site) -> None:
    changes = ({"fleet": "a/b"}, {"account": "pi-08"}, {"token": "AA"})
    for wrong in (replace(site.invited, **change) for change in changes):
        with pytest.raises(UsageError, match=r"--code"):
            invited.parse_code(wrong.code, None)


def test_a_fleet_without_access_rules_invites_nobody(tmp_path: Path) -> None:
    config = init_fleet(tmp_path / "home", "home", BrokerConfig(url="mqtt://127.0.0.1:1883"))
    with pytest.raises(UsageError, match="no access rules"):
        invitations.create(tmp_path / "home", config, "pi-07", NOW_US, DAY_US)


def test_the_account_can_only_ask_and_receive_its_answer(tmp_path: Path) -> None:
    folder, port = tmp_path / "acme", free_port()
    config = init_fleet(folder, "acme", BrokerConfig(url=f"mqtts://localhost:{port}"))
    conf = keep_user_root(folder / "broker" / "mosquitto.conf")
    with MosquittoBroker(tmp_path, conf=conf, port=port):
        code, outcome = invitations.create(folder, config, "pi-07", clock.read().wall_us, DAY_US)
        assert outcome.is_in_force
        mine = invitation.parse(code)
        other = invitation.parse(invitations.create(folder, config, "pi-08", clock.read().wall_us, DAY_US)[0])
        with tls.client_files(config.broker, mine.client_files) as broker:
            link = Link(broker, mine.account, subscribe=[mine.answer_topic])
            foreign = ("outstation/acme/pi-07/results/exercise", broker_access.CONTROL_TOPIC)
            for topic in (other.request_topic, mine.answer_topic, *foreign):
                assert publish_one(link, OutgoingMessage(topic, b"x")) == NOT_AUTHORIZED
            assert publish_one(link, OutgoingMessage(mine.request_topic, b"x")) != NOT_AUTHORIZED
            refusals = subscribe_anyway(link, [other.answer_topic, "outstation/acme/#", "#", "outstation-join/#"])
            assert refusals == ["Not authorized"] * 4
            invitations.withdraw(folder, config, invitations.list_open(folder)[0])
            # The broker ends the connection of an account that is gone, and it can do nothing more.
            assert wait_for_end(link)
            link.close()


def wait_for_end(link: Link) -> bool:
    """Return True once the broker has ended the connection."""
    try:
        for _ in range(100):
            link.receive(0.5)
    except LinkDown:
        return True
    return False


def test_whoever_can_publish_answers_cannot_forge_one(tmp_path: Path) -> None:
    folder, port = tmp_path / "acme", free_port()
    config = init_fleet(folder, "acme", BrokerConfig(url=f"mqtts://localhost:{port}"))
    conf = keep_user_root(folder / "broker" / "mosquitto.conf")
    issued = pki.load_authority(folder / "ca.pem", folder / "ca.key").issue_client(broker_access.REGISTRAR, "acme")
    with MosquittoBroker(tmp_path, conf=conf, port=port):
        mine = invitation.parse(invitations.create(folder, config, "pi-07", clock.read().wall_us, DAY_US)[0])
        with tls.client_files(config.broker, {"cert_file": issued.certificate, "tls_key_file": issued.key}) as broker:
            link = Link(broker, broker_access.REGISTRAR, subscribe=[mine.request_topic])
        with contextlib.closing(link):
            forger = threading.Thread(target=forge, args=(link, mine.answer_topic), daemon=True)
            forger.start()
            request = invited.make_request(tmp_path / "pi", "acme", "pi-07", mine.token)[0]
            with pytest.raises(UsageError, match="answers were not made with this code"):
                invited.ask(mine, config.broker, request, 120.0)
            forger.join(timeout=60)


def forge(link: Link, topic: str) -> None:
    """Answer a request without its code, again and again."""
    while not any(isinstance(event, IncomingMessage) for event in link.receive(60.0)):
        pass
    for _ in range(20):
        publish_one(link, OutgoingMessage(topic, bytes(invitation.MAC_BYTES) + invitation.FILES + b"files"))


def run(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "outstation", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_device_joins_over_mqtt_with_the_code_alone(tmp_path: Path) -> None:
    folder, port = tmp_path / "acme", free_port()
    config = init_fleet(folder, "acme", BrokerConfig(url=f"mqtts://localhost:{port}"))
    conf = keep_user_root(folder / "broker" / "mosquitto.conf")
    with MosquittoBroker(tmp_path, conf=conf, port=port):
        operator = run("fleet", "invite", "pi-07", "--dir", str(folder), "--json")
        assert operator.stdout is not None
        try:
            code = json.loads(operator.stdout.readline())["code"]
            device = run("join", "--code", code, "--dir", str(tmp_path / "pi"), "--json")
            out, err = device.communicate(timeout=120)
            assert device.returncode == 0, err
            steps = [json.loads(line) for line in operator.stdout]
            assert operator.wait(timeout=60) == 0
        finally:
            operator.kill()
            operator.communicate()
    assert json.loads(out)["device"] == "pi-07"
    assert [step["state"] for step in steps] == ["answered", "joined"]
    kid = steps[0]["detail"]
    assert f"thumbprint {kid}" in err
    store = FleetStore(Path(config.fleet.db))
    key = store.active_key("pi-07")
    store.close()
    assert key is not None
    assert key.kid == kid
    assert (tmp_path / "pi" / "outstation.toml").exists()
    assert not (device_folder(folder, "pi-07") / "device.key").exists()
    assert (device_folder(folder, "pi-07") / join_tokens.TOKEN_FILE).exists()

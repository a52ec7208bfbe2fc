"""Roll-outs from the command line, through a real broker and collector: what is retained is what a device obeys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.cli.rollout import build_documents
from outstation.fleet.commands import COUNTER_FILE
from outstation.fleet.database.keyring import Keyring
from outstation.foundation.errors import MessageRefused
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import jws, keys
from outstation.protocol.wire.messages import DesiredPayload
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.messages import MODEL, NEW_MODEL, MessageSender, SignedMessage, new_key
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess
from scripts.kit.broker_client import receive_messages
from tests.kit.commands import audit_fleet, call_outstation

ALL = "outstation/acme/_all/desired"
SENDERS = [MessageSender(f"pi-{i}", new_key(100 + i)) for i in range(4)]
FILE = f"""
[rollout]
name = "exercise-1-1"
task = "exercise"
bundle = "exercise"
version = "1.1.0"
digest = "{NEW_MODEL["digest"]}"
[[steps]]
strategy = "shadow"
[[steps]]
strategy = "all"
[promote]
min_hours = 0
min_agreement = 0.9
"""


class Site:
    """A fleet whose devices are senders on a real broker."""

    def __init__(self, folder: Path, fleet: LocalFleet) -> None:
        self.folder, self.fleet = folder, fleet
        self.senders = [MessageSender(entry.device, entry.key) for entry in SENDERS]
        store = fleet.open_store(write=True)
        for sender in self.senders:
            store.enrol(sender.device, sender.key.public, replace=False, now="2026-11-24T22:20:00.000000Z")
        store.close()
        (folder / "rollout.toml").write_text(FILE, encoding="utf-8")
        operator = jws.Signer("operator", keys.load_private(fleet.home / "operator.key").public)
        self.find = {operator.key.kid: operator}.get

    def rollout(self, *arguments: str) -> tuple[int, Any]:
        """Exit code, and the document or what it said on stderr."""
        done = call_outstation("fleet", "rollout", *arguments, "--dir", str(self.fleet.home), "--json")
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    def start(self) -> None:
        code, document = self.rollout("start", str(self.folder / "rollout.toml"))
        assert code == 0, document
        assert document["published"]

    def status(self) -> Any:
        """Return the output of `status --json`."""
        with self.fleet.open_store() as store:
            [document] = build_documents(store, "exercise-1-1")
        return document

    def send(self, *sent: SignedMessage) -> None:
        with Link(self.fleet.config.broker, "devices") as link:
            for message in sent:
                link.send(message.to_outgoing())

    def retained(self, topic: str = ALL, within_s: float = 60.0) -> IncomingMessage | None:
        """Return the desired state that a new device receives."""
        link = Link(self.fleet.config.broker, "device", subscribe=[topic])
        result = receive_messages(link, 1, within_s)
        link.close()
        assert all(entry.retained for entry in result)
        return result[-1] if result else None

    def desired(self) -> DesiredPayload:
        """Return the desired state, verified by the rules of the device."""
        delivery = self.retained()
        assert delivery is not None
        body = verify_message(delivery.topic, delivery.payload, delivery.tokens, self.find).body
        assert isinstance(body, DesiredPayload)
        return body

    def in_shadow(self, agreeing: int = 97) -> None:
        for sender in self.senders:
            self.send(sender.rollout("shadow"), *(sender.shadow(agreeing=agreeing) for _ in range(6)))

    def wait_for_phase(self, phase: str) -> None:
        wait_until(f"all are {phase}", lambda: self.status()["phases"] == {phase: len(self.senders)})


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with LocalFleet(tmp_path, mosquitto=MosquittoBroker(tmp_path)) as fleet, fleet.broker:
        made = Site(tmp_path, fleet)
        fleet.collector.start()
        wait_until("the collector runs", lambda: fleet.collector.log_contains("connected"))
        yield made


def test_follow_takes_a_good_bundle_to_all_devices(site: Site) -> None:
    site.start()
    assert site.retained() is not None
    state = site.desired()
    assert (state.device, state.tasks["exercise"].strategy, state.tasks["exercise"].digest) == (
        *("_all", "shadow", NEW_MODEL["digest"]),
    )
    arguments = ("fleet", "rollout", "follow", "--every", "0.2", "--dir", str(site.fleet.home))
    follow = OutstationProcess(site.folder / "follow.log", *arguments).start()
    try:
        site.in_shadow()
        wait_until("it is promoted", lambda: site.status()["step"] == 2)
        # It is decided first, and then told.
        wait_until("the devices are told", lambda: site.desired().tasks["exercise"].strategy == "all")
        assert site.desired().counter > state.counter
        for sender in site.senders:
            swapped = [sender.shadow(model=NEW_MODEL, other=MODEL) for _ in range(8)]
            site.send(sender.rollout("canary", strategy="all"), *swapped, sender.rollout("active", strategy="all"))
        assert follow.wait(60) == 0, follow.log.read_text(encoding="utf-8")
    finally:
        follow.kill()
    code, [document] = site.rollout("status", "exercise-1-1")
    assert (code, document["state"], document["phases"]) == (0, "finished", {"active": 4})
    code, report = audit_fleet(site.fleet.home)
    assert (code, report["decisions"], report["invalid_decisions"]) == (0, 3, [])
    store = site.fleet.open_store(write=True)
    with store.transaction() as db:
        db.execute("UPDATE decisions SET summary = 'nothing was looked at' WHERE event = 'promoted'")
    store.close()
    code, report = audit_fleet(site.fleet.home)
    assert (code, report["invalid_decisions"][0]["n"]) == (1, 2)


def test_follow_aborts_a_bad_bundle_with_exit_code_1(site: Site) -> None:
    site.start()
    follow = ("fleet", "rollout", "follow", "exercise-1-1", "--every", "0.2", "--dir", str(site.fleet.home))
    program = OutstationProcess(site.folder / "follow.log", *follow).start()
    try:
        site.in_shadow(agreeing=20)
        assert program.wait(60) == 1
    finally:
        program.kill()
    assert program.log_contains(
        "exercise-1-1: Aborted at shadow 100 %, devices return to their previous bundle: agreement 0.2"
    )
    assert site.desired().tasks["exercise"].strategy == "rollback"
    code, output = site.rollout("start", str(site.folder / "rollout.toml"))
    assert (code, "choose another name" in output) == (2, True)


def test_a_manual_promotion_needs_passed_rules_or_a_reason(site: Site) -> None:
    site.start()
    code, document = site.rollout("promote", "exercise-1-1")
    assert (code, document["promoted"]) == (1, False)
    assert document["blockers"][0].startswith("devices with 20 batches: 0 of 3; missing pi-0 (has not reported")
    assert site.status()["not_reported"] == ["pi-0", "pi-1", "pi-2", "pi-3"]
    assert site.rollout("pause", "exercise-1-1")[1]["state"] == "paused"
    assert site.rollout("resume", "exercise-1-1")[1]["state"] == "running"
    site.in_shadow()
    site.wait_for_phase("shadow")
    wait_until("nothing is open", lambda: site.status()["outcome"] == "promote")
    assert site.rollout("promote", "exercise-1-1")[1]["step"] == 2
    code, document = site.rollout("promote", "exercise-1-1", "--force", "the others are on holiday")
    assert (code, document["state"]) == (0, "finished")
    assert "Forced: the others are on holiday." in document["summary"]
    assert audit_fleet(site.fleet.home)[0] == 0


def test_the_next_command_publishes_a_decision_made_offline(site: Site) -> None:
    site.start()
    before = site.desired()
    site.fleet.broker.kill()
    done = call_outstation("fleet", "rollout", "abort", "exercise-1-1", "wrong file", "--dir", str(site.fleet.home))
    assert (done.returncode, "the decision is recorded" in done.stderr) == (1, True)
    site.fleet.broker.start()
    assert site.retained(within_s=0.5) is None
    code, _ = site.rollout("abort", "exercise-1-1", "again")
    assert code == 2
    assert site.retained() is not None
    state = site.desired()
    assert (state.tasks["exercise"].strategy, state.counter > before.counter) == ("rollback", True)


def test_follow_replaces_an_older_desired_state_on_the_broker(site: Site) -> None:
    site.start()
    old = site.retained()
    assert old is not None
    assert site.rollout("promote", "exercise-1-1", "--force", "to see")[0] == 0
    with Link(site.fleet.config.broker, "attacker") as link:
        link.send(OutgoingMessage(ALL, old.payload, (("jws", old.tokens[0]),), retain=True))
    assert site.desired().tasks["exercise"].strategy == "shadow"
    follow = ("fleet", "rollout", "follow", "--every", "0.2", "--dir", str(site.fleet.home))
    program = OutstationProcess(site.folder / "follow.log", *follow).start()
    try:
        wait_until("the newest is retained again", lambda: site.desired().tasks["exercise"].strategy == "all")
        assert program.stop() == 0
    finally:
        program.kill()


def test_desired_state_of_a_device_does_not_verify_on_another_topic(site: Site) -> None:
    site.start()
    delivery = site.retained()
    assert delivery is not None
    with pytest.raises(MessageRefused, match="other topic"):
        verify_message(ALL.replace("_all", "pi-1"), delivery.payload, delivery.tokens, site.find)
    store = site.fleet.open_store()
    with pytest.raises(MessageRefused, match="unknown key"):
        verify_message(delivery.topic, delivery.payload, delivery.tokens, Keyring(store).find)
    store.close()


def test_commands_and_desired_states_share_one_counter(site: Site) -> None:
    site.start()
    assert int((site.fleet.home / COUNTER_FILE).read_text(encoding="ascii")) == site.desired().counter


def test_status_text_names_devices_that_rejected(site: Site) -> None:
    home = str(site.fleet.home)
    assert "No rollout was ever started" in call_outstation("fleet", "rollout", "status", "--dir", home).stdout
    site.start()
    first, second = site.senders[:2]
    site.send(first.rollout("rejected", reason="signature"), second.rollout("rejected", reason="download_failed"))
    wait_until("both were heard of", lambda: site.status()["rejected"] == ["pi-0", "pi-1"])
    assert site.status()["failed"] == ["pi-0"]
    text = call_outstation("fleet", "rollout", "status", "--dir", home).stdout
    assert "exercise-1-1  exercise: exercise 1.1.0 to all  running" in text
    assert "pi-0: rejected (signature): exercise 1.1.0: rejected." in text
    assert "pi-1: rejected (download_failed): exercise 1.1.0: rejected." in text
    assert "not reported: pi-2, pi-3" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("status", "exercise-1-2"), 2, "there is no roll-out 'exercise-1-2'"),
        (("start", "none.toml"), 2, "none.toml: no such file"),
        (("follow",), 2, "no rollout is open"),
        (("abort", "exercise-1-1"), 2, "missing argument 'REASON'"),
    ],
)
def test_wrong_use_is_named(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    fleet = LocalFleet(tmp_path, mosquitto=MosquittoBroker(tmp_path))
    fleet.open_store(write=True).close()
    done = call_outstation("fleet", "rollout", *arguments, "--dir", str(fleet.home))
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr

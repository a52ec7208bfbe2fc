"""Attacks by a device with a valid certificate, at a real Mosquitto with the config that `fleet init` writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from outstation.device import config as device_config
from outstation.fleet import config as fleet_config
from outstation.fleet.collector.collector import Collector
from outstation.fleet.collector.quota import Quota
from outstation.fleet.collector.subscriptions import logged_filters, topic_filters
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import broker_access, broker_control, collectors, pki, revocation
from outstation.fleet.enrolment.broker_access import AccessChange
from outstation.fleet.enrolment.enrol import enrol_on_this_machine, init_fleet
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire.keys import generate, load_private
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from outstation.workbench.testing.messages import MessageSender
from outstation.workbench.testing.patience import TIMEOUT_S, Patience, wait_until
from scripts.kit.broker_client import (
    NOT_AUTHORIZED,
    publish_all,
    publish_one,
    receive_messages,
    subscribe_anyway,
)

pytestmark = pytest.mark.attack("broker")

NOW = "2026-01-01T00:00:00Z"
BASE = "outstation/acme"


class Site:
    """A fleet of a thief, `pi-07`, and an honest device, `pi-08`, with a broker that is not started."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.folder = folder / "acme"
        self.config: FleetConfig = init_fleet(self.folder, "acme", BrokerConfig(url=f"mqtts://localhost:{port}"))
        self.key = load_private(self.folder / "collector.key")
        self.group = self.config.fleet.share_group
        conf = keep_user_root(self.folder / "broker" / "mosquitto.conf")
        self.broker = MosquittoBroker(folder, conf=conf, port=port)
        self.store = FleetStore(Path(self.config.fleet.db))
        self.senders = {name: MessageSender(name) for name in ("pi-07", "pi-08")}
        for name, sender in self.senders.items():
            self.store.enrol(name, sender.key.public, replace=False, now=NOW)
            broker_control.apply(self.folder, self.config, AccessChange(name, "device"))
            self.issue(name)
        assert self.config.ca is not None

    def issue(self, device: str) -> None:
        assert self.config.ca is not None
        authority = pki.load_authority(Path(self.config.ca.cert_file), Path(self.config.ca.key_file))
        issued = authority.issue_client(device, "acme")
        revocation.archive_certificate(self.folder, device, issued.certificate)
        (self.folder.parent / f"{device}.crt").write_bytes(issued.certificate)
        (self.folder.parent / f"{device}.key").write_bytes(issued.key)

    def as_device(self, name: str) -> BrokerConfig:
        home = self.folder.parent
        files = {"cert_file": str(home / f"{name}.crt"), "tls_key_file": str(home / f"{name}.key")}
        return msgspec.structs.replace(self.config.broker, **files)

    @property
    def as_collector(self) -> BrokerConfig:
        return self.config.broker_for(self.config.collector)

    @property
    def as_operator(self) -> BrokerConfig:
        return self.config.broker_for(self.config.operator)

    def revoke(self, device: str) -> revocation.RevocationOutcome:
        return revocation.revoke_device(self.folder, self.config, self.store, device, None, NOW)

    def as_if_elsewhere(self) -> None:
        """Let the broker look like one on another machine: its process is not known here."""
        (self.folder / "broker" / broker_control.PID_FILE).unlink()

    def rules(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / "broker" / "dynamic-security.json").read_text())
        return document


def code(link: Link, topic: str, payload: bytes = b"{}") -> int:
    return publish_one(link, OutgoingMessage(topic, payload))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.store.close()


def test_a_device_that_joins_the_collectors_group_gets_nothing(site: Site) -> None:
    """Messages count as delivered with PUBACK: with `delivery = "broker"` what the thief takes is lost for good."""
    filters = [
        f"$share/{group}/{topic}"
        for group in ("collect", site.group)
        for topic in ("#", f"{BASE}/#", f"{BASE}/+/health", f"{BASE}/pi-07/health")
    ]
    with site.broker:
        collector = Link(site.as_collector, "c", subscribe=topic_filters("acme", group=site.group))
        thief = Link(site.as_device("pi-07"), "x", session_expiry_s=3600)
        refusals = subscribe_anyway(thief, [*filters, "#", f"{BASE}/#", f"{BASE}/pi-08/health", f"{BASE}/+/ack"])
        assert all(refusals), "each subscription is refused"
        honest = Link(site.as_device("pi-08"), "y")
        for _ in range(40):
            assert code(honest, f"{BASE}/pi-08/health") == 0
        thief.drop()
        for _ in range(40):
            assert code(honest, f"{BASE}/pi-08/health") == 0
        assert len(receive_messages(collector, 80)) == 80
        collector.close()
        honest.close()


@pytest.mark.attack("broker", control=True)
def test_with_an_access_list_alone_a_device_takes_messages_of_the_group(site: Site) -> None:
    """Mosquitto checks no SUBSCRIBE against `acl_file`, and drops what the chosen member may not read."""
    conf, acl = site.folder / "broker" / "mosquitto.conf", site.folder / "broker" / "acl"
    acl.write_text(f"pattern write {BASE}/%u/health\nuser collector\ntopic read {BASE}/#\n", encoding="utf-8")
    acl.chmod(0o600)
    lines = [line for line in conf.read_text(encoding="utf-8").splitlines() if not line.startswith("plugin")]
    conf.write_text("\n".join([*lines, f"acl_file {acl}", ""]), encoding="utf-8")
    group = [f"$share/collect/{BASE}/+/health"]
    with site.broker:
        collector = Link(site.as_collector, "c", subscribe=group)
        thief = Link(site.as_device("pi-07"), "x", session_expiry_s=3600)
        assert subscribe_anyway(thief, group) == [""]
        honest = Link(site.as_device("pi-08"), "y")
        assert all(code(honest, f"{BASE}/pi-08/health") < 0x80 for _ in range(20))
        assert len(receive_messages(collector, 20, 2.0)) < 20
        for link in (collector, thief, honest):
            link.close()


def test_the_collectors_group_is_not_in_a_file_that_others_read(site: Site) -> None:
    readable = [path for path in site.folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert site.folder / "ca.pem" in readable
    assert not any(site.group.encode() in path.read_bytes() for path in readable)
    assert site.group in (site.folder / "fleet.toml").read_text(encoding="utf-8")


def test_a_collector_with_a_new_key_is_still_in_the_group_that_the_broker_knows(site: Site) -> None:
    (site.folder / "collector.key").unlink()
    generate(site.folder / "collector.key")
    group = fleet_config.load(site.folder).fleet.share_group
    assert group == site.group
    with site.broker:
        Link(site.as_collector, "c", subscribe=topic_filters("acme", group=group)).close()


def test_a_revoked_device_is_disconnected_at_once_and_its_certificate_is_refused(site: Site) -> None:
    with site.broker:
        thief = Link(site.as_device("pi-07"), "x", session_expiry_s=3600)
        assert site.revoke("pi-07").steps == ()
        with pytest.raises(LinkDown):
            code(thief, f"{BASE}/pi-07/health")
        thief.close()
        for _ in range(2):
            with pytest.raises(LinkDown):
                Link(site.as_device("pi-07"), "x")


def test_a_revoked_device_can_do_nothing_at_a_broker_elsewhere_that_has_not_read_the_list(site: Site) -> None:
    with site.broker:
        site.as_if_elsewhere()
        thief = Link(site.as_device("pi-07"), "x", subscribe=[f"{BASE}/pi-07/cmd"], session_expiry_s=3600)
        honest = Link(site.as_device("pi-08"), "y")
        done = site.revoke("pi-07")
        assert (done.ended, done.failed, done.problem) == (True, False, None)
        with pytest.raises(LinkDown):
            code(thief, f"{BASE}/pi-07/health")
        thief.close()
        again = Link(site.as_device("pi-07"), "x", session_expiry_s=3600)
        assert code(again, f"{BASE}/pi-07/health") == NOT_AUTHORIZED
        filters = [f"{BASE}/pi-07/cmd", f"{BASE}/_all/desired", f"$share/{site.group}/{BASE}/#"]
        assert all(subscribe_anyway(again, filters))
        operator = Link(site.as_operator, "o")
        assert code(operator, f"{BASE}/pi-07/cmd") < 0x80
        assert receive_messages(again, 1, 0.5) == []
        assert code(honest, f"{BASE}/pi-08/health") < 0x80, "others stay connected"
        for link in (again, operator, honest):
            link.close()


def test_a_revoked_device_cannot_resume_its_offline_session(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[bool] = []
    original = Link._on_connect

    def record(link: Link, client: Any, data: Any, flags: Any, *more: Any) -> None:
        present.append(flags.session_present)
        original(link, client, data, flags, *more)

    monkeypatch.setattr(Link, "_on_connect", record)
    with site.broker:
        thief = Link(site.as_device("pi-07"), "x", subscribe=[f"{BASE}/pi-07/cmd"], session_expiry_s=3600)
        thief.drop()
        site.as_if_elsewhere()
        operator = Link(site.as_operator, "o")
        assert code(operator, f"{BASE}/pi-07/cmd") == 0, "the session takes messages"
        site.revoke("pi-07")
        assert code(operator, f"{BASE}/pi-07/cmd") == 0x10, "nobody subscribes to it any more"
        again = Link(site.as_device("pi-07"), "x", session_expiry_s=3600)
        assert not present[-1]
        assert receive_messages(again, 1, 1.0) == []
        again.close()
        operator.close()


def test_a_revoked_device_is_shut_out_after_a_restart_too(site: Site) -> None:
    with site.broker:
        site.revoke("pi-07")
        site.broker.kill()
        site.broker.start()
        for _ in range(2):
            with pytest.raises(LinkDown):
                Link(site.as_device("pi-07"), "x")
        client = broker_access.find_client(site.rules(), "pi-07")
        assert client is not None
        assert (client["disabled"], client["roles"]) == (True, [])


def test_a_revocation_that_reaches_no_broker_is_written_and_reaches_it_with_the_next_change(site: Site) -> None:
    before = site.rules()
    done = site.revoke("pi-07")
    assert not done.ended
    assert "dynamic-security.json has the change" in done.steps[0]
    assert "restart the broker" in done.steps[0]
    assert broker_access.is_in_force(AccessChange("pi-07", "none"), broker_access.find_client(site.rules(), "pi-07"))
    # A broker that runs elsewhere still has the rules of before.
    broker_control.write_access_file(site.folder / "broker" / "dynamic-security.json", before)
    with site.broker:
        assert broker_control.apply(site.folder, site.config, AccessChange("pi-09", "device")) == (True, ())
        clients = site.rules()
        for change in (AccessChange("pi-07", "none"), AccessChange("pi-09", "device")):
            assert broker_access.is_in_force(change, broker_access.find_client(clients, change.client))
    assert not (site.folder / broker_control.PENDING_FILE).exists()


def test_a_change_that_the_broker_refuses_holds_up_no_revocation(site: Site) -> None:
    rules = site.rules()
    rules["roles"] = [role for role in rules["roles"] if role["rolename"] != "collector"]
    for client in rules["clients"]:
        client["roles"] = [role for role in client["roles"] if role["rolename"] != "collector"]
    broker_control.write_access_file(site.folder / "broker" / "dynamic-security.json", rules)
    stuck = AccessChange("collector-b", "collector")
    with site.broker:
        access = broker_control.apply(site.folder, site.config, stuck)
        assert not access.is_in_force
        assert "The broker refused to change the access of collector-b: Role not found" in access.steps[0]
        link = Link(site.as_device("pi-07"), "pi-07")
        done = site.revoke("pi-07")
        assert done.ended
        assert ["refused to change the access of collector-b" in step for step in done.steps] == [True]
        with pytest.raises(LinkDown):
            code(link, f"{BASE}/pi-07/health")
        link.close()
        waiting = msgspec.json.decode((site.folder / broker_control.PENDING_FILE).read_bytes(), type=list[AccessChange])
        assert waiting == [stuck]
    # With the broker stopped, the command writes its file.
    assert not broker_control.apply(site.folder, site.config, stuck).is_in_force
    assert broker_access.is_in_force(stuck, broker_access.find_client(site.rules(), "collector-b"))


def test_a_device_that_is_let_in_again_has_its_access_back(site: Site) -> None:
    with site.broker:
        site.revoke("pi-07")
        assert broker_control.apply(site.folder, site.config, AccessChange("pi-07", "device")) == (True, ())
        site.issue("pi-07")
        link = Link(site.as_device("pi-07"), "x", subscribe=[f"{BASE}/pi-07/cmd"])
        assert code(link, f"{BASE}/pi-07/health") < 0x80
        link.close()


def test_what_is_let_in_while_the_broker_runs_needs_no_restart(site: Site, tmp_path: Path) -> None:
    with site.broker:
        home = enrol_on_this_machine(site.folder, site.config, site.store, "pi-11", tmp_path / "pi-11")
        link = Link(device_config.load(home / "outstation.toml").broker, "pi-11", subscribe=[f"{BASE}/pi-11/ack"])
        assert code(link, f"{BASE}/pi-11/health") < 0x80
        link.close()
        added = collectors.add(site.folder, site.config, "b")
        assert [step[:9] for step in added.steps] == ["Start it:"]
        identity = collectors.resolve_identity(site.config, "b")
        Link(site.config.broker_for(identity), "b", subscribe=topic_filters("acme", group=site.group)).close()


def test_devices_that_were_let_in_while_the_broker_runs_are_revoked_one_after_the_other(site: Site) -> None:
    """Mosquitto 2.0 crashed: a role that it deletes stays in the list of a client that it created as it ran."""
    names = ("pi-11", "pi-12", "pi-13")
    with site.broker:
        for name in names:
            site.store.enrol(name, MessageSender(name).key.public, replace=False, now=NOW)
            assert broker_control.apply(site.folder, site.config, AccessChange(name, "device")).is_in_force
            site.issue(name)
        for name in names:
            link = Link(site.as_device(name), name)
            done = site.revoke(name)
            assert (done.ended, done.steps) == (True, ())
            with pytest.raises(LinkDown):
                link.receive(5)
            link.close()


def test_a_change_that_is_in_force_disconnects_nobody(site: Site) -> None:
    with site.broker:
        link = Link(site.as_device("pi-07"), "x")
        assert broker_control.apply(site.folder, site.config, AccessChange("pi-07", "device")) == (True, ())
        assert code(link, f"{BASE}/pi-07/health") < 0x80
        link.close()


def test_a_device_cannot_change_the_access_rules(site: Site) -> None:
    command = json.dumps({"commands": [{"command": "enableClient", "username": "pi-07"}]}).encode()
    with site.broker:
        for who in (site.as_device("pi-07"), site.as_collector, site.as_operator):
            link = Link(who, "x")
            assert code(link, broker_access.CONTROL_TOPIC, command) == NOT_AUTHORIZED
            assert all(subscribe_anyway(link, ["$CONTROL/#", f"{broker_access.CONTROL_TOPIC}/response"]))
            link.close()


def test_a_certificate_of_the_fleet_without_an_entry_can_do_nothing(site: Site) -> None:
    site.issue("pi-10")
    with site.broker:
        link = Link(site.as_device("pi-10"), "x")
        assert code(link, f"{BASE}/pi-10/health") == NOT_AUTHORIZED
        assert all(subscribe_anyway(link, [f"{BASE}/pi-10/cmd"]))
        link.close()


def collect(site: Site, done: Callable[[Collector], bool], quota: Quota | None = None) -> Collector:
    """Run a collector on the broker until `done`; fail after a minute."""
    collector = Collector("acme", site.as_collector, site.store, site.key, quota=quota)
    link = collector._connect()
    deadline = time.monotonic() + 60
    while not done(collector):
        assert time.monotonic() < deadline
        collector.tick(link, 0.1)
    link.close()
    return collector


def test_a_collector_made_anew_tells_a_silent_device_that_it_has_nothing(site: Site, tmp_path: Path) -> None:
    with site.broker:
        collect(site, lambda collector: True)
        device = Link(site.as_device("pi-07"), "pi-07", subscribe=[f"{BASE}/pi-07/ack"])
        message = site.senders["pi-07"].results()
        publish_one(device, message.to_outgoing())
        collect(site, lambda collector: collector.stored_count == 1 and not collector.acknowledger.has_pending)
        assert [json.loads(ack.payload)["through"] for ack in receive_messages(device, 1)] == [1]
        device.close()
        site.store.close()
        Path(site.config.fleet.db).unlink()
        site.store = FleetStore(Path(site.config.fleet.db))
        for name, sender in site.senders.items():
            site.store.enrol(name, sender.key.public, replace=False, now=NOW)
        device = Link(site.as_device("pi-07"), "pi-07", subscribe=[f"{BASE}/pi-07/ack"])
        patience = Patience(TIMEOUT_S)
        collector = Collector("acme", site.as_collector, site.store, site.key)
        connection = collector._connect()
        while collector._missing_devices != {"pi-08"} or collector.acknowledger.has_pending:
            assert not patience.is_over()
            collector.tick(connection, 0.1)
        acks = [json.loads(ack.payload) for ack in receive_messages(device, 2)]
        # The first one is that of the lost database.
        log = json.loads(message.payload)["log"]
        assert [(ack["through"], ack["missing"], ack["log"]) for ack in acks] == [(1, [], log), (0, [], log)]
        for open_link in (device, connection):
            open_link.close()


def test_a_flood_of_one_device_costs_no_other_its_messages(site: Site) -> None:
    """Messages over quota are not stored and not acknowledged: they stay on the device."""
    quota = Quota(messages_per_s=1.0, bytes_per_s=1_000_000, burst_s=100.0)
    flood = [site.senders["pi-07"].results().to_outgoing() for _ in range(1500)]
    honest = [site.senders["pi-08"].results().to_outgoing() for _ in range(60)]
    with site.broker:
        collect(site, lambda _: True)
        thief, link = Link(site.as_device("pi-07"), "x"), Link(site.as_device("pi-08"), "y")
        for i in range(60):
            publish_all(thief, flood[25 * i : 25 * i + 25])
            publish_all(link, honest[i : i + 1])
        ack = Link(site.as_operator, "o", subscribe=[f"{BASE}/+/ack"])

        def has_all(collector: Collector) -> bool:
            is_stored = counts(site).get("pi-08") == 60 and refused(site).get(("pi-07", "over quota"), 0) > 1000
            return is_stored and not collector.acknowledger.has_pending

        collect(site, has_all, quota)
        assert 100 <= counts(site)["pi-07"] < 300
        through: dict[str, int] = {}

        def is_honest_one_acknowledged() -> bool:
            acks = map(read_json, receive_messages(ack, 99, 0.5))
            through.update({body["device"]: body["through"] for body in acks})
            return through.get("pi-08") == 60

        wait_until("all of the honest device is acknowledged", is_honest_one_acknowledged)
        assert through["pi-07"] <= counts(site)["pi-07"], "nothing is acknowledged that is not stored"
        for other in (thief, link, ack):
            other.close()
    [alert] = [row for row in site.store.alerts() if row["subject"] == "quota"]
    assert (alert["device"], alert["alert"], alert["severity"]) == ("pi-07", "security", "critical")
    assert not [row for row in site.store.alerts() if row["subject"] == "refused"]


def test_junk_in_a_devices_own_name_uses_up_its_quota(site: Site) -> None:
    quota = Quota(messages_per_s=1.0, bytes_per_s=1_000, burst_s=50.0)
    with site.broker:
        collect(site, lambda _: True)
        thief = Link(site.as_device("pi-07"), "x")
        publish_all(thief, [OutgoingMessage(f"{BASE}/pi-07/health", b"x" * 1000)] * 200)
        thief.close()
        collect(site, lambda _: sum(refused(site).values()) == 200, quota)
        assert refused(site)["pi-07", "over quota"] >= 140


def test_a_device_cannot_fill_the_broker_with_retained_topics(site: Site) -> None:
    topics = [f"{BASE}/pi-07/{kind}/{'t' * 200}{i}" for kind in ("results", "alerts") for i in range(400)]
    with site.broker:
        collector = Collector("acme", site.as_collector, site.store, site.key)
        link = collector._connect()
        thief = Link(site.as_device("pi-07"), "x")
        publish_all(thief, [OutgoingMessage(topic, b"x" * 100, retain=True) for topic in topics])
        publish_all(thief, [OutgoingMessage(f"{BASE}/pi-07/state", b"{}", retain=True)])
        deadline = time.monotonic() + 60
        while collector.acknowledger.has_pending or refused(site).get(("pi-07", "retained"), 0) < len(topics):
            assert time.monotonic() < deadline
            collector.tick(link, 0.1)
        # What it retained while no collector ran is deleted when one connects.
        link.close()
        publish_all(thief, [OutgoingMessage(topic, b"x" * 100, retain=True) for topic in topics[:50]])

        def has_deleted(other: Collector) -> bool:
            return refused(site)["pi-07", "retained"] >= len(topics) + 50 and not other.acknowledger.has_pending

        collect(site, has_deleted)
        watcher = Link(site.as_operator, "o", subscribe=[f"{BASE}/pi-07/#"])
        seen = receive_messages(watcher, 1) + receive_messages(watcher, 9, 0.5)
        assert [message.topic for message in seen] == [f"{BASE}/pi-07/state"]
        for other in (thief, watcher):
            other.close()


def retain(site: Site, *topics: str) -> list[int]:
    """Retain a message under topics of the thief while no collector runs; return the broker's reason codes."""
    with Link(site.as_device("pi-07"), "x") as link:
        return [publish_one(link, OutgoingMessage(f"{BASE}/pi-07/{topic}", b"x", retain=True)) for topic in topics]


def test_where_the_fleet_names_its_tasks_a_device_retains_only_topics_of_these(site: Site) -> None:
    invented = [f"{kind}/invented-{i}" for kind in ("results", "drift", "alerts") for i in range(20)]
    own = ("results/exercise", "alerts/exercise", "alerts/_device", "health", "state")
    with site.broker:
        for tasks, allowed in (
            (("exercise",), {*own}),
            (("exercise", "machine"), {*own, "results/machine"}),
            (("machine",), {"results/machine", "alerts/_device", "health", "state"}),
        ):
            change = AccessChange("pi-07", "device", tasks)
            assert broker_control.apply(site.folder, site.config, change) == (True, ())
            topics = (*own, "results/machine", *invented)
            codes = retain(site, *topics)
            taken = {topic for topic, code in zip(topics, codes, strict=True) if code < 0x80}
            assert taken == allowed
            assert broker_access.is_in_force(change, broker_access.find_client(site.rules(), "pi-07"))
        done = site.revoke("pi-07")
        assert done.ended
        client = broker_access.find_client(site.rules(), "pi-07")
        assert client is not None
        assert client["roles"] == []


@pytest.mark.attack("broker", control=True)
def test_where_it_names_none_a_device_retains_any_number_while_no_collector_runs(site: Site) -> None:
    with site.broker:
        assert all(code < 0x80 for code in retain(site, *(f"results/invented-{i}" for i in range(200))))
        watcher = Link(site.as_operator, "o", subscribe=[f"{BASE}/pi-07/results/+"])
        assert len(receive_messages(watcher, 200)) == 200
        watcher.close()


def test_rules_of_a_broker_that_is_not_reached_get_the_new_tasks_too(site: Site) -> None:
    for tasks in (("exercise",), ("exercise", "machine"), ()):
        change = AccessChange("pi-07", "device", tasks)
        broker_control.apply(site.folder, site.config, change)
        rules = site.rules()
        assert broker_access.is_in_force(change, broker_access.find_client(rules, "pi-07"))
        assert sum(role["rolename"].startswith("device-pi-07") for role in rules["roles"]) == 1


def test_collectors_that_share_messages_see_what_is_retained_too(site: Site) -> None:
    with site.broker:
        thief = Link(site.as_device("pi-07"), "x")
        publish_all(thief, [OutgoingMessage(f"{BASE}/pi-07/results/before", b"x", retain=True)])
        shared = logged_filters("acme", group=site.group)
        link = Link(site.as_collector, "c", subscribe=shared, retain_as_published=shared)
        link.request_retained(logged_filters("acme"))
        assert [(message.topic[-6:], message.retained) for message in receive_messages(link, 1)] == [("before", True)]
        publish_all(thief, [OutgoingMessage(f"{BASE}/pi-07/results/later", b"x", retain=True)])
        publish_all(thief, [OutgoingMessage(f"{BASE}/pi-07/results/later", b"x")])
        seen = receive_messages(link, 2) + receive_messages(link, 1, 0.5)
        assert [message.retained for message in seen] == [True, False]
        thief.close()
        link.close()


def counts(site: Site) -> dict[str, int]:
    return {device: site.store.count_messages(device) for device in site.senders}


def refused(site: Site) -> dict[tuple[str, str], int]:
    return {(row["device"], row["reason"]): row["count"] for row in site.store.refusals()}


def read_json(message: IncomingMessage) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(message.payload)
    return document


def test_a_damaged_list_of_pending_changes_loses_no_revocation(site: Site) -> None:
    (site.folder / broker_control.PENDING_FILE).write_bytes(b"[{")
    done = site.revoke("pi-07")
    assert (len(done.keys), done.ended) == (1, False)
    assert "broker-pending.json: changes for the broker cannot be read" in done.steps[0]
    assert (site.folder / broker_control.PENDING_FILE).read_bytes() == b"[{"


def test_rules_that_a_broker_owns_stay_with_its_user(site: Site) -> None:
    path = site.folder / "broker" / broker_control.ACCESS_FILE
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    site.revoke("pi-07")
    status = path.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (12345 if os.geteuid() == 0 else os.geteuid(), 0o600)

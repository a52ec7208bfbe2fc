"""MQTT source: messages are acknowledged after their commit, so that none is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.device import config
from outstation.device.bootstrap.daemon import build_sources
from outstation.device.config.sources import MqttSource
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.group_commit import GroupCommit
from outstation.device.intake.source import SourceContext
from outstation.device.intake.sources import mqtt
from outstation.device.intake.sources.mqtt import MqttSubscriber
from outstation.device.recovery.open import open_store
from outstation.device.store.store import Store
from outstation.foundation.errors import ConfigError, StorageFull
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.capabilities import Capabilities
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.patience import wait_until
from tests.kit.commands import call_outstation
from tests.kit.stations import T0, Station, conf, rows_of

FIELDS = [
    FieldConfig(name="temperature"),
    FieldConfig(name="humidity", optional=True),
    FieldConfig(name="room", type="category"),
]
PATHS = {"temperature": "$.data.temp", "humidity": "$.data['rel. humidity']", "room": "topic[1]"}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(tmp_path, persistence=True) as running:
        yield running


class Site:
    """A device with the source, beside a broker. `publish` returns once the broker has it."""

    def __init__(self, folder: Path, broker: MosquittoBroker, stream: StreamConfig, commit_every_s: float) -> None:
        self.folder, self.broker, self.stream, self.commit_every_s = folder, broker, stream, commit_every_s

    def start(self) -> Station:
        made = conf(self.folder, self.commit_every_s, room=self.stream)

        def source(_: Store) -> list[MqttSubscriber]:
            assert isinstance(self.stream.source, MqttSource)
            return [MqttSubscriber("room", self.stream, self.stream.source, "pi-07-room")]

        return Station(made, sources=source)

    def stored(self) -> list[float]:
        """The first field's values, of a device that does not run."""
        with Store.open_read_only(self.folder) as store:
            result: list[float] = rows_of(store, "room", self.stream).columns[0].tolist()
            return result

    def publish(self, topic: str, *payloads: Any) -> None:
        with Link(BrokerConfig(url=self.broker.url), "sensor") as link:
            for value in payloads:
                payload = value if isinstance(value, bytes) else json.dumps(value).encode()
                link.send(OutgoingMessage(topic, payload))


@pytest.fixture
def site(tmp_path: Path, broker: MosquittoBroker) -> Callable[..., Site]:
    def make(
        fields: list[FieldConfig] = FIELDS, folder: Path = tmp_path, commit_every_s: float = 0.02, **source: Any
    ) -> Site:
        given = {"topic": "site/+/climate", "paths": PATHS, "broker": BrokerConfig(url=broker.url), **source}
        return Site(folder, broker, StreamConfig(fields=fields, source=MqttSource(**given)), commit_every_s)

    return make


def message_body(temperature: Any, **more: Any) -> dict[str, Any]:
    return {"data": {"temp": temperature, "rel. humidity": 40.5}, **more}


def rows(station: Station) -> list[float]:
    """Return the values of the first field."""
    result: list[float] = station.rows("room").columns[0].tolist() if station.store.last_row("room") else []
    return result


def subscribed(station: Station) -> None:
    [source] = station.intake._sources
    assert isinstance(source, MqttSubscriber)
    wait_until("the subscription", lambda: source._link is not None)


def test_values_are_taken_from_where_the_paths_lead_with_their_own_times(site: Callable[..., Site]) -> None:
    here = site(t="$.at")
    with here.start() as station:
        subscribed(station)
        here.publish("site/cellar/climate", message_body(12.5, at=T0))
        here.publish("site/attic/climate", message_body(31, at=T0 + 1), {"data": {"temp": 32}, "at": T0 + 2})
        here.publish("site/attic/other", message_body(99, at=T0))
        wait_until("three rows", lambda: station.store.last_row("room") == 3)
        result = station.rows("room")
        assert result.t.tolist() == [round((T0 + i) * 1e6) for i in range(3)]
        assert rows(station) == [12.5, 31.0, 32.0]
        assert result.columns[1][:2].tolist() == [40.5, 40.5]
        assert result.columns[1][2] != result.columns[1][2]
        names = station.store.categories("room", "room")
        assert [names[code] for code in result.columns[2].tolist()] == ["cellar", "attic", "attic"]
    assert station.failures == []


def test_a_message_may_be_a_plain_number_or_many_rows(site: Callable[..., Site], tmp_path: Path) -> None:
    level = site([FieldConfig(name="level")], topic="tank/level", paths={"level": "$"})
    with level.start() as station:
        subscribed(station)
        level.publish("tank/level", 1.5, [{"level": 9}])
        wait_until("an object in place of a number", lambda: station.store.counters().get("lines rejected") == 1)
        assert rows(station) == [1.5]
    several = site([FieldConfig(name="level")], tmp_path / "several", topic="tank/all", paths={})
    with several.start() as station:
        subscribed(station)
        several.publish("tank/all", [{"level": 1}, {"level": 2}], {"level": 3})
        wait_until("three rows", lambda: station.store.last_row("room") == 3)
        assert rows(station) == [1.0, 2.0, 3.0]


BAD: dict[str, Any] = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "nothing": b"",
    "a value that is no number": message_body("warm"),
    "a value that is missing": {"data": {}},
    "too large a number": message_body(1e300),
    "nested without an end": b"[" * 100_000,
    "no time": message_body(20.0),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_without_a_row_is_refused_counted_and_holds_up_nothing(
    site: Callable[..., Site], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    here = site(t="$.at")
    bad = BAD[name] if name == "no time" or isinstance(BAD[name], bytes) else {**BAD[name], "at": T0}
    with here.start() as station:
        subscribed(station)
        here.publish("site/cellar/climate", bad, message_body(20.5, at=T0))
        wait_until("the row after it", lambda: station.store.last_row("room") == 1)
        assert station.store.counters()["lines rejected"] == 1
        wait_until("the complaint", lambda: "site/cellar/climate: not stored: " in caplog.text)
    with here.start() as station:
        subscribed(station)
        here.publish("site/cellar/climate", message_body(21.5, at=T0))
        wait_until("the next row", lambda: station.store.last_row("room") == 2)
        assert station.store.counters()["lines rejected"] == 1
    assert station.failures == []


def test_messages_published_while_the_device_was_away_are_stored(site: Callable[..., Site]) -> None:
    here = site()
    with here.start() as station:
        subscribed(station)
    here.publish("site/cellar/climate", *[message_body(value) for value in range(50)])
    with here.start() as station:
        wait_until("what the broker kept", lambda: station.store.last_row("room") == 50)
        assert rows(station) == [float(value) for value in range(50)]


def test_a_message_is_confirmed_only_after_its_commit(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, may = site(), threading.Event()
    write = GroupCommit.write

    def waits(self: GroupCommit, shares: Any, now: Any) -> Any:
        may.wait(30)
        return write(self, shares, now)

    confirmed: list[int] = []
    acknowledge = Link.acknowledge

    def note(self: Link, delivery: Any) -> None:
        confirmed.append(len(rows(station)))
        acknowledge(self, delivery)

    with here.start() as station:
        subscribed(station)
        monkeypatch.setattr(GroupCommit, "write", waits)
        monkeypatch.setattr(Link, "acknowledge", note)
        here.publish("site/cellar/climate", message_body(1))
        time.sleep(0.5)
        assert confirmed == []
        may.set()
        wait_until("the confirmation", lambda: confirmed == [1])


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_a_broker_that_waits_for_confirmations_gets_them_before_the_commit_is_due(
    site: Callable[..., Site], tmp_path: Path, limit: int
) -> None:
    with MosquittoBroker(tmp_path / "slow", extra_conf=f"max_inflight_messages {limit}") as slow:
        here = site(commit_every_s=60, broker=BrokerConfig(url=slow.url))
        here.broker = slow
        with here.start() as station:
            subscribed(station)
            for value in range(0, 100, 20):
                bodies = [message_body(value + i) for i in range(19)]
                here.publish("site/cellar/climate", *bodies, message_body("warm"))
            wait_until("all rows", lambda: station.store.last_row("room") == 95)
            assert rows(station) == [float(value) for value in range(100) if value % 20 != 19]
            wait_until("the refused messages", lambda: station.store.counters().get("lines rejected") == 5)
            # A message that follows a confirmation at once looks as if it had waited for it at the broker.
            time.sleep(0.2)
            here.publish("site/cellar/climate", *[message_body(100) for _ in range(limit - 1)])
            time.sleep(0.3)
            # Fewer than its limit: the broker does not wait, and the commit does.
            assert station.store.last_row("room") == 95
        assert station.failures == []


def test_a_limit_that_the_broker_does_not_announce_delays_one_commit(
    site: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capabilities, "from_properties", classmethod(lambda cls, properties: cls()))
    with MosquittoBroker(tmp_path / "slow", extra_conf="max_inflight_messages 5") as slow:
        here = site(commit_every_s=3, broker=BrokerConfig(url=slow.url))
        here.broker = slow
        with here.start() as station:
            subscribed(station)
            began = time.monotonic()
            here.publish("site/cellar/climate", *map(message_body, range(60)))
            wait_until("all rows", lambda: station.store.last_row("room") == 60)
            # Twelve commits, of which one or two wait.
            assert time.monotonic() - began < 18
            assert rows(station) == [float(value) for value in range(60)]


def test_a_rate_above_the_limit_of_a_broker_for_each_commit_fills_no_queue(site: Callable[..., Site]) -> None:
    here = site(commit_every_s=1)
    with here.start() as station:
        subscribed(station)
        with Link(BrokerConfig(url=here.broker.url), "sensor") as link:
            # 1,500 in 3 s: the broker keeps 1,000, and drops the others for ever.
            for first in range(0, 1500, 25):
                for value in range(first, first + 25):
                    payload = json.dumps(message_body(value)).encode()
                    link.send(OutgoingMessage("site/cellar/climate", payload))
                link.receive(0)
                time.sleep(0.05)
        wait_until("all rows", lambda: station.store.last_row("room") == 1500)
        assert rows(station) == [float(value) for value in range(1500)]
    assert station.failures == []


def test_messages_that_arrive_together_are_one_submission_in_their_order(
    site: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, counts = MqttSubscriber._submit_messages, list[int]()

    def note(self: MqttSubscriber, deliveries: Any, *more: Any) -> Any:
        counts.append(len(deliveries))
        return submit(self, deliveries, *more)

    monkeypatch.setattr(MqttSubscriber, "_submit_messages", note)
    with MosquittoBroker(tmp_path / "fast", extra_conf="max_inflight_messages 0") as fast:
        here = site(broker=BrokerConfig(url=fast.url))
        here.broker = fast
        with here.start() as station:
            subscribed(station)
            for first in range(0, 300, 30):
                here.publish("site/cellar/climate", *map(message_body, range(first, first + 30)))
            wait_until("all rows", lambda: station.store.last_row("room") == 300)
            assert rows(station) == [float(value) for value in range(300)]
    assert sum(counts) == 300
    assert len(counts) <= 100


def test_a_repeatedly_killed_broker_loses_and_doubles_no_row(
    site: Callable[..., Site], broker: MosquittoBroker
) -> None:
    here = site()
    with here.start() as station:
        subscribed(station)
        for round_ in range(4):
            values = range(round_ * 30, round_ * 30 + 30)
            here.publish("site/cellar/climate", *[message_body(value) for value in values])
            wait_until("this round", lambda last=values[-1]: last in rows(station))  # type: ignore[misc]
            broker.stop()
            broker.start()
            subscribed(station)
        assert sorted(rows(station)) == [float(value) for value in range(120)]
    assert station.failures == []


def test_what_was_committed_when_the_connection_broke_is_not_taken_twice(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site()
    acknowledge, lost = Link.acknowledge, [True]

    def loses(self: Link, delivery: Any) -> None:
        if lost.pop() if lost else False:
            self.drop()
        acknowledge(self, delivery)

    with here.start() as station:
        subscribed(station)
        monkeypatch.setattr(Link, "acknowledge", loses)
        here.publish("site/cellar/climate", message_body(1))
        wait_until("the lost confirmation", lambda: not lost)
        here.publish("site/cellar/climate", message_body(2))
        wait_until("the row after it", lambda: 2.0 in rows(station))
        assert rows(station) == [1.0, 2.0]


def test_a_full_store_leaves_messages_at_the_broker_until_there_is_room(
    site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, full = site(), [True]
    transaction = Store.transaction

    def fails(self: Store, *args: Any, **more: Any) -> Any:
        if full[0]:
            raise StorageFull("no room")
        return transaction(self, *args, **more)

    with here.start() as station:
        subscribed(station)
        monkeypatch.setattr(Store, "transaction", fails)
        here.publish("site/cellar/climate", message_body(1))
        time.sleep(0.5)
        assert rows(station) == []
        full[0] = False
        wait_until("the row, once there is room", lambda: rows(station) == [1.0])


def test_what_a_stop_commits_is_confirmed_and_does_not_come_again(site: Callable[..., Site]) -> None:
    here = site(commit_every_s=60)
    for value in (1, 2):
        with here.start() as station:
            subscribed(station)
            here.publish("site/cellar/climate", message_body(value))
            wait_until("the row waits", lambda: bool(station.intake.group_commit))
    with here.start() as station:
        subscribed(station)
        here.publish("site/cellar/climate", message_body(3))
        wait_until("the row waits", lambda: bool(station.intake.group_commit))
        assert rows(station) == [1.0, 2.0]
    assert here.stored() == [1.0, 2.0, 3.0]


def test_without_a_broker_the_intake_works_and_ends_in_time(site: Callable[..., Site], broker: MosquittoBroker) -> None:
    here = site()
    broker.kill()
    began = time.monotonic()
    with here.start() as station:
        time.sleep(0.3)
    assert station.failures == []
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("source", "key", "problem"),
    [
        ({"paths": {"temprature": "$"}}, "paths", "did you mean 'temperature'"),
        ({"paths": {"temperature": "$..x"}}, "paths", "is not a path to a value"),
        ({"t": "$[*]"}, "paths", "is not a path to a value"),
        ({"topic": "a/#/b"}, "topic", "no topic filter"),
        ({"topic": "a/b+"}, "topic", "no topic filter"),
        ({"topic": ""}, "topic", "no topic filter"),
        ({"topic": "$share/x/y"}, "topic", "no topic filter"),
    ],
)
def test_a_source_that_cannot_work_is_refused_by_its_key(source: dict[str, Any], key: str, problem: str) -> None:
    given = MqttSource(**{"topic": "a/b", **source})
    stream = StreamConfig(fields=FIELDS, source=given)
    context = SourceContext("outstation.toml", conf(Path("data"), room=stream), "room")
    with pytest.raises(ConfigError, match=problem) as refused:
        mqtt.check(context, given)
    assert f"streams.room.source.{key}" in str(refused.value)


def test_a_remote_broker_must_be_encrypted_and_paths_are_relative(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    text = (
        '[device]\nid = "pi-07"\nfleet = "acme"\n[streams.room]\nfields = [{{ name = "x" }}]\n'
        'source = {{ kind = "mqtt", topic = "a/b", broker = {{ url = "{url}", ca_file = "site.pem" }} }}\n'
    )
    file.write_text(text.format(url="mqtt://10.0.0.1"))
    with pytest.raises(ConfigError, match=r"streams\.room\.source\.broker\.url.*is not encrypted"):
        config.load(file)
    file.write_text(text.format(url="mqtts://10.0.0.1"))
    source = config.load(file).streams["room"].source
    assert isinstance(source, MqttSource)
    assert source.broker.ca_file == str(tmp_path / "site.pem")


def test_the_config_names_the_source_and_check_tells_where_it_listens(tmp_path: Path) -> None:
    file = tmp_path / "outstation.toml"
    file.write_text(
        '[device]\nid = "pi-07"\nfleet = "acme"\n[streams.room]\nfields = [{ name = "x" }]\n'
        'source = { kind = "mqtt", topic = "site/+/climate", paths = { x = "$.data.x" } }\n'
    )
    made = config.load(file)
    store = open_store(tmp_path / "data")
    [source] = build_sources(file, made, store)
    store.close()
    assert isinstance(source, MqttSubscriber)
    findings = json.loads(call_outstation("check", "-c", str(file), "--json").stdout)
    assert {"name": "stream room", "state": "ok", "detail": "site/+/climate at mqtt://127.0.0.1:1883"}.items() <= next(
        item for item in findings if "room" in item["name"]
    ).items()

"""The whole system with real processes: a replay on a real daemon, a real Mosquitto, a real collector."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device.bootstrap import sinks
from outstation.device.bootstrap.daemon import build_daemon
from outstation.device.bootstrap.device import load_config, open_message_log, open_store
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.device.uplink.uplink import Uplink
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.protocol.client import Client, FlushResult
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage, PublishReceipt
from outstation.protocol.wire import jws, keys
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.runs import QuietWindows, expand_integers
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from outstation.workbench.testing.fleet import FIELDS, FLEET, DeviceProcess, LocalFleet, field_tables, last_result_row
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.patience import Patience, wait_until
from outstation.workbench.testing.process import OutstationProcess
from scripts.kit.broker_client import publish_one
from tests.kit.commands import audit_fleet, call_outstation
from tests.kit.marks import root_only

ENDLESS = 10**9
# More rows than the tail of a recording that fills no window.
OPEN_TAIL = 1500
# TimeoutStopSec of deploy/outstation.service.
STOP_LIMIT_S = 20.0
T0 = time.time() - 86_400
NUMBERS = itertools.count()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        yield made


def unexpected(error: Exception) -> None:
    raise error


def last_row(device: DeviceProcess, stream: str = "watch") -> int:
    if device.start_count() == 0:
        # On a busy machine every start so far was killed before it had made its store.
        return 0
    with Store.open_read_only(device.data_dir) as store:
        return store.last_row(stream)


def results(fleet: LocalFleet, device: str) -> list[tuple[Any, ...]]:
    return fleet.query("SELECT row, label, score FROM results WHERE device = ? ORDER BY row", device)


def drift(fleet: LocalFleet, device: str) -> tuple[list[tuple[Any, ...]], Counter[Any]]:
    """Return all drift windows, and the rows in each bin over all: how windows share messages depends on batches."""
    columns = '"window", first, last, n, state, features, windows'
    windows: list[tuple[Any, ...]] = []
    counts = Counter[Any]()
    for index, *window, state, features, columns_of_run in fleet.query(
        f'SELECT {columns} FROM drift_windows WHERE device = ? ORDER BY "window"', device
    ):
        for name, field in json.loads(features).items():
            counts.update({(name, place): n for place, n in enumerate(field["counts"])})
        if columns_of_run is None:
            windows.append((index, *window, state, features if state != "ok" else ""))
        else:
            run = msgspec.json.decode(columns_of_run, type=QuietWindows)
            each = zip(run.expand_rows(), expand_integers(run.n), strict=True)
            windows += [(index + i, first, last, n, state, "") for i, ((first, last), n) in enumerate(each)]
    return windows, counts


def test_random_kills_of_all_processes_lose_no_row_and_change_no_result(fleet: LocalFleet) -> None:
    rows, seed = 30_000, 20261124
    rng = random.Random(seed)
    fleet.broker.start()
    fleet.collector.start()
    calm, killed = (
        fleet.add_device(name)
        .add_replay_stream(rows, 100, seed=seed)
        .add_task("exercise", extra_toml="learn_windows = 20")
        .start()
        for name in ("calm", "killed")
    )
    for turn in range(10):
        # Some deaths are in the middle of starting up.
        time.sleep(rng.uniform(0.1, 1.9))
        killed.kill()
        killed.start()
        if turn % 4 == 1:
            fleet.broker.kill()
            fleet.broker.start()
        elif turn % 4 == 3:
            fleet.collector.kill()
            fleet.collector.start()
    wait_until("all rows on both devices", lambda: last_row(calm) == last_row(killed) == rows)
    wait_until("the same results", lambda: results(fleet, "calm") == results(fleet, "killed") != [])
    assert [device.stop() for device in (calm, killed)] == [0, 0]
    wait_until("both stopped", lambda: fleet.query("SELECT state FROM devices") == [("stopped",)] * 2)
    code, report = audit_fleet(fleet.home)
    assert (code, report["passed"], report["gaps"], report["duplicates"]) == (0, True, [], 0)
    assert [(track["first"], track["last"] > rows - OPEN_TAIL) for track in report["coverage"]] == [(1, True)] * 2
    assert drift(fleet, "calm") == drift(fleet, "killed") != ([], {})
    assert fleet.query("SELECT count(*) FROM refusals") == [(0,)]


def test_without_a_broker_the_daemon_works_and_delivers_once_there_is_one(fleet: LocalFleet) -> None:
    fleet.collector.start()
    device = fleet.add_device("pi-01").add_replay_stream(4000, 100).add_task("exercise").start_and_wait()
    wait_until("all rows without a broker", lambda: last_row(device) == 4000)
    assert device.status()["outbox"]["waiting"] > 0
    assert fleet.last_result_row("pi-01") == 0
    assert device.log_contains("readings and results are kept")
    fleet.broker.start()
    wait_until("the rows at the collector", lambda: fleet.last_result_row("pi-01") > 4000 - OPEN_TAIL)
    wait_until("an empty outbox", lambda: waiting(device) == 0)
    assert audit_fleet(fleet.home)[0] == 0


def with_link(url: str, messages: list[OutgoingMessage]) -> list[int]:
    """Send them as anybody could; the broker's reason codes."""
    with Link(BrokerConfig(url=url), "mallory") as link:
        tokens = [link.send(message) for message in messages]
        codes: dict[int, int] = {}
        while len(codes) < len(tokens):
            codes |= {event.token: event.code for event in link.receive(60.0) if isinstance(event, PublishReceipt)}
        return [codes[token] for token in tokens]


def test_a_forged_acknowledgement_on_the_broker_deletes_nothing(fleet: LocalFleet) -> None:
    fleet.broker.start()
    device = fleet.add_device("pi-01").add_replay_stream(2000, 100).add_task("exercise").start_and_wait()
    wait_until("messages in the outbox", lambda: waiting(device) >= 3)
    wait_until("a connection", lambda: device.log_contains("connected to"))
    store = Store.open_read_only(device.data_dir)
    body = {"v": 1, "kind": "ack", "device": "pi-01", "log": store.log_id, "through": 2, "missing": []}
    payload = json.dumps({**body, "time": "2026-11-24T22:18:01.000000Z"}).encode()
    topic = f"outstation/{FLEET}/pi-01/ack"
    forged = OutgoingMessage(topic, payload, (("jws", jws.sign(new_key(), topic, payload)),))
    assert with_link(fleet.broker.url, [forged, OutgoingMessage(topic, payload)]) == [0, 0]
    wait_until("the refusal in the log", lambda: device.log_contains("acknowledgements refused"))
    assert {message.seq for message in store.unacknowledged_messages(0, 3)} == {1, 2, 3}
    store.close()
    assert device.stop() == 0
    store = Store.open_read_only(device.data_dir)
    assert store.counters()["acknowledgements refused"] == 2
    store.close()


def waiting(device: DeviceProcess) -> int:
    with Store.open_read_only(device.data_dir) as store:
        return store.outbox_size()[0]


def test_sigterm_without_a_broker_stops_in_time_as_well(fleet: LocalFleet) -> None:
    device = fleet.add_device("pi-01").add_replay_stream(ENDLESS, 20).add_task("exercise").start_and_wait()
    patience = Patience(STOP_LIMIT_S)
    assert device.stop() == 0
    assert not patience.is_over()


def test_compressed_messages_are_gzip_on_topics_and_json_at_the_collector(
    fleet: LocalFleet, program: Callable[[str], str]
) -> None:
    fleet.broker.start()
    fleet.collector.start()
    device = fleet.add_device("pi-01").add_replay_stream(ENDLESS, 40).add_task("exercise")
    device.config.write_text(device.config.read_text().replace("[broker]\n", "[broker]\ncompress = true\n"))
    command = [program("mosquitto_sub"), "-p", str(fleet.broker.port), "-V", "5", "-N", "-C", "1", "-W", "60"]
    with subprocess.Popen([*command, "-t", "outstation/+/+/results/+"], stdout=subprocess.PIPE) as seen:
        device.start_and_wait()
        assert seen.stdout is not None
        body = json.loads(gzip.decompress(seen.stdout.read()))
    assert (body["kind"], body["device"]) == ("results", "pi-01")
    wait_until("results at the collector", lambda: fleet.last_result_row("pi-01") > 0)
    device.stop()
    fleet.collector.stop()
    assert audit_fleet(fleet.home)[1]["passed"]


def test_fleet_init_leads_to_verified_messages_over_tls_with_an_acl(tmp_path: Path) -> None:
    home, port = tmp_path / "fleet", free_port()
    done = call_outstation("fleet", "init", str(home), "--name", FLEET, "--broker", f"mqtts://localhost:{port}")
    assert done.returncode == 0, done.stderr
    packed = tmp_path / "pi-01.tar.gz"
    enrolled = call_outstation("fleet", "enrol", "pi-01", "--dir", str(home), "--bundle-out", str(packed), "--json")
    assert enrolled.returncode == 0, enrolled.stderr
    made = call_outstation("join", str(packed), "--dir", str(tmp_path / "device"), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["store_moved"] is False
    device = DeviceProcess(tmp_path / "device", "pi-01").add_replay_stream(4000, 100).add_task("exercise")
    collector = OutstationProcess(tmp_path / "collector.log", "fleet", "collect", "--dir", str(home))
    with MosquittoBroker(tmp_path, conf=keep_user_root(home / "broker" / "mosquitto.conf"), port=port):
        try:
            collector.start()
            checked = call_outstation("check", "-c", str(device.config))
            assert checked.returncode == 0, checked.stdout
            device.start_and_wait()
            wait_until(
                "all rows at the collector", lambda: last_result_row(home / "fleet.db", "pi-01") > 4000 - OPEN_TAIL
            )
            renewed = call_outstation("fleet", "renew", "pi-01", "--dir", str(home), "--json")
            assert [entry["state"] for entry in json.loads(renewed.stdout)] == ["renewed"], renewed.stdout
            assert device.stop() == 0
        finally:
            device.kill()
            collector.kill()
        # By the former certificate in the config's folder: renewed ones do not end it.
        assert as_the_device(device, f"outstation/{FLEET}/pi-02/health") == 0x87
        assert as_the_device(device, f"outstation/{FLEET}/pi-01/ack") == 0x87
    audit = call_outstation("fleet", "audit", "--dir", str(home), "--json")
    report = json.loads(audit.stdout)
    assert (audit.returncode, report["passed"], report["devices"]) == (0, True, 1)
    [listed] = json.loads(call_outstation("fleet", "devices", "--dir", str(home), "--json").stdout)
    assert (listed["device"], listed["state"]) == ("pi-01", "stopped")
    confirmed = home / "devices" / "pi-01" / "device.crt"
    assert (device.home / "data" / "device.crt").read_bytes() == confirmed.read_bytes()


def as_the_device(device: DeviceProcess, topic: str) -> int:
    """The broker's reason code for a message on `topic` from somebody with this device's certificate."""
    _, conf = load_config(str(device.config))
    with Link(conf.broker, "pi-01") as link:
        return publish_one(link, OutgoingMessage(topic, b"{}"))


def test_a_full_store_rejects_producers_until_readings_were_processed(fleet: LocalFleet) -> None:
    fleet.broker.start()
    fleet.collector.start()
    device = fleet.add_device("pi-01").append_config(socket_stream('max_size = "2 MiB"'))
    device.add_task("exercise", schedule="every 2 s").start_and_wait()
    with Client(device.data_dir / "intake.sock", name="rig") as client:
        accepted, reason = fill(client)
        assert "max_size" in reason
        more = eventually_accepted(client)
    wait_until("all that was accepted, used", lambda: fleet.last_result_row("pi-01") > accepted + more - OPEN_TAIL)
    assert last_row(device) == accepted + more
    assert device.is_running
    assert audit_fleet(fleet.home)[0] == 0


@root_only
def test_a_full_disk_turns_producers_away_and_recovers_when_there_is_room(fleet: LocalFleet) -> None:
    fleet.broker.start()
    fleet.collector.start()
    device = fleet.add_device("pi-01").append_config(socket_stream("")).add_task("exercise", schedule="every 1 s")
    device.data_dir.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(device.data_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"no small disk here: {mount.stderr.strip()}")
    try:
        ballast = device.data_dir / "ballast"
        ballast.write_bytes(bytes(4 << 20))
        device.start_and_wait()
        with Client(device.data_dir / "intake.sock", name="rig") as client:
            accepted, reason = fill(client)
            assert "not stored" in reason
            # Health, acknowledgements and batches meet the full disk as well.
            time.sleep(3)
            accepted += fill(client)[0]
            ballast.unlink()
            accepted += eventually_accepted(client)
        assert last_row(device) == accepted
        wait_until("all that was accepted, used", lambda: fleet.last_result_row("pi-01") > accepted - OPEN_TAIL)
        assert device.start_count() == 1
        assert device.stop() == 0
        assert audit_fleet(fleet.home)[0] == 0
    finally:
        device.kill()
        subprocess.run(["umount", str(device.data_dir)], check=True)


def socket_stream(buffer: str) -> str:
    return (
        f'[buffer]\ncommit_every = "50 ms"\n{buffer}\n[streams.watch]\nfields = [{", ".join(field_tables(FIELDS))}]\n'
    )


def send(client: Client) -> FlushResult:
    """2000 rows; an `Answer` with a rejected line where they were not taken."""
    first = next(NUMBERS) * 2000
    noise = np.random.default_rng(first).normal(size=2000).tolist()
    client.send_columns("watch", {"t": [T0 + (first + i) * 0.02 for i in range(2000)], **dict.fromkeys(FIELDS, noise)})
    return client.flush()


def fill(client: Client) -> tuple[int, str]:
    """Send until nothing more is taken: rows accepted, and the reason."""
    accepted = 0
    for _ in range(500):
        answer = send(client)
        accepted += answer.accepted
        if answer.rejected:
            return accepted, answer.rejected[0][1]
    raise AssertionError("the store took everything")


def eventually_accepted(client: Client) -> int:
    answers: list[FlushResult] = []

    def taken() -> bool:
        answers.append(send(client))
        return answers[-1].accepted > 0

    wait_until("rows are taken again", taken)
    return answers[-1].accepted


def test_two_tasks_on_one_stream_process_it_independently(fleet: LocalFleet) -> None:
    """In virtual time: a real daemon, its loop turned by hand."""
    device = fleet.add_device("pi-01").append_config(socket_stream(""))
    device.add_task("nightly", schedule="30 3 * * *").add_task("often", schedule="when 500 rows")
    file, conf = load_config(str(device.config))
    with open_store(conf) as store:
        daemon = build_daemon(file, conf, store)
        start = clock.parse_rfc3339("2026-11-24T23:00:00Z")
        cursors = []
        for minute in range(0, 360, 10):
            now = ClockReading(start + minute * 60_000_000, 1000.0 + minute * 60, "synced")
            rows = np.random.default_rng(minute).normal(size=(6, 200)).astype(np.float32)
            with store.transaction() as tx:
                tx.append("watch", Rows(now.wall_us + np.arange(200) * 20_000, tuple(rows)), "synced")
            daemon.tick(now)
            cursors.append((store.last_row("watch"), store.cursor("often") or 0, store.cursor("nightly") or 0))
        nights = [i for i in range(1, len(cursors)) if cursors[i][2] != cursors[i - 1][2]]
        assert [cursors[i] for i in nights] == [(5600, 5400, 5600)]
        assert all(last - often < 700 for last, often, _ in cursors)
        assert {often for _, often, _ in cursors} == set(range(0, 7201, 600))
        fleet.broker.start()
        fleet.collector.start()
        wait_until("the collector", lambda: fleet.collector.log_contains("connected"))
        public = keys.parse_public_key(conf.collector.key)
        message_log = open_message_log(file, conf, store)
        uplink = Uplink(
            conf,
            store,
            message_log,
            {public.kid: Signer("collector", public)}.get,
            clock.read,
            unexpected,
            sinks.sink_opener(file, conf),
        )
        uplink.start()
        wait_until("an empty outbox", lambda: store.outbox_size()[0] == 0)
        uplink.stop()
    code, report = audit_fleet(fleet.home)
    assert (code, report["passed"]) == (0, True)
    assert {track["task"]: (track["first"], track["last"]) for track in report["coverage"]} == {
        "nightly": (1, 5600),
        "often": (1, 7200),
    }

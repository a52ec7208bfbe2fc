"""Attack: a device with a valid key signs values that no honest device sends, in each member of each kind.

What the collector accepts must not end any command of the fleet in a traceback, and neither must what a database holds
already, which an older collector or the operator may have written.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from outstation.evidence.gather.deployments import ActivationCollector, parse_agent_version
from outstation.fleet.cli.group import fleet as commands
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.polled_alerts import FleetWideAlerts
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.jws import digest, encode
from outstation.protocol.wire.messages import HealthPayload
from outstation.protocol.wire.verification import VerifiedMessage
from outstation.workbench.testing.messages import MessageSender, new_key
from tests.kit.evidences import Story, at, build_story
from tests.kit.fleet_databases import DATABASES, copy_database

pytestmark = pytest.mark.attack("values")

HOSTILE: list[Any] = [
    "2026-02-30T25:61:61Z",
    "2026-02-29T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999999Z",
    "10000-01-01T00:00:00Z",
    "2026-12-31T23:59:60Z",
    2**63 - 1,
    -(2**63),
    2**64,
    10**300,
    1.7e308,
    -1.7e308,
    5e-324,
    -1,
    0,
    True,
    None,
    "NaN",
    "",
    "x" * 250,
    "x" * 20_000,
    "\x1b[2J\u202e\u2028\x7f\U0010ffff",
    "a\0b",
    [],
    {},
    [[1, 2], [3]],
    {"a": {"b": None}},
    json.loads("[" * 50 + "]" * 50),
]
# Written as they are: no encoder writes them.
RAW = [b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"9" * 5000, b"[" * 5000, b"01", b'"\xff"']
COMMANDS = (
    ["devices"],
    ["alerts", "--all"],
    ["gaps"],
    ["drift"],
    ["drift", "--plot", "PLOT"],
    ["audit"],
    ["rollout", "status"],
)


def find_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each member, also inside others; of an array, of the first two entries."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from find_paths(item, (*path, key))


def replace(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a copy of `body` with the member at `path` replaced; the others are shared."""
    changed = copy.copy(body)
    place: Any = changed
    for key in path[:-1]:
        place[key] = copy.copy(place[key])
        place = place[key]
    place[path[-1]] = value
    return changed


def collect_samples(store: FleetStore) -> list[tuple[str, dict[str, Any]]]:
    """Return (topic, body) of the newest message of each kind and event."""
    samples: dict[Any, tuple[str, dict[str, Any]]] = {}
    for *_, kind, topic, payload, _, _ in store.evidence():
        body = json.loads(payload)
        samples[kind, body.get("event"), body.get("state")] = topic, body
    sender = MessageSender()
    anchor = {"boot": 1, "segment": 1, "boot_us": 5, "wall_us": 1_764_022_680_000_000, "quality": "synced"}
    before = {"boot": 0, "boot_us": 4, "error_us": 3, "step_us": 2}
    for sent in (
        sender.results(clocks=[[1, 1, 1, 0]], incomplete=1),
        sender.quiet_run(),
        sender.evicted((1, 2)),
        sender.append("audit", event="clock", summary="", evidence={**anchor, "before": before, "error_us": 5}),
        sender.append("audit", event="evicted", evidence={"stream": "watch", "rows": [[1, 2]], "tasks": ["exercise"]}),
        sender.append("audit", event="new log", evidence={"old": sender.log, "through": 3, "reissued": 0}),
        sender.append("quality", task="exercise", metrics=[{"metric": "a", "value": 1, "low": 0, "high": 1, "n": 3}]),
        sender.append("health", streams={"watch": {"rows": 1}}, tasks={}, wall_clock={"boot_us": 3}),
    ):
        body = json.loads(sent.payload)
        samples[body["kind"], sent.seq] = sent.topic, body
    return list(samples.values())


class HostileDevice:
    """A device with a valid key and one log, which signs whatever it is given."""

    def __init__(self, name: str) -> None:
        self.sender = MessageSender(name, new_key(66), "5f0c2f6e-1a54-4d0b-9a53-000000000066")

    def sign(self, topic: str, body: dict[str, Any], path: tuple[Any, ...], value: Any) -> VerifiedMessage:
        """Return the next message with one member replaced. Raises MessageRefused."""
        sender = self.sender
        own = {"device": sender.device, "log": sender.log, "seq": sender.seq + 1, "prev": sender.prev}
        raw = isinstance(value, bytes)
        payload = encode(replace({**body, **own}, path, "\ue000" if raw else value))
        if raw:
            payload = payload.replace('"\ue000"'.encode(), value)
        parts = topic.split("/")
        parts[2] = sender.device
        message = sender.verify(sender.sign_payload("/".join(parts), payload))
        if (message.body.log, message.body.seq) == (sender.log, sender.seq + 1):  # type: ignore[union-attr]
            sender.seq, sender.prev = sender.seq + 1, digest(payload)
        return message


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = build_story(tmp_path_factory.mktemp("story") / "acme")
    yield story
    story.store.close()


@pytest.fixture(scope="module")
def arrivals(story: Story) -> list[Arrival]:
    """Return every hostile message that verifies."""
    device, accepted = HostileDevice("pi-66"), []
    for topic, body in collect_samples(story.store):
        for path in find_paths(body):
            for value in [*HOSTILE, *RAW]:
                with contextlib.suppress(MessageRefused):
                    accepted.append(Arrival(device.sign(topic, body, path, value)))
    assert len(accepted) > 1000
    return accepted


@pytest.fixture(scope="module", params=DATABASES)
def hostile(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, arrivals: list[Arrival]
) -> Iterator[Story]:
    """Yield a fleet that collected every hostile message that verifies."""
    story = build_story(tmp_path_factory.mktemp("story") / "acme")
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_server").create_database()
        store = FleetStore(url)
        copy_database(story.store, store)
        story.store.close()
        story.store = store
        config = story.home / "fleet.toml"
        config.write_text(config.read_text().replace('"fleet.db"', f'"{url}"'), encoding="utf-8")
    story.store.enrol("pi-66", HostileDevice("pi-66").sender.key.public, replace=False, now=at(0))
    ingest(story.store, arrivals)
    yield story
    story.store.close()


def ingest(store: FleetStore, arrivals: list[Arrival]) -> None:
    """Store all but those that cannot be stored, which are looked for by halves."""
    try:
        store.ingest(arrivals, [], at(150))
    except MessageRefused:
        middle = len(arrivals) // 2
        for part in (arrivals[:middle], arrivals[middle:]) if middle else ():
            ingest(store, part)


def run(story: Story, *arguments: str) -> Result:
    """Run a command; only a clean exit is allowed."""
    result = CliRunner().invoke(commands, [*arguments, "--dir", str(story.home)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_hostile_member_ends_a_command(
    hostile: Story, tmp_path: Path, request: pytest.FixtureRequest, command: list[str]
) -> None:
    arguments = [str(tmp_path / "drift.svg") if item == "PLOT" else item for item in command]
    # Each reads both databases; what it writes does not depend on them.
    form = ["--json"] if request.node.callspec.params["hostile"] == "postgresql" else []
    assert run(hostile, *arguments, *form).exit_code in (0, 1)


def test_no_hostile_member_keeps_evidence_from_being_made_and_verified(hostile: Story, tmp_path: Path) -> None:
    out = tmp_path / "evidence"
    made = run(hostile, "evidence", "--out", str(out))
    assert made.exit_code in (0, 1), made.output
    key = hostile.operator.public.text
    checked = CliRunner().invoke(commands, ["evidence", "verify", str(out), "--operator", key])
    assert checked.exit_code in (0, 1), checked.output
    assert "audit.json" in checked.output or checked.exit_code == 0


def test_no_hostile_member_stops_the_alerts_of_fleet_wide_drift(hostile: Story) -> None:
    now = ClockReading(clock.parse_rfc3339(at(150)), 1e6, "synced", 10)
    assert isinstance(FleetWideAlerts(hostile.store).poll(now), list)


def test_a_time_that_no_calendar_has_is_refused_in_every_kind(story: Story) -> None:
    device, checked = HostileDevice("pi-66"), 0
    for topic, body in collect_samples(story.store):
        for path in find_paths(body):
            if path[-1] not in ("time", "from", "to") or len(path) > 2:
                continue
            for text in HOSTILE[:3] + HOSTILE[5:7]:
                if not isinstance(body[path[0]], dict) or isinstance(body[path[0]].get(path[-1]), str):
                    with pytest.raises(MessageRefused, match="malformed payload"):
                        device.sign(topic, body, path, text)
                    checked += 1
    assert checked > 50


@pytest.mark.attack("values", control=True)
@pytest.mark.parametrize("time", HOSTILE[:3])
def test_without_the_check_on_receipt_a_reader_of_the_time_ends_in_an_error(time: str) -> None:
    sent = MessageSender().alert(time=time)
    with pytest.raises(ValueError, match=r"time|month|year|day"):
        clock.parse_rfc3339(json.loads(sent.payload)["time"])


def test_hostile_health_is_read_without_a_traceback(story: Story) -> None:
    device, read = HostileDevice("pi-66"), 0
    for topic, body in collect_samples(story.store):
        if body["kind"] != "health":
            continue
        for path in find_paths(body):
            for value in HOSTILE:
                try:
                    message = device.sign(topic, body, path, value)
                except MessageRefused:
                    continue
                assert isinstance(message.body, HealthPayload)
                tasks = ActivationCollector({}).build_running_tasks(message.body, parse_agent_version(message.payload))
                assert isinstance(tasks, list)
                read += 1
    assert read > 100

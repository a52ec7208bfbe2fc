"""Space management: the least important data goes first, and everything evicted is declared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from outstation.device import config
from outstation.device.batch_parts.joined_streams import JoinedPosition
from outstation.device.capacity import space
from outstation.device.capacity.eviction import DAMAGED, NO_ROOM, declare_messages, quarantine_damaged
from outstation.device.capacity.space import SpaceManager
from outstation.device.config.config import Config
from outstation.device.recovery.open import open_store
from outstation.device.store import predictions, retention, task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.predictions import StoredPredictions
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.rows import Rows
from outstation.device.store.store import INTAKE_SHARE, Store
from outstation.foundation import ranges
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire import jws
from outstation.protocol.wire.messages import AlertPayload, AuditPayload, LoggedPayload
from outstation.protocol.wire.verification import VerifiedMessage, verify_message
from outstation.workbench.testing.messages import new_key
from tests.kit.stations import WATCH

KEY = new_key(1)
WALL_US = 1_764_022_680_000_000
SIZE = 2 << 20


@dataclass
class Device:
    """A store of `size` bytes with one task, and what keeps it in bounds."""

    folder: Path
    size: int = SIZE
    max_bytes: int = 120_000
    when_full: Any = "evict"
    boot_s: float = 1000.0
    early: list[float] = field(default_factory=list)
    stuck: set[str] = field(default_factory=set)
    crowded: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.conf = Config(
            device=config.DeviceConfig(id="pi-07", fleet="acme", data_dir=str(self.folder)),
            buffer=config.BufferConfig(max_size=config.Size(self.size), when_full=self.when_full),
            streams={"watch": WATCH},
            tasks={"exercise": config.TaskConfig(stream="watch", bundle="exercise")},
        )
        self.store = open_store(self.folder, max_size=self.size)
        self.store.declare_streams(self.conf.streams)
        self.author = MessageLog("acme", "pi-07", KEY, self.store.log_id, 1, self.max_bytes)
        self.space = SpaceManager(
            self.conf, self.store, self.author, self._early, lambda: self.stuck, lambda: self.crowded
        )

    def _early(self, now: ClockReading) -> None:
        self.early.append(now.boot_s)

    def now(self) -> ClockReading:
        return ClockReading(WALL_US + round(self.boot_s * 1e6), self.boot_s, "synced")

    def feed(self, rows: int, chunk: int = 500) -> None:
        rng = np.random.default_rng(rows)
        for start in range(0, rows, chunk):
            n = min(chunk, rows - start)
            columns = tuple(rng.normal(size=n).astype("<f4") for _ in WATCH.fields)
            with self.store.transaction() as tx:
                tx.append("watch", Rows(self.now().wall_us + np.arange(n) * 20_000, columns), "synced")

    def write(self, kind: str, n: int, size: int = 2000) -> None:
        body: dict[str, Any] = {"health": {"pad": ""}, "audit": {"event": "x"}}.get(kind, {})
        body = dict(body)
        if kind == "alerts":
            body = {"alert": "drift", "subject": "s", "state": "raised", "severity": "info", "summary": "", "id": "i"}
        body["pad"] = "x" * size
        for start in range(0, n, 50):
            with self.store.transaction() as tx:
                for _ in range(min(50, n - start)):
                    self.author.append(
                        tx,
                        kind,
                        "exercise" if kind in ("alerts", "results", "drift", "shadow") else None,
                        body,
                        self.now(),
                    )

    def fill(self, kind: str = "health", share: float = 0.9) -> None:
        while self.store.used_bytes() < share * self.store.limit_bytes():
            self.write(kind, 8)

    def use(self, through: int) -> None:
        with self.store.transaction() as tx:
            tx.advance_cursor("exercise", 1, through)

    def acknowledge(self, through: int) -> None:
        with self.store.transaction() as tx:
            tx.outbox.set_acknowledged(AcknowledgedSeqs(through))

    def turns(self, seconds: float = 120.0, every_s: float = 10.0) -> None:
        end = self.boot_s + seconds
        while self.boot_s < end:
            while self.space.tick(self.now()):
                pass
            self.boot_s += every_s

    def stored_seqs(self) -> list[int]:
        return [int(row[0]) for row in self.store._fetch_all("SELECT seq FROM outbox ORDER BY seq")]

    def messages(self) -> list[VerifiedMessage]:
        signer = jws.Signer("pi-07", KEY.public)
        result = self.store._fetch_all("SELECT topic, payload, jws FROM outbox ORDER BY seq")
        return [
            verify_message(t, p, [j], lambda _: signer) for t, p, j in result if t.split("/")[3] in ("audit", "alerts")
        ]

    def bodies(self, kind: type[LoggedPayload]) -> list[Any]:
        return [message.body for message in self.messages() if isinstance(message.body, kind)]

    def evictions(self) -> list[AuditPayload]:
        return [body for body in self.bodies(AuditPayload) if body.event == "evicted"]

    def declared(self) -> set[int]:
        pairs = [pair for body in self.evictions() for pair in body.evidence.get("seq", [])]
        return {seq for first, last in pairs for seq in range(first, last + 1)}

    def deleted_seqs(self) -> set[int]:
        last = int(self.store.get_meta("seq", "0"))
        return set(range(1, last + 1)) - set(self.stored_seqs())


Make = Callable[..., Device]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Device] = []

    def new(**options: Any) -> Device:
        made.append(Device(tmp_path / str(len(made)), **options))
        return made[-1]

    yield new
    for device in made:
        device.store.close()


def share(device: Device) -> float:
    return device.store.used_bytes() / device.store.limit_bytes()


def test_nothing_goes_before_space_is_short(make: Make) -> None:
    device = make()
    device.fill(share=0.8)
    before = device.stored_seqs()
    device.turns(600)
    assert device.stored_seqs() == before
    assert device.early == []


def test_acknowledged_messages_go_first_and_are_not_declared(make: Make) -> None:
    device = make()
    device.feed(5000)
    device.fill()
    last = int(device.store.get_meta("seq", "0"))
    device.acknowledge(last - 50)
    device.turns(10)
    assert share(device) <= space.EVICTION_STOP
    assert device.deleted_seqs() <= set(range(1, last - 49))
    assert device.evictions() == []
    assert device.store.first_row("watch") == 1
    assert device.early == []
    assert device.store.backlog().messages == 50


@pytest.mark.parametrize("has_other", [True, False])
def test_the_newest_delivered_results_go_after_everything_else_that_was_delivered(make: Make, has_other: bool) -> None:
    device = make()
    device.write("results", 30, size=1000)
    if has_other:
        device.fill()
        device.acknowledge(int(device.store.get_meta("seq", "0")))
    else:
        device.acknowledge(30)
        device.fill()
    newest = set(range(11, 31))
    device.turns(10)
    if has_other:
        assert share(device) <= space.EVICTION_STOP
        assert device.deleted_seqs() >= set(range(1, 11))
        assert newest <= set(device.stored_seqs())
    else:
        assert not newest & set(device.stored_seqs())
        assert device.store.backlog().messages == int(device.store.get_meta("seq", "0")) - 30
    assert device.evictions() == []


def test_used_readings_go_next_and_early_deletions_are_declared(make: Make) -> None:
    device = make()
    device.feed(60_000)
    device.use(50_000)
    device.fill()
    device.turns(10)
    assert share(device) <= space.EVICTION_STOP
    first = device.store.first_row("watch")
    assert 1 < first <= 50_001
    (body,) = device.evictions()
    assert body.evidence["rows"] == [[1, first - 1]]
    assert (body.evidence["used"], body.evidence["stream"], body.evidence["reason"]) == (True, "watch", NO_ROOM)
    assert device.declared() == device.deleted_seqs()
    assert device.bodies(AlertPayload) == []


def test_readings_that_a_joined_input_still_needs_stay(make: Make) -> None:
    device = make()
    inputs = {name: config.JoinedStreamConfig(stream="watch") for name in ("far", "near")}
    device.conf.tasks["exercise"] = config.TaskConfig(stream="other", bundle="exercise", inputs=inputs)
    device.feed(60_000)
    near, far = JoinedPosition("watch", "b", 50_001, 0), JoinedPosition("watch", "b", 2001, 0)
    with device.store.transaction() as tx:
        tx.save_state("exercise", task_keys.JOINED_ROWS, msgspec.json.encode({"far": far, "near": near}))
    device.fill()
    device.turns(10)
    assert [body.evidence["rows"] for body in device.evictions()] == [[[1, 2000]]]
    assert device.store.first_row("watch") == 2001


def test_waiting_rows_are_run_early_before_any_is_evicted(make: Make) -> None:
    device = make()
    device.feed(60_000)
    device.fill()
    device.turns(50)
    assert device.early == [1000.0]
    assert device.store.first_row("watch") == 1
    assert device.evictions() == []
    device.turns(100)
    assert len(device.early) >= 2


def test_evicted_unused_readings_are_declared_and_the_cursor_moves(make: Make) -> None:
    device = make(stuck={"exercise"})
    device.feed(20_000)
    device.use(1234)
    device.feed(50_000)
    device.fill()
    device.turns(30)
    assert share(device) <= space.EVICTION_STOP
    first = device.store.first_row("watch")
    assert device.store.cursor("exercise") == first - 1
    unused = [body for body in device.evictions() if not body.evidence["used"]]
    assert [body.evidence["rows"] for body in unused] == [[[1235, first - 1]]]
    assert unused[0].evidence["tasks"] == ["exercise"]
    assert "not used by exercise" in unused[0].summary
    assert device.declared() == device.deleted_seqs()
    assert device.early
    batch = device.store.read_rows("watch", WATCH.fields, first - 1, 10)
    assert batch is not None
    assert (batch.first, batch.loss_reason) == (first, None)


def test_a_task_that_never_ran_begins_behind_what_was_given_up(make: Make) -> None:
    device = make(stuck={"exercise"})
    device.feed(80_000)
    device.fill()
    device.turns(30)
    first = device.store.first_row("watch")
    assert first > 1
    assert device.store.cursor("exercise") == first - 1
    began = device.store.first_consumed("exercise")
    assert began is not None
    assert 1 < began <= first


def test_messages_go_only_while_nothing_is_acknowledged(make: Make) -> None:
    device = make()
    device.fill()
    for _ in range(8):
        device.turns(20)
        device.acknowledge(device.store.acknowledged().through + 1)
    assert len(device.deleted_seqs()) <= 8
    assert device.evictions() == []
    device.turns(120)
    assert device.declared() == device.deleted_seqs() - set(range(1, 9))
    assert share(device) <= space.EVICTION_STOP


def test_the_least_important_kind_goes_first_and_alerts_last(make: Make) -> None:
    device = make()
    for _ in range(10):
        device.write("alerts", 3)
        device.write("audit", 3)
        device.write("health", 6)
        device.write("drift", 3)
    device.fill("health")
    kinds = dict(device.store._fetch_all("SELECT seq, topic FROM outbox"))
    device.turns(200)
    removed = {kinds[seq].split("/")[3] for seq in device.deleted_seqs() if seq in kinds}
    assert removed == {"health"}
    assert device.declared() == device.deleted_seqs()
    for _ in range(4):
        device.fill("alerts")
        device.turns(200)
    kinds |= dict(device.store._fetch_all("SELECT seq, topic FROM outbox"))
    left = {topic.split("/")[3] for _, topic in device.store._fetch_all("SELECT seq, topic FROM outbox")}
    assert left == {"alerts", "audit"}
    assert sum(topic.endswith("/audit") for _, topic in device.store._fetch_all("SELECT seq, topic FROM outbox")) >= 30
    assert device.declared() == device.deleted_seqs()


def test_what_compares_bundles_goes_before_any_result(make: Make) -> None:
    device = make()
    device.write("results", 40)
    device.fill("shadow", 0.5)
    shadows = set(range(41, 1 + int(device.store.get_meta("seq", "0"))))
    device.fill("results")
    device.turns(100)
    assert device.deleted_seqs()
    assert device.deleted_seqs() <= shadows
    assert device.declared() == device.deleted_seqs()


def test_weeks_of_evictions_make_one_message_and_one_alert(make: Make) -> None:
    device = make()
    for _ in range(15):
        device.fill()
        device.turns(130)
    assert len(device.deleted_seqs()) > 1000
    assert device.declared() == device.deleted_seqs()
    assert len(device.evictions()) == 1
    assert [alert.state for alert in device.bodies(AlertPayload)] == ["raised"]
    assert device.store.backlog().messages == len(device.stored_seqs())


def test_the_storage_alert_clears_after_delivery_and_can_be_raised_again(make: Make) -> None:
    device = make()
    device.fill()
    device.turns(200)
    device.acknowledge(int(device.store.get_meta("seq", "0")))
    device.turns(1000)
    for _ in range(5):
        device.fill()
        device.turns(200)
    alerts = [alert for alert in device.bodies(AlertPayload) if alert.alert == "storage"]
    assert [alert.state for alert in alerts][-2:] == ["cleared", "raised"]
    assert set(alerts[-1].evidence) == {"bytes", "max", "hours"}


@pytest.mark.parametrize("max_bytes", [2_000, 120_000])
def test_a_declaration_never_exceeds_what_the_broker_takes(make: Make, max_bytes: int) -> None:
    device = make(max_bytes=max_bytes)
    for _ in range(120):
        device.write("health", 2, size=200)
        device.write("alerts", 1, size=200)
    device.fill("health")
    device.turns(200)
    assert device.declared() == device.deleted_seqs()
    sizes = [len(message.payload) for message in device.messages() if isinstance(message.body, AuditPayload)]
    assert max(sizes) <= max_bytes
    assert (len(sizes) > 1) == (max_bytes == 2_000)


def test_a_store_packed_past_the_limit_of_intake_goes_on_when_a_batch_finds_no_room(make: Make) -> None:
    device = make()
    with contextlib.suppress(StorageFull):
        while True:
            device.feed(100)
    assert share(device) > INTAKE_SHARE
    device.turns(200)
    assert device.store.first_row("watch") == 1
    device.crowded.add("exercise")
    device.turns(10)
    assert share(device) <= space.EVICTION_STOP
    first = device.store.first_row("watch")
    assert device.store.cursor("exercise") == first - 1 > 0
    assert [body.evidence["rows"] for body in device.evictions()] == [[[1, first - 1]]]
    [alert] = device.bodies(AlertPayload)
    assert alert.subject == "store"


def test_what_is_being_delivered_makes_room_before_readings_go(make: Make) -> None:
    device = make(crowded={"exercise"})
    device.feed(5000)
    device.fill()
    device.acknowledge(1)
    device.turns(50)
    assert device.store.first_row("watch") == 1
    device.acknowledge(int(device.store.get_meta("seq", "0")))
    device.turns(10)
    assert device.store.first_row("watch") == 1
    assert share(device) <= space.EVICTION_STOP


def test_with_refuse_nothing_undelivered_or_unused_goes(make: Make) -> None:
    device = make(when_full="refuse", stuck={"exercise"})
    device.feed(40_000)
    device.fill()
    before = device.stored_seqs()
    device.turns(600)
    assert device.stored_seqs() == before
    assert device.store.first_row("watch") == 1
    assert share(device) > space.EVICTION_START


def test_a_disk_smaller_than_the_quota_counts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device = make(size=1 << 30)
    small = 3 << 20
    monkeypatch.setattr(Store, "limit_bytes", lambda _: small)
    device.fill(share=0.9)
    device.turns(200)
    assert device.store.used_bytes() <= small * space.EVICTION_STOP
    assert device.declared() == device.deleted_seqs() != set()


def test_a_declaration_that_was_acknowledged_is_left_alone(make: Make) -> None:
    device = make()
    for seqs in ([(1, 2)], [(4, 4)]):
        device.write("health", 5)
        with device.store.transaction() as tx:
            tx.outbox.delete([n for first, last in seqs for n in range(first, last + 1)])
            declare_messages(tx, device.author, device.now(), seqs, NO_ROOM, 10)
        device.acknowledge(int(device.store.get_meta("seq", "0")))
    assert [body.evidence["seq"] for body in device.evictions()] == [[[1, 2]], [[4, 4]]]


def flip(device: Device, seq: int, before: str, after: str) -> None:
    """Bytes of a waiting message's payload go bad on the disk."""
    changed = "CAST(replace(CAST(payload AS TEXT), ?, ?) AS BLOB)"
    device.store._db.execute(f"UPDATE outbox SET payload = {changed} WHERE seq = ?", (before, after, seq))
    assert not device.store.pending_messages([seq])[0].intact


def evict(device: Device, seqs: list[tuple[int, int]]) -> None:
    with device.store.transaction() as tx:
        tx.outbox.delete([n for first, last in seqs for n in range(first, last + 1)])
        declare_messages(tx, device.author, device.now(), seqs, NO_ROOM, 10)


@pytest.mark.parametrize(("before", "after"), [('"seq":[[2,3]]', '"seq":[[2,7]]'), ('"evidence":{', '"evidence":[')])
def test_a_damaged_declaration_is_not_merged_and_is_repeated(make: Make, before: str, after: str) -> None:
    device = make()
    device.write("health", 8)
    evict(device, [(2, 3)])
    flip(device, 9, before, after)
    evict(device, [(6, 6)])
    assert device.store.pending_messages([9]) != []
    quarantine_damaged(device.store, device.author, [9], device.now())
    assert device.store._fetch_all("SELECT seq FROM quarantined_messages") == [(9,)]
    assert device.declared() == device.deleted_seqs() == {2, 3, 6, 9}
    reasons = [(body.evidence["reason"], body.evidence["seq"]) for body in device.evictions()]
    assert reasons == [(NO_ROOM, [[6, 6]]), (DAMAGED, [[2, 3], [9, 9]])]


def test_a_damaged_declaration_is_never_evicted(make: Make) -> None:
    device = make()
    device.write("health", 8)
    evict(device, [(2, 3)])
    flip(device, 9, '"evidence":{', '"evidence":[')
    device.write("health", 8)
    device.fill("audit")
    device.turns(200)
    assert 9 in device.stored_seqs()
    assert len(device.deleted_seqs()) > 10
    quarantine_damaged(device.store, device.author, [9], device.now())
    assert device.declared() == device.deleted_seqs()


def test_a_damaged_declaration_of_acknowledged_messages_is_not_repeated(make: Make) -> None:
    device = make()
    device.write("health", 8)
    device.acknowledge(4)
    evict(device, [(3, 5)])
    flip(device, 9, '"evidence":{', '"evidence":[')
    quarantine_damaged(device.store, device.author, [9], device.now())
    assert device.declared() == {5, 9}


def test_retention_counts_uptime_and_not_the_wall_clock(make: Make) -> None:
    device = make()
    device.write("health", 10, size=10)
    with device.store.transaction() as tx:
        tx.outbox.set_acknowledged(AcknowledgedSeqs(8, ((3, 4),)))
        tx.set_meta(retention.ACKNOWLEDGED_HISTORY, "[[1000, 8]]")
    for boot_s, left in ((1000 + 47 * 3600.0, 10), (1000 + 49 * 3600.0, 4)):
        device.boot_s = boot_s
        device.space.tick(ClockReading(WALL_US + 10**15, boot_s, "synced"))
        assert len(device.stored_seqs()) == left
    assert device.stored_seqs() == [3, 4, 9, 10]
    assert device.store.backlog().messages == 4
    assert device.evictions() == []


def test_counts_of_what_waits_are_those_of_the_table(make: Make) -> None:
    device = make()
    device.write("health", 30, size=100)
    device.acknowledge(7)
    with device.store.transaction() as tx:
        tx.outbox.set_acknowledged(AcknowledgedSeqs(20, ((9, 12), (15, 15))))
        tx.outbox.delete([1, 9, 30])
    with device.store.transaction() as tx:
        assert tx.outbox.set_acknowledged(AcknowledgedSeqs(6)) == []
        assert tx.outbox.set_acknowledged(AcknowledgedSeqs(0)) == [(1, 1)]
    result = device.store._fetch_all("SELECT count(*), sum(length(payload) + length(jws) + length(topic)) FROM outbox")
    waiting = device.store.backlog()
    assert [(waiting.messages, waiting.bytes)] == result
    assert waiting.messages == 27
    assert ranges.from_numbers(device.stored_seqs()) == [(2, 8), (10, 29)]


def steps(device: Device, look: Callable[[], object]) -> int:
    """Instructions of SQLite's virtual machine that `look` takes, to the nearest ten."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    device.store._db.set_progress_handler(tick, 10)
    try:
        look()
    finally:
        device.store._db.set_progress_handler(None, 10)
    return 10 * count


def test_the_cost_of_outbox_queries_is_independent_of_its_size(make: Make) -> None:
    costs = []
    for stored, waiting in ((100, 100), (2000, 2000)):
        device = make(size=64 << 20)
        device.write("health", stored + waiting, size=100)
        device.acknowledge(stored)

        def look(store: Store = device.store, stored: int = stored) -> None:
            assert [message.seq for message in store.unacknowledged_messages(0, 5)] == list(
                range(stored + 1, stored + 6)
            )
            assert [message.seq for message in store.pending_messages([1, stored + 7])] == [stored + 7]
            assert store.outbox_size()[0] > 0

        costs.append(steps(device, look))
    assert costs[1] <= costs[0] + 50


def test_stored_predictions_go_before_undelivered_messages(make: Make) -> None:
    device = make()
    row = np.arange(1, 401, dtype=np.int64)
    while device.store.used_bytes() < 0.5 * device.store.limit_bytes():
        given = StoredPredictions("sha256:a", row, row * 1000, row % 7, np.random.default_rng(0).random(400), None, {})
        with device.store.transaction() as tx:
            tx.labels.store_predictions("exercise", given, 1000.0)
        row = row + 400
    device.fill()
    device.turns()
    assert device.store.used_bytes() < 0.86 * device.store.limit_bytes()
    assert device.evictions() == []
    stored = device.store.query(predictions.load_span, "exercise")
    assert stored is None or stored.first > 1


def test_stored_predictions_expire_as_configured(make: Make) -> None:
    device = make()
    row = np.arange(1, 11, dtype=np.int64)
    given = StoredPredictions("sha256:a", row, row * 1000, row % 7, None, None, {})
    with device.store.transaction() as tx:
        tx.labels.store_predictions("exercise", given, tx.uptime_s(device.now()))
    device.boot_s += 6.9 * 86_400
    device.turns(20)
    assert device.store.query(predictions.load_span, "exercise") is not None
    device.boot_s += 0.2 * 86_400
    device.turns(20)
    assert device.store.query(predictions.load_span, "exercise") is None

"""Relearn requests: a site reference is learned again once for each request, and the log records it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.device.bootstrap import tasks
from outstation.device.bootstrap.device import open_message_log, open_store
from outstation.device.pipeline import batch, relearn
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.recovery import open as recovery
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.workbench.testing.fleet import DeviceProcess, LocalFleet
from outstation.workbench.testing.patience import wait_until
from tests.kit.commands import call_outstation
from tests.kit.learning_device import LearningDevice
from tests.kit.marks import root_only

NOW = ClockReading(1_795_000_000_000_000, 1000.0, "synced")


class Site(LearningDevice):
    def ask(self, *arguments: str) -> tuple[int, Any]:
        return self.call("reference", *arguments)

    def open(self) -> Store:
        return open_store(self.conf)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Return a site whose reference was learned from noise."""
    made = Site(tmp_path_factory.mktemp("site"))
    with made.open() as store:
        work(made, store, 22)
    return made


def work(site: Site, store: Store, drift_windows: int) -> LoadedTask:
    """Append readings for `drift_windows` drift windows, and run the task over them."""
    n = drift_windows * 2000
    rng = np.random.default_rng(store.last_row("watch"))
    t = NOW.wall_us + 20_000 * np.arange(store.last_row("watch"), store.last_row("watch") + n, dtype=np.int64)
    with store.transaction() as tx:
        tx.append("watch", Rows(t, tuple(rng.normal(0, 0.2, n).astype("<f4") for _ in range(6))), "synced")
    author, task = (
        open_message_log(site.file, site.conf, store),
        tasks.load_task(site.file, site.conf, store, "exercise"),
    )
    relearn.apply_pending(task, store, author, NOW)
    while batch.run(task, store, author, NOW) is not None:
        pass
    return task


def audits(store: Store, event: str) -> list[dict[str, Any]]:
    bodies = [json.loads(message.payload) for message in store.unacknowledged_messages(0, 10_000)]
    return [body for body in bodies if body.get("event") == event]


def test_show_says_which_reference_is_in_force(site: Site) -> None:
    code, result = site.ask("show", "exercise")
    assert code == 0, result
    assert result["site"]["number"] >= 1
    assert result["site"]["windows"] == 20
    assert result["site"]["warning"].startswith("only 20 drift windows")
    assert result["asked"] is None
    reported = call_outstation("reference", "show", "exercise", "-c", str(site.config))
    assert "of this site, sha256:" in reported.stdout
    # What is not found is said where one looks, before it happens.
    assert re.search(r"found within 20 drift windows, 90% of the time:\n  \w\w ", reported.stdout)
    assert reported.stdout.count("spread × ") == len(result["site"]["smallest_changes"]["fields"])
    assert "found within 20 drift windows" in call_outstation("status", "-c", str(site.config)).stdout


def test_learning_anew_is_audited_and_gives_the_next_number(site: Site) -> None:
    code, answer = site.ask("relearn", "exercise", "--for", "14 min")
    assert (code, answer["taken_up"]) == (0, True)
    learning = {"windows": 0, "of": 20, "for_s": 840.0, "seconds": 0.0, "times": 4.0}
    assert site.ask("show", "exercise")[1]["learning"] == learning
    with site.open() as store:
        [reset] = audits(store, "reference reset")
        before = audits(store, "learned")
        work(site, store, 24)
        after = audits(store, "learned")
    assert reset["evidence"]["asked"] == "relearn"
    changes = before[-1]["evidence"]["smallest_changes"]["fields"]["ax"]
    assert set(changes) == {"shift", "shift_sd", "spread", "correlation", "stuck_rows", "never_stuck_at"}
    assert reset["evidence"]["site"] == before[-1]["evidence"]["site"]
    assert after[-1]["evidence"]["number"] == before[-1]["evidence"]["number"] + 1
    assert site.ask("show", "exercise")[1]["site"]["windows"] == 22
    # An operator who reads the log only must see it too.
    assert before[-1]["evidence"]["warning"].startswith("only 20 drift windows")
    assert "Warning: only 20 drift windows" in before[-1]["summary"]


def test_an_applied_request_with_a_remaining_file_does_nothing(site: Site) -> None:
    """Simulate a crash between the commit and the deletion of the file."""
    request = relearn.make_request("reset")
    relearn.submit_request(site.conf.data_dir, "exercise", request)
    with site.open() as store:
        work(site, store, 1)
        count = len(audits(store, "reference reset"))
        relearn.submit_request(site.conf.data_dir, "exercise", request)
        work(site, store, 1)
        assert len(audits(store, "reference reset")) == count
        assert relearn.pending_request(store, "exercise") is None
        work(site, store, 21)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id":7}', b"\xff" * 9000, b'{"id":"a","action":"reset","more":1}'])
def test_a_file_that_is_no_request_is_cleared_away_and_changes_nothing(site: Site, content: bytes) -> None:
    relearn.submit_request(site.conf.data_dir, "exercise", relearn.make_request("reset"))
    file = site.conf.data_dir / "requests" / "exercise.reference.json"
    file.write_bytes(content)
    with site.open() as store:
        before = len(audits(store, "reference reset"))
        work(site, store, 1)
        assert len(audits(store, "reference reset")) == before
    assert not file.exists()


@root_only
@pytest.mark.parametrize("earlier", [False, True])
def test_a_request_by_root_is_readable_by_the_daemon(tmp_path: Path, earlier: bool) -> None:
    os.chown(tmp_path, 65534, 65534)
    folder = tmp_path / "requests"
    if earlier:
        # As an earlier version left it.
        folder.mkdir(mode=0o700)
    relearn.submit_request(tmp_path, "exercise", relearn.make_request("relearn", 3600.0))
    for path in (folder, folder / "exercise.reference.json"):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
        assert path.stat().st_mode & 0o077 == 0


def test_a_link_in_the_folder_of_requests_leads_nobody_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was", encoding="utf-8")
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "exercise.reference.part").symlink_to(victim)
    relearn.submit_request(tmp_path, "exercise", relearn.make_request("reset"))
    assert victim.read_text(encoding="utf-8") == "as it was"
    other = tmp_path / "other"
    other.mkdir()
    (other / "requests").symlink_to(tmp_path)
    with pytest.raises(OSError, match="requests"):
        relearn.submit_request(other, "exercise", relearn.make_request("reset"))


def test_an_unreadable_request_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = recovery.open_store(tmp_path)
    # Root may read any file, but no folder as one.
    (tmp_path / "requests" / "exercise.reference.json").mkdir(parents=True)
    try:
        for _ in range(3):
            assert relearn.pending_request(store, "exercise") is None
    finally:
        store.close()
    [output] = [record.getMessage() for record in caplog.records]
    assert "exercise.reference.json: the request cannot be read: Is a directory" in output


def test_wrong_use_is_an_error(site: Site) -> None:
    assert site.ask("relearn", "exercize")[0] == 2
    code, reported = site.ask("relearn", "exercise", "--for", "a while")
    assert code == 2
    assert "--for" in reported


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        made.broker.start()
        made.collector.start()
        yield made


def test_the_running_daemon_applies_local_and_remote_requests(fleet: LocalFleet) -> None:
    device: DeviceProcess = fleet.add_device("pi-01").add_replay_stream(10**9, 10).add_task("exercise").start_and_wait()
    local = ("reference", "relearn", "exercise", "--for", "1 h", "-c", str(device.config))
    done = call_outstation(*local, "--wait", "90", "--json")
    assert json.loads(done.stdout)["taken_up"]
    remote = ("fleet", "command", "pi-01", "relearn", "exercise", "2 h", "--dir", str(fleet.home))
    sent = call_outstation(*remote, "--wait", "90", "--json")
    assert json.loads(sent.stdout)["ok"], sent.stdout

    def requests() -> list[Any]:
        sql = "SELECT payload FROM messages WHERE device = 'pi-01' AND kind = 'audit' ORDER BY seq"
        bodies = [json.loads(row[0]) for row in fleet.query(sql)]
        return [(b["evidence"]["by"], b["evidence"]["for_s"]) for b in bodies if b["event"] == "reference reset"]

    wait_until("both are in the log", lambda: requests() == [("on the device", 3600.0), ("from the fleet", 7200.0)])

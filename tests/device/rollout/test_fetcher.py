"""When the daemon fetches, what it makes of the answer, and that it never waits for it."""

from __future__ import annotations

import random
import sys
import time
from datetime import datetime

import pytest

from outstation.device.config.tasks import TaskConfig
from outstation.device.config.updates import UpdatesConfig
from outstation.device.machine.timekeeping import FLOOR
from outstation.device.rollout.fetch import fetcher, version_floors
from outstation.device.rollout.fetch.fetcher import FetchedBundle, Fetcher, FetchFailure
from outstation.device.rollout.fetch.version_floors import VersionFloors
from outstation.device.store.transaction import Transaction
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.quantities import Duration
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire.desired_state import DesiredBundle
from outstation.workbench.testing.patience import wait_until
from tests.kit.update_repositories import ARCHIVE, Signed
from tests.kit.update_servers import Handler, Web
from tests.kit.updating import PATIENCE_S, Updating

pytest_plugins = ["tests.kit.repository_fixtures"]

HOUR_US = 3_600_000_000
HANGING = (sys.executable, "-c", "import time; time.sleep(600)")


def requested_archives(web: Web) -> list[str]:
    return [path for path, _ in web.requests if path.startswith("/targets/")]


def report(device: Updating) -> dict[str, object]:
    result = device.fetcher.report(device.now())
    assert result is not None
    return result


def settle(device: Updating) -> None:
    """Poll until the child that runs has ended, and nothing is due."""
    wait_until(
        "it rests",
        lambda: device.fetcher.poll(device.now()) is None and device.fetcher.wait_s(device.now()) > 1,
        timeout_s=PATIENCE_S,
    )


# --- when ---


def test_metadata_are_refreshed_at_the_start_and_periodically(
    web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    settle(device)
    assert requested_archives(web) == []
    first = len(web.requests)
    assert first > 0
    assert report(device)["error"] == ""
    every_s = device.conf.updates.poll_interval if device.conf.updates else 0.0
    assert every_s - 60 <= device.fetcher.wait_s(device.now()) <= 1.25 * every_s
    device.later_s += 1.25 * every_s
    settle(device)
    assert len(web.requests) > first


def test_without_updates_in_the_config_nothing_is_fetched(device: Updating, wanted: DesiredBundle) -> None:
    conf = type(device.conf)(device=device.conf.device, streams=device.conf.streams, tasks=device.conf.tasks)
    fetcher = Fetcher(conf, device.store, command=HANGING)
    fetcher.start("exercise", wanted, device.now())
    assert fetcher.poll(device.now()) is None
    assert fetcher.report(device.now()) is None


def test_archives_are_fetched_in_the_window_only(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    device.wall_us = device.now().wall_us
    opens, closes = (datetime.fromtimestamp(device.wall_us / 1e6 + hours * 3600) for hours in (2, 4))
    device.configure(window=f"{opens:%H:%M}-{closes:%H:%M}")
    device.fetcher.start("exercise", wanted, device.now())
    settle(device)
    assert web.requests != []
    assert requested_archives(web) == []
    assert "waits for the window" in str(report(device)["downloads"])
    device.wall_us += 3 * HOUR_US
    assert isinstance(device.result(), FetchedBundle)


@pytest.mark.parametrize(
    ("text", "clock", "expected_s"),
    [
        ("01:00-05:00", "00:59:59", 0),
        ("01:00-05:00", "01:00:00", 4 * 3600),
        ("01:00-05:00", "04:59:30", 30),
        ("01:00-05:00", "05:00:00", 0),
        ("22:00-02:00", "23:00:00", 3 * 3600),
        ("22:00-02:00", "01:00:00", 3600),
        ("22:00-02:00", "12:00:00", 0),
    ],
)
def test_a_window_is_of_the_local_day_and_may_reach_over_midnight(text: str, clock: str, expected_s: float) -> None:
    wall_us = round(datetime.fromisoformat(f"2026-11-26T{clock}").timestamp() * 1e6)
    updates = UpdatesConfig(url="https://updates.example.org", window=text)
    assert fetcher.seconds_until_close(updates, ClockReading(wall_us, 0.0, "synced")) == expected_s
    assert fetcher.seconds_until_close(updates, ClockReading(wall_us, 0.0, "restored")) == expected_s
    assert fetcher.seconds_until_close(updates, ClockReading(wall_us, 0.0, "unsynced")) == 0


def test_a_clock_in_the_year_9999_has_a_time_of_day() -> None:
    updates = UpdatesConfig(url="https://updates.example.org", window="00:00-23:59")
    assert 0 <= fetcher.seconds_until_close(updates, ClockReading(2**62, 0.0, "restored")) < 86_400


def test_retries_back_off_with_jitter(device: Updating, wanted: DesiredBundle) -> None:
    device.configure(url="http://127.0.0.1:9")
    device.command = (sys.executable, "-c", "print('no answer')")
    device.restart()
    waits = []
    for _ in range(13):
        outcome = device.fetch(wanted)
        assert isinstance(outcome, FetchFailure)
        waits.append(outcome.retry_in_s)
    for n, wait_s in enumerate(waits):
        longest_s = min(30 * 2**n, 6 * 3600)
        assert longest_s / 2 <= wait_s <= longest_s
    assert len(set(waits)) == len(waits)


def test_an_unstable_link_is_retried_soon(
    repository: Signed, web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    for byte in (2_000, 4_000, 6_000, 8_000):
        web.tricks[:] = [("/targets/", lambda it, upto=byte: it.serve(upto))]  # type: ignore[misc]
        outcome = device.fetch(wanted)
        assert isinstance(outcome, FetchFailure)
        assert outcome.retry_in_s <= 30


def test_an_incompatible_bundle_is_retried_late(device: Updating, wanted: DesiredBundle) -> None:
    device.configure(max_size=len(ARCHIVE) - 1)
    outcome = device.must_fail(wanted, "TooLarge")
    assert outcome.is_permanent
    assert outcome.retry_in_s >= 3 * 3600


def test_an_unpublished_bundle_is_retried_soon(repository: Signed, web: Web, device: Updating) -> None:
    ahead = repository.copy()
    repository.write(web.folder)
    wanted = ahead.add("exercise", "1.0.0", ARCHIVE)
    outcome = device.must_fail(wanted, "NoSuchTarget")
    assert outcome.is_permanent
    assert outcome.retry_in_s <= 30
    assert report(device)["error"] == "", "the repository was looked at all the same"
    ahead.write(web.folder)
    device.must_fetch(wanted)


def test_a_stopped_download_is_no_repository_error(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    web.tricks[:] = [("/targets/", Handler.drip)]
    device.fetcher.start("exercise", wanted, device.now())
    wait_until(
        "it comes",
        lambda: device.fetcher.poll(device.now()) is None and requested_archives(web) != [],
        timeout_s=PATIENCE_S,
    )
    device.fetcher.stop("exercise")
    settle(device)
    assert report(device)["error"] == ""
    assert report(device)["downloads"] == {}


def test_tasks_take_turns_and_a_failing_one_blocks_none(
    repository: Signed, web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    device.conf.tasks["other"] = TaskConfig(stream="watch", bundle="exercise")
    nowhere = DesiredBundle("rollout-1", "exercise", "9.9.9", wanted.digest, "all")
    device.fetcher.start("other", nowhere, device.now())
    device.fetcher.start("exercise", wanted, device.now())
    first, second = device.result(), device.result()
    assert isinstance(first, FetchFailure)
    assert first.task == "other"
    assert isinstance(second, FetchedBundle)
    assert second.task == "exercise"


# --- what it makes of it ---


def test_a_bundle_desired_twice_is_downloaded_once(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    device.fetcher.start("exercise", wanted, device.now())
    device.fetcher.poll(device.now())
    device.fetcher.start("exercise", wanted, device.now())
    assert isinstance(device.result(), FetchedBundle)
    assert len(requested_archives(web)) == 1
    settle(device)
    assert report(device)["downloads"] == {}


def test_another_desired_bundle_ends_the_first_download(
    repository: Signed, web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    second = repository.add("exercise", "2.0.0", ARCHIVE * 2)
    repository.write(web.folder)
    web.tricks[:] = [("/targets/exercise/1", Handler.drip)]
    device.fetcher.start("exercise", wanted, device.now())
    wait_until(
        "the first comes",
        lambda: device.fetcher.poll(device.now()) is None and requested_archives(web) != [],
        timeout_s=PATIENCE_S,
    )
    device.fetcher.start("exercise", second, device.now())
    outcome = device.result()
    assert isinstance(outcome, FetchedBundle)
    assert outcome.desired == second


def test_a_hanging_worker_is_killed_in_time(device: Updating, wanted: DesiredBundle) -> None:
    device.command = HANGING
    device.restart()
    device.fetcher.start("exercise", wanted, device.now())
    started_s = time.monotonic()
    assert device.fetcher.poll(device.now()) is None
    assert device.fetcher.poll(device.now()) is None
    assert time.monotonic() - started_s < PATIENCE_S, "the main loop never waits for it"
    device.later_s += 3_700
    outcome = device.result()
    assert isinstance(outcome, FetchFailure)
    assert outcome.error == "Timeout"


def test_a_worker_that_cannot_start_is_a_failed_fetch(device: Updating, wanted: DesiredBundle) -> None:
    device.command = ("/nowhere/python",)
    device.restart()
    assert "no fetch worker can be started" in device.must_fail(wanted, "WorkerCrashed").detail


def test_a_response_is_used_only_after_its_floors_are_stored(
    device: Updating, wanted: DesiredBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Transaction, __: VersionFloors) -> None:
        raise StorageFull("the disk is full")

    with monkeypatch.context() as lost:
        lost.setattr(version_floors, "save", full)
        outcome = device.fetch(wanted)
        assert isinstance(outcome, FetchFailure)
        assert outcome.error == "StorageFull"
    assert device.floors == VersionFloors()
    device.must_fetch(wanted)
    assert device.versions["exercise"] == 1


def test_a_synchronised_time_is_remembered(device: Updating, wanted: DesiredBundle) -> None:
    device.must_fetch(wanted)
    assert int(device.store.get_meta(FLOOR, "0")) > 0
    seen = int(device.store.get_meta(FLOOR, "0"))
    device.quality, device.wall_us = "restored", seen + 48 * HOUR_US
    device.must_fetch(wanted)
    assert int(device.store.get_meta(FLOOR, "0")) == seen


def test_another_first_root_is_another_repository(
    repository: Signed, web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    """A new first root re-enrols the device: floors of the old repository do not apply."""
    repository.rotate("timestamp")
    repository.sign()
    repository.write(web.folder)
    device.must_fetch(wanted)
    assert device.versions["root"] == 2
    other = Signed()
    second = other.add("exercise", "1.0.0", ARCHIVE)
    (web.folder / "metadata" / "2.root.json").unlink()
    other.write(web.folder)
    device.must_fail(second, "UnsignedMetadataError")
    (device.folder / "root.json").write_bytes(other.files["1.root.json"])
    device.must_fetch(second)
    assert device.versions["root"] == 1


def test_a_root_that_is_missing_is_named(device: Updating, wanted: DesiredBundle) -> None:
    (device.folder / "root.json").unlink()
    outcome = device.fetch(wanted)
    assert isinstance(outcome, FetchFailure)
    assert outcome.error == "MissingRoot"
    assert str(device.folder / "root.json") in outcome.detail


def test_expired_metadata_are_reported_and_refreshed(
    repository: Signed, web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    settle(device)
    assert report(device)["freshness"] == "fresh"
    device.wall_us = device.now().wall_us + 20 * 24 * HOUR_US
    assert report(device)["freshness"] == "expired"
    device.later_s += 100_000
    settle(device)
    assert report(device)["error"] == "ExpiredMetadataError"
    repository.now = datetime.fromtimestamp(device.wall_us // 1_000_000, repository.now.tzinfo)
    repository.sign()
    repository.write(web.folder)
    device.later_s += 100_000
    settle(device)
    assert report(device)["freshness"] == "fresh"
    assert report(device)["error"] == ""


def test_devices_spread_their_downloads(device: Updating, wanted: DesiredBundle) -> None:
    device.configure(url="https://updates.example.org/acme")
    dues = []
    for seed in range(20):
        fetcher = Fetcher(device.conf, device.store, command=HANGING, rng=random.Random(seed))
        now = device.now()
        fetcher.start("exercise", wanted, now)
        fetcher.poll(now)
        dues.append(fetcher.wait_s(now))
        assert fetcher.poll(ClockReading(now.wall_us, now.boot_s + dues[-1] - 0.001, now.quality)) is None
        fetcher.close()
    assert max(dues) < 60
    assert max(dues) - min(dues) > 20


def test_devices_spread_their_metadata_refreshes(device: Updating) -> None:
    device.configure(poll_interval=Duration(3600.0))
    dues = set()
    for seed in range(3):
        fetcher = Fetcher(device.conf, device.store, command=("/nowhere/python",), rng=random.Random(seed))
        fetcher.poll(device.now())
        dues.add(round(fetcher.wait_s(device.now())))
    assert len(dues) == 3

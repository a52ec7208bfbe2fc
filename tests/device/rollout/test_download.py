"""Downloads of archives over bad links and full disks."""

from __future__ import annotations

import hashlib
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from outstation.device.rollout.fetch.fetcher import FetchedBundle
from outstation.device.rollout.fetch.request import DOWNLOAD_DIR
from outstation.fleet.enrolment.pki import create_authority
from outstation.protocol.wire.desired_state import DesiredBundle
from outstation.workbench.testing.patience import wait_until
from scripts.faults.disk import Card, no_card
from tests.kit.stations import ROOT
from tests.kit.update_repositories import Signed
from tests.kit.update_servers import Handler, Trick, Web
from tests.kit.updating import PATIENCE_S, RUNS, Updating

pytest_plugins = ["tests.kit.repository_fixtures"]

# More than two of what is synced at once.
ARCHIVE = os.urandom(1 << 20) * 2 + b"end"
SMALL = ARCHIVE[: 1 << 16]


@pytest.fixture
def archive() -> bytes:
    return ARCHIVE


def starts(web: Web) -> list[int]:
    """From which byte on the archive was asked for, each time."""
    return [start for path, start in web.requests if path.startswith("/targets/")]


def cut_at(byte: int) -> Callable[[Handler], None]:
    return lambda it: it.serve(byte)


def parts(device: Updating) -> list[Path]:
    return list((device.data / DOWNLOAD_DIR).glob("*.part"))


def part(device: Updating) -> Path:
    [path] = parts(device)
    return path


# --- connections ---


@pytest.mark.exec
def test_an_interrupted_download_is_resumed(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    for byte in (1_200_000, 1_900_000):
        web.tricks[:] = [("/targets/", cut_at(byte))]
        assert "are kept" in device.must_fail(wanted, "DownloadError").detail
        assert part(device).stat().st_size == byte
    web.tricks.clear()
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert starts(web) == [0, 1_200_000, 1_900_000]
    assert len(device.fetched) == 1


def test_a_server_without_ranges_restarts_the_download(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    web.tricks[:] = [("/targets/", cut_at(1_200_000))]
    device.must_fail(wanted, "DownloadError")
    web.tricks[:] = [("/targets/", Handler.whole)]
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert starts(web) == [0, 1_200_000]


def test_another_range_than_requested_is_rejected(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    web.tricks[:] = [("/targets/", cut_at(1_200_000))]
    device.must_fail(wanted, "DownloadError")

    def other(it: Handler) -> None:
        it.start -= 1
        it.serve()

    web.tricks[:] = [("/targets/", other)]
    assert "another range" in device.must_fail(wanted, "DownloadError").detail
    assert part(device).stat().st_size == 1_200_000


def test_an_unsatisfiable_range_restarts_the_download(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    web.tricks[:] = [("/targets/", cut_at(1_200_000))]
    device.must_fail(wanted, "DownloadError")
    web.tricks[:] = [("/targets/", lambda it: it.head(416, 0) if it.start else it.serve())]
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert starts(web) == [0, 1_200_000, 0]


def test_a_closed_idle_connection_is_reopened(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    """Without saying so, as one does whose patience with idle connections is short."""

    def hang_up(it: Handler) -> None:
        it.serve()
        it.close_connection = True

    web.tricks[:] = [("", hang_up)]
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE


def test_a_download_ends_with_the_window_and_resumes_in_the_next(
    web: Web, device: Updating, wanted: DesiredBundle
) -> None:
    now = datetime.fromtimestamp(device.now().wall_us // 1_000_000).replace(second=58, microsecond=0)
    device.wall_us = round(now.timestamp() * 1e6)
    device.configure(window=f"{now - timedelta(hours=1):%H:%M}-{now + timedelta(minutes=1):%H:%M}")
    web.tricks[:] = [("/targets/", holding(threading.Event()))]
    device.must_fail(wanted, "Timeout")
    web.tricks.clear()
    device.wall_us += 86_400_000_000 - 1_000_000_000
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE


def test_an_existing_archive_is_not_downloaded_again(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    device.must_fetch(wanted)
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert starts(web) == [0]


def test_a_damaged_part_is_detected_and_downloaded_anew(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    """Simulate a power cut on a file system that loses the end of a file."""
    web.tricks[:] = [("/targets/", cut_at(1_200_000))]
    device.must_fail(wanted, "DownloadError")
    with part(device).open("r+b") as file:
        file.seek(1_100_000)
        file.write(bytes(1_000))
    web.tricks.clear()
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert starts(web) == [0, 1_200_000, 0]


def test_a_damaged_archive_is_detected_and_downloaded_anew(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    outcome = device.must_fetch(wanted)
    outcome.path.write_bytes(bytes(len(ARCHIVE)))
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE


def test_two_other_archives_and_no_other_part_are_retained(repository: Signed, web: Web, device: Updating) -> None:
    several = [repository.add("exercise", f"{n}.0.0", bytes([n]) * 1000) for n in range(5)]
    repository.write(web.folder)
    for item in several[:4]:
        device.must_fetch(item)
    device.data.joinpath(DOWNLOAD_DIR, f"{'0' * 64}.part").write_bytes(b"of another")
    device.must_fetch(several[4])
    assert len(device.fetched) == 3
    assert all(name.endswith(".zip") for name in device.fetched)


def test_the_configured_rate_is_observed(repository: Signed, web: Web, device: Updating) -> None:
    wanted = repository.add("exercise", "1.0.0", SMALL)
    repository.write(web.folder)
    device.configure(max_rate=len(SMALL) // 2)
    started_s = time.monotonic()
    device.must_fetch(wanted)
    assert time.monotonic() - started_s > 1.0


def test_a_usb_stick_can_be_a_repository(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    device.configure(url=str(web.folder), window="00:00-00:01")
    assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert web.requests == []


def test_a_missing_usb_stick_is_named(device: Updating, wanted: DesiredBundle, tmp_path: Path) -> None:
    device.configure(url=str(tmp_path / "stick"))
    assert "is the medium mounted?" in device.must_fail(wanted, "DownloadError").detail


def test_an_unreachable_server_is_named(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    device.configure(url="http://127.0.0.1:9")
    assert "Connection refused" in device.must_fail(wanted, "DownloadError").detail


def test_a_server_needs_a_certificate_of_the_trusted_ca(
    repository: Signed, web: Web, device: Updating, wanted: DesiredBundle, tmp_path: Path
) -> None:
    ours, theirs = create_authority("acme"), create_authority("acme")
    for name, authority in (("ours", ours), ("theirs", theirs)):
        (tmp_path / f"{name}.pem").write_bytes(authority.pem)
    issued = ours.issue_server("127.0.0.1")
    (tmp_path / "server.pem").write_bytes(issued.certificate + issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with Web(web.folder, context) as secure:
        for ca_file in (None, str(tmp_path / "theirs.pem")):
            device.configure(url=secure.url, ca_file=ca_file)
            assert "certificate verify failed" in device.must_fail(wanted, "DownloadError").detail
        device.configure(url=secure.url, ca_file=str(tmp_path / "nowhere.pem"))
        assert "[updates] ca_file" in device.must_fail(wanted, "DownloadError").detail
        assert secure.requests == []
        device.configure(url=secure.url, ca_file=str(tmp_path / "ours.pem"))
        assert device.must_fetch(wanted).path.read_bytes() == ARCHIVE


# --- full disks ---


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    if why := no_card():
        pytest.skip(why)
    made = Card(tmp_path / "card.ext4", tmp_path / "card")
    made.make(64)
    yield made
    made.unmount()


@pytest.fixture
def on_card(card: Card, repository: Signed, web: Web) -> Iterator[Updating]:
    with Updating(card.mount_point, web.url, repository.files["1.root.json"]) as made:
        yield made


def test_a_disk_without_room_for_the_archive_is_incompatible(
    card: Card, web: Web, on_card: Updating, wanted: DesiredBundle
) -> None:
    ballast(card, leave=36 << 20)
    assert "of disk for the archive" in on_card.must_fail(wanted, "Incompatible").detail
    assert starts(web) == []
    card.free()
    on_card.must_fetch(wanted)


def test_a_disk_that_fills_up_during_a_download_loses_nothing(
    card: Card, web: Web, on_card: Updating, wanted: DesiredBundle
) -> None:
    def filling(it: Handler) -> None:
        card.fill()
        it.serve()

    web.tricks[:] = [("/targets/", filling)]
    assert "the disk is full" in on_card.must_fail(wanted, "DiskFull").detail
    card.free()
    web.tricks.clear()
    assert on_card.must_fetch(wanted).path.read_bytes() == ARCHIVE


def ballast(card: Card, leave: int) -> None:
    """Take all room but so much."""
    usage = os.statvfs(card.mount_point)
    with (card.mount_point / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.f_bavail * usage.f_frsize - leave)


# --- power cuts and kills ---

# The child, which is killed just before its n-th sync or rename.
DYING = """\
import os, signal, sys
from outstation.device.rollout.fetch.worker import main
left = int(sys.argv[1])
def dying(call):
    def counted(*given, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **more)
    return counted
os.fsync, os.rename, os.replace = map(dying, (os.fsync, os.rename, os.replace))
sys.argv = sys.argv[:1]
main()
"""


def dying_at(step: int) -> tuple[str, ...]:
    return (sys.executable, "-P", "-c", DYING, str(step))


def test_a_power_cut_at_every_step_of_a_download(card: Card, repository: Signed, web: Web) -> None:
    """The card forgets what was not synced; the next child, which gets a step further, starts from what is left."""

    def started() -> Updating:
        return Updating(card.mount_point, web.url, repository.files["1.root.json"])

    step, done = 0, False
    while not done:
        step += 1
        archive = step.to_bytes(2, "big") * 1000
        wanted = repository.add("exercise", f"{step}.0.0", archive)
        repository.write(web.folder)
        with started() as device:
            device.command = dying_at(step)
            device.restart()
            subprocess.run(["sync", "--file-system", str(card.mount_point)], check=True)
            before, outcome = device.floors, device.fetch(wanted)
        done = isinstance(outcome, FetchedBundle)
        assert isinstance(outcome, FetchedBundle) or outcome.error == "WorkerCrashed"
        card.cut(journal=step % 2 == 0)
        with started() as device:
            for role, floor in before.roles.items():
                assert device.floors.roles[role].version >= floor.version
            assert device.runs.read_bytes() == RUNS
            for path in (device.data / DOWNLOAD_DIR).glob("*.zip"):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
            if done:
                assert device.must_fetch(wanted).path.read_bytes() == archive
    assert step > 15, f"a download has more than {step} steps"


def test_the_worker_does_not_outlive_the_daemon(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    """Killed in the middle of a download, the daemon leaves no process, and what came is gone on with."""
    held = threading.Event()
    web.tricks[:] = [("/targets/", holding(held))]
    device.close()
    program = (
        "import sys, time, pathlib\n"
        "from tests.kit.updating import Updating\n"
        "from outstation.protocol.wire.desired_state import DesiredBundle\n"
        "folder, url = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "device = Updating(folder, url, (folder / 'root.json').read_bytes())\n"
        "device.fetch(DesiredBundle('rollout-1', *sys.argv[3:6], 'all'), 60.0)\n"
    )
    words = (str(device.folder), web.url, wanted.bundle, wanted.version, wanted.digest)
    daemon = subprocess.Popen([sys.executable, "-c", program, *words], cwd=ROOT)
    try:
        wait_until("the archive is being downloaded", held.is_set, timeout_s=PATIENCE_S)
        wait_until("a part of it is on the disk", lambda: parts(device), timeout_s=PATIENCE_S)
        wait_until("much of it is on the disk", lambda: part(device).stat().st_size >= 1 << 20, timeout_s=PATIENCE_S)
        [fetching] = psutil.Process(daemon.pid).children()
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        wait_until(
            "the child is gone",
            lambda: not fetching.is_running() or fetching.status() == psutil.STATUS_ZOMBIE,
            timeout_s=PATIENCE_S,
        )
    finally:
        daemon.kill()
        daemon.wait()
    web.tricks.clear()
    with Updating(device.folder, web.url, (device.folder / "root.json").read_bytes()) as again:
        assert again.must_fetch(wanted).path.read_bytes() == ARCHIVE
    assert starts(web)[-1] >= 1 << 20


def holding(held: threading.Event) -> Trick:
    """Half of the file, and then nothing more for a while."""

    def trick(it: Handler) -> None:
        assert it.data is not None
        it.head(200, len(it.data))
        it.wfile.write(it.data[: (1 << 20) + 5000])
        it.wfile.flush()
        held.set()
        time.sleep(20)

    return trick


@pytest.mark.exec
def test_the_worker_has_low_priority_and_limits(web: Web, device: Updating, wanted: DesiredBundle) -> None:
    held = threading.Event()
    web.tricks[:] = [("/targets/", holding(held))]
    before = psutil.Process().children()
    device.fetcher.start("exercise", wanted, device.now())
    wait_until(
        "the archive is being downloaded",
        lambda: device.fetcher.poll(device.now()) is None and held.is_set(),
        timeout_s=PATIENCE_S,
    )
    [fetching] = [child for child in psutil.Process().children() if child not in before]
    assert fetching.nice() == 19
    assert fetching.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    limits = {kind: fetching.rlimit(kind)[0] for kind in (psutil.RLIMIT_AS, psutil.RLIMIT_CPU, psutil.RLIMIT_FSIZE)}
    assert 0 < limits[psutil.RLIMIT_AS] < 1 << 30
    assert 0 < limits[psutil.RLIMIT_CPU] <= 300
    assert 0 < limits[psutil.RLIMIT_FSIZE] <= (64 << 20) + 1
    assert fetching.memory_info().rss < 80 << 20
    device.fetcher.stop("exercise")
    wait_until(
        "the child is gone",
        lambda: (device.fetcher.poll(device.now()), fetching.is_running())[1] is False,
        timeout_s=PATIENCE_S,
    )

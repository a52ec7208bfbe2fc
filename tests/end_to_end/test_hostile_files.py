"""Hostile files in the watched folders of a real daemon on a small device: a memory cgroup of 384 MiB.

A file that takes more than there is costs its decoder, and no other file waits behind it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outstation.device.intake.sources.file_marker import FileMarker
from outstation.protocol.wire import keys
from outstation.workbench.testing.patience import Patience, wait_until
from outstation.workbench.testing.process import OutstationProcess
from scripts.kit.memory_cgroup import MemoryCgroup, memory_cgroup
from tests.kit.commands import call_outstation

pytestmark = pytest.mark.attack("files")

LIMIT_BYTES = 384 << 20
_CONFIG = """
[device]
id = "pi-07"
fleet = "acme"
data_dir = "data"
[broker]
url = "mqtt://127.0.0.1:1"
[collector]
delivery = "broker"
[streams.tables]
fields = [{{ name = "n", type = "i64" }}, {{ name = "s", type = "category", optional = true }}]
source = {{ kind = "files", folder = "{folder}/tables", poll_interval = "200 ms" }}
[streams.photos]
source = {{ kind = "files", folder = "{folder}/photos", poll_interval = "200 ms", image = {{ width = 8, height = 6 }} }}
"""


class SmallDevice:
    """A daemon with a folder of tables and one of photographs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "outstation.toml"
        self.config.write_text(_CONFIG.format(folder=folder), encoding="utf-8")
        keys.generate(folder / "device.key")
        self.daemon = OutstationProcess(folder / "log", "run", "-c", str(self.config))

    def start(self) -> None:
        before = self.started()
        self.daemon.start()
        wait_until("the daemon runs", lambda: self.started() > before or not self.daemon.is_running)
        assert self.daemon.is_running, self.read_log()

    def started(self) -> int:
        return self.read_log().count("running:")

    def read_log(self) -> str:
        log = self.folder / "log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def put(self, name: str, content: Path) -> None:
        content.replace(self.folder / name)

    def has(self, place: str, name: str) -> bool:
        kind, _, file = name.partition("/")
        return (self.folder / kind / place / file).exists()


def counts_deaths(marker: Path, n: int) -> bool:
    """Return True if the marker says that `n` processes will have ended over the file in hand."""
    previous = FileMarker(marker).previous
    return previous is not None and previous.deaths == n


def write_image(path: Path, width: int, height: int) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (width, height)).save(path, format="PNG")
    return path


def write_parquet(path: Path, rows: int, length: int) -> Path:
    """Write a small file that stands for rows x length bytes: one text, repeated."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = arrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["x" * length])
    parquet.write_table(arrow.table({"n": np.arange(rows), "s": texts}), path)
    return path


def write_long_line(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.write(b"n\n1\n")
        file.truncate(size)
    return path


@pytest.fixture
def small_memory() -> Iterator[MemoryCgroup]:
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_cgroup(LIMIT_BYTES))
        except OSError as error:
            pytest.skip(str(error))
        yield group


def test_hostile_files_do_not_end_a_daemon_of_384_mib_and_hold_no_other_file_up(
    tmp_path: Path, small_memory: MemoryCgroup
) -> None:
    device, draft = SmallDevice(tmp_path), tmp_path / "draft"
    device.daemon.set_launcher(device.daemon.launcher, small_memory.prefix)
    try:
        device.start()
        pid = device.daemon.pid
        assert pid in small_memory.pids()
        device.put("photos/a.png", write_image(draft, 7000, 7000))
        device.put("tables/a.parquet", write_parquet(draft, 20_000, 60_000))
        device.put("tables/b.csv", write_long_line(draft, 300 << 20))
        draft.write_text("n\n7\n", encoding="ascii")
        device.put("tables/z.csv", draft)
        device.put("photos/z.png", write_image(draft, 16, 12))
        wait_until("the table is ingested", lambda: device.has("done", "tables/z.csv"))
        wait_until("the photograph is ingested", lambda: device.has("done", "photos/z.png"))
        assert device.has("failed", "photos/a.png")
        assert device.has("failed", "tables/b.csv")
        assert device.daemon.is_running
        assert device.daemon.pid == pid
        assert small_memory.peak_bytes() <= LIMIT_BYTES
    finally:
        device.daemon.kill()


def count_failed_files(device: SmallDevice) -> object:
    return json.loads(call_outstation("status", "--json", "-c", str(device.config)).stdout)["failed_files"]


def test_a_file_in_hand_at_two_deaths_of_the_daemon_goes_to_failed(tmp_path: Path) -> None:
    device, marker = SmallDevice(tmp_path), tmp_path / "data" / "reading.tables"
    try:
        device.start()
        device.put("tables/a.parquet", write_parquet(tmp_path / "draft", 400_000, 60_000))
        for deaths in (1, 2):
            # The marker of the death before is there until the daemon reads the file again.
            # Watched closely: with the first rows that it stores, the daemon forgets the deaths.
            patience = Patience(60)
            while not counts_deaths(marker, deaths):
                assert not patience.is_over(), "the file is not in hand"
                time.sleep(0.001)
            device.daemon.kill()
            assert not device.has("failed", "tables/a.parquet")
            device.start()
        wait_until("the file is in failed/", lambda: device.has("failed", "tables/a.parquet"))
        reason = (tmp_path / "tables" / "failed" / "a.parquet.txt").read_text(encoding="utf-8")
        assert "2 processes in a row ended while they read it" in reason
        # The daemon counts the file after it moved it.
        wait_until("status counts the file", lambda: count_failed_files(device) == 1)
    finally:
        device.daemon.kill()

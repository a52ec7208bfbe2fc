"""Images and sounds in a watched folder: each file is ingested once, invalid ones go to failed/."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.device import config
from outstation.device.config.sources import FilesSource
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake import media_reader
from outstation.device.intake.file_reader import FileBlock
from outstation.device.intake.sources import files as files_module
from outstation.device.intake.sources.file_progress import FileProgress
from outstation.device.intake.sources.files import FolderWatcher
from outstation.device.intake.sources.watched_folder import WatchedFolder
from outstation.device.recovery.open import open_store
from outstation.device.store.rows import Rows
from outstation.foundation.errors import ConfigError, UsageError
from outstation.foundation.media import ImageFormat, MediaFormat, SoundFormat
from outstation.ml.model.inference import images, sound
from outstation.workbench.testing.patience import wait_until
from tests.kit.killed_watcher import kill_with_a_file_in_hand
from tests.kit.stations import Station, conf, rows_of
from tests.ml.model.test_media import RATE, picture, read_samples, tone, write_wav

SMALL = ImageFormat(width=8, height=6)
SOUND = SoundFormat(rate=RATE, window=1024, hop=512, mels=16)


def stream_of(folder: Path, made: MediaFormat, every_s: float = 0.02) -> StreamConfig:
    """Return a stream as `config.load` makes it."""
    kind = {"image": made} if isinstance(made, ImageFormat) else {"sound": made}
    source = FilesSource(folder=str(folder / "in"), poll_interval=config.Duration(every_s), **kind)
    return StreamConfig(fields=[FieldConfig(name=name) for name in made.columns], source=source)


@contextmanager
def watching(folder: Path, made: MediaFormat = SMALL, **store: Any) -> Iterator[Station]:
    stream = stream_of(folder, made)
    source = stream.source
    assert isinstance(source, FilesSource)
    (folder / "in").mkdir(exist_ok=True)
    made_of = conf(folder / "d", camera=stream)
    with Station(
        made_of, sources=lambda s: [FolderWatcher("camera", stream, source, s, folder / "d")], **store
    ) as station:
        yield station
        assert station.failures == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_SETTLED_S", 0.1)


def put(folder: Path, name: str, content: bytes, at_s: float | None = None) -> Path:
    """A file that appears at once, by rename."""
    (folder / "in").mkdir(exist_ok=True)
    draft = folder / f"{name}.draft"
    draft.write_bytes(content)
    if at_s is not None:
        os.utime(draft, (at_s, at_s))
    return draft.rename(folder / "in" / name)


def names(folder: Path, where: str) -> list[str]:
    return sorted(path.name for path in (folder / "in" / where).glob("*") if path.name != "rows.csv")


def are_in(folder: Path, where: str, count: int) -> bool:
    return len(names(folder, where)) == count


def taken(station: Station) -> Rows:
    return rows_of(station.store, "camera", station.conf.streams["camera"])


def pixels(rows: Rows) -> NDArray[np.float32]:
    return np.stack(rows.columns, axis=1).reshape(-1, SMALL.height, SMALL.width * 3)


def notes(folder: Path) -> list[list[str]]:
    """Name, first and last row of each file."""
    with (folder / "in" / "done" / "rows.csv").open(newline="") as file:
        head, *reported = csv.reader(file)
    assert head == ["file", "first", "last"]
    return sorted(reported)


@pytest.mark.usefixtures("quick")
def test_images_become_rows_in_order_of_name_with_an_index(tmp_path: Path) -> None:
    for index in range(40):
        put(tmp_path, f"{index:02}.png", picture((6, 8, 3), seed=index), 1_764_000_000 + index)
    with watching(tmp_path) as station:
        wait_until("all in done/", partial(are_in, tmp_path, "done", 40))
        rows = taken(station)
    expected = [images.read_rows(tmp_path / "in" / "done" / f"{index:02}.png", SMALL) for index in range(40)]
    assert pixels(rows).tobytes() == np.stack(expected).tobytes()
    assert rows.t.tolist() == [(1_764_000_000 + index) * 1_000_000 for index in range(40) for _ in range(6)]
    assert notes(tmp_path) == [[f"{index:02}.png", str(index * 6 + 1), str(index * 6 + 6)] for index in range(40)]


@pytest.mark.usefixtures("quick")
def test_equal_images_of_different_times_are_all_ingested_and_a_copy_is_not(tmp_path: Path) -> None:
    content = picture((6, 8, 3), seed=1)
    with watching(tmp_path) as station:
        for index, at_s in enumerate((1_764_000_000, 1_764_003_600)):
            put(tmp_path, f"{index}.png", content, at_s)
            wait_until("the image in done/", partial(are_in, tmp_path, "done", index + 1))
        put(tmp_path, "copy.png", content, 1_764_003_600)
        wait_until("the copy in failed/", lambda: "copy.png" in names(tmp_path, "failed"))
        assert len(taken(station)) == 2 * SMALL.height


def test_a_file_that_changes_while_it_is_read_gives_its_first_digest_back(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, SMALL)
    assert isinstance(stream.source, FilesSource)
    with open_store(tmp_path / "d") as store:
        watcher = FolderWatcher("camera", stream, stream.source, store, tmp_path / "d")

        async def take(name: str, content: bytes) -> None:
            path = tmp_path / name
            path.write_bytes(content)
            os.utime(path, (1_764_000_000, 1_764_000_000))
            with path.open("rb") as file:
                await watcher._take_digest(file.fileno(), name, FileProgress(0))

        async def run() -> None:
            await take("1.a.png", b"begun")
            await take("1.a.png", b"begun and ended")
            await take("2.b.png", b"begun")
            with pytest.raises(UsageError, match="duplicate"):
                await take("3.c.png", b"begun")

        asyncio.run(run())


@pytest.mark.usefixtures("quick")
def test_images_of_one_moment_get_different_times(tmp_path: Path) -> None:
    for index in range(3):
        put(tmp_path, f"{index}.png", picture((6, 8, 3), seed=index), 1_764_000_000)
    put(tmp_path, "x 2026-11-24T10-15-30.25Z.jpg", picture((6, 8, 3), "JPEG"), 1_764_000_000)
    with watching(tmp_path) as station:
        wait_until("all in done/", partial(are_in, tmp_path, "done", 4))
        t = taken(station).t.reshape(4, 6)
    assert (t == t[:, :1]).all()
    assert (t[:3, 0] - 1_764_000_000_000_000).tolist() == [0, 1, 2]
    assert t[3, 0] == 1_795_515_330_250_000


@pytest.mark.parametrize(
    ("made", "name", "content", "why"),
    [
        (SMALL, "a.png", b"not an image", "not a JPEG or PNG image; remove it, or convert it to one of these"),
        (SMALL, "a.jpg", b"", "not a JPEG or PNG image"),
        (SMALL, "a.png", picture((64, 64, 3))[:800], "the image cannot be read"),
        (SMALL, "a.png", picture((64, 64, 3), "GIF"), "not a JPEG or PNG image"),
        (SOUND, "a.wav", b"RIFF but not really", "not a readable WAV file"),
        (SOUND, "a.wav", "of another rate", "has 8000 Hz, the model needs 16000 Hz; resample it first"),
        (SOUND, "a.wav", "cut short", "it has 3,978 of the 8,000 samples that its header declares"),
        (SOUND, "a.wav", "a moment", "160 samples are too few: one row takes 1,024"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_an_undecodable_file_goes_to_failed_with_a_reason_and_counts(
    tmp_path: Path, made: MediaFormat, name: str, content: bytes | str, why: str
) -> None:
    if isinstance(content, str):
        made_of = {"of another rate": (0.5, 8000), "cut short": (0.5, RATE), "a moment": (0.01, RATE)}[content]
        written = write_wav(tmp_path / "x.wav", tone(440, made_of[0]), rate=made_of[1]).read_bytes()
        content = written[:8000] if content == "cut short" else written
    put(tmp_path, name, content)
    good = (
        picture((6, 8, 3)) if isinstance(made, ImageFormat) else write_wav(tmp_path / "y.wav", tone(440)).read_bytes()
    )
    put(tmp_path, f"good{Path(name).suffix}", good)
    with watching(tmp_path, made) as station:
        wait_until("the file and the reason in failed/", partial(are_in, tmp_path, "failed", 2))
        wait_until("the good one in done/", partial(are_in, tmp_path, "done", 1))
        wait_until("the count", lambda: station.store.counters().get("files failed") == 1)
        assert len(taken(station)) == (6 if isinstance(made, ImageFormat) else 14)
    text = (tmp_path / "in" / "failed" / f"{name}.txt").read_text()
    assert text.startswith(f"{name}: ")
    assert why in text
    assert text.count("\n") == 1
    assert "taking" not in text


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_cut_at_any_byte_is_refused_unless_all_its_pixels_are_there(tmp_path: Path, kind: str) -> None:
    data = picture((6, 8, 3), kind)
    whole = images.read_rows(tmp_path / "a", SMALL, io.BytesIO(data))
    for cut in range(len(data)):
        try:
            rows = images.read_rows(tmp_path / "a", SMALL, io.BytesIO(data[:cut]))
        except UsageError:
            continue
        # Only a PNG's last checksums, and the mark of its end.
        assert cut >= len(data) - 20
        assert (rows == whole).all()


def test_an_image_that_is_too_large_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(pillow.Image, "resize", None)
    with pytest.raises(UsageError, match=r"bomb\.png: 20000 x 20000 pixels, 50,000,000 at most; make it smaller"):
        images.read_rows(tmp_path / "bomb.png", SMALL)
    monkeypatch.setattr(images, "_MAX_BYTES", 1000)
    with pytest.raises(UsageError, match=r"bomb\.png: [0-9,]+ bytes, 1,000 at most; make it smaller"):
        images.read_rows(tmp_path / "bomb.png", SMALL)


@pytest.mark.usefixtures("quick")
def test_a_sound_has_the_rows_of_its_definition_and_times_from_its_start(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 40 * RATE)
    content = write_wav(tmp_path / "x.wav", samples).read_bytes()
    put(tmp_path, "a.wav", content, 1_764_000_040)  # when its last sample was written
    put(tmp_path, "b 20251124T160000Z.wav", content)
    with watching(tmp_path, SOUND) as station:
        wait_until("both in done/", partial(are_in, tmp_path, "done", 2))
        rows = taken(station)
    path = tmp_path / "in" / "done" / "a.wav"
    expected = sound.compute_mel_rows(read_samples(path), SOUND)
    n = len(expected)
    assert n > 2 * sound._BLOCK_FRAMES
    assert np.stack(rows.columns, axis=1).tobytes() == np.concatenate([expected, expected]).tobytes()
    assert rows.t.tolist() == 2 * (1_764_000_000_000_000 + np.arange(n) * 32_000).tolist()
    assert notes(tmp_path) == [["a.wav", "1", str(n)], ["b 20251124T160000Z.wav", str(n + 1), str(2 * n)]]


def read_sound(path: Path, stream: StreamConfig, skip: int, last_us: int | None) -> list[FileBlock]:
    with path.open("rb") as file:
        return list(media_reader.read_blocks(path, file, path.stat().st_mtime_ns // 1000, stream, skip, last_us))


@pytest.mark.parametrize("late_us", [0, 1, 32_000, 63_999])
def test_a_sound_never_seems_to_continue_the_one_before(tmp_path: Path, late_us: int) -> None:
    stream, path = stream_of(tmp_path, SOUND), write_wav(tmp_path / "a.wav", tone(440))
    own = round(path.stat().st_mtime_ns / 1000) - 500_000
    [block] = read_sound(path, stream, 0, own - late_us)
    assert round(block.raw.t[0] * 1e6) == own - late_us - 1
    [later] = read_sound(path, stream, 0, own - 64_002)
    assert abs(round(later.raw.t[0] * 1e6) - own) <= 1


@pytest.mark.parametrize("skip", [1, 255, 256, 300, 1_000])
def test_a_partly_ingested_sound_continues_with_the_same_bits(tmp_path: Path, skip: int) -> None:
    stream = stream_of(tmp_path, SOUND)
    path = write_wav(tmp_path / "a.wav", np.random.default_rng(1).normal(0, 0.1, 40 * RATE))
    whole = read_sound(path, stream, 0, None)
    t = np.concatenate([block.raw.t for block in whole])
    rest = read_sound(path, stream, skip, round(t[skip - 1] * 1e6))
    assert [line for block in rest for line in block.lines] == list(range(skip + 1, len(t) + 1))
    assert np.concatenate([block.raw.t for block in rest]).tobytes() == t[skip:].tobytes()
    for field in ("mel0", "mel15"):
        before, after = (np.concatenate([b.raw.values[field] for b in part]) for part in (whole, rest))
        assert after.tobytes() == before[skip:].tobytes()


@pytest.mark.parametrize("kind", ["image", "sound"])
@pytest.mark.usefixtures("quick")
def test_a_file_that_cannot_be_moved_is_moved_later_and_not_repeated(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: MediaFormat = SMALL if kind == "image" else SOUND
    content = picture((6, 8, 3)) if kind == "image" else write_wav(tmp_path / "x.wav", tone(440)).read_bytes()
    move, failures = WatchedFolder.move_to_done, ["the folder's medium is gone"]

    def unreliable(folder: WatchedFolder, claimed: str, name: str) -> None:
        if failures:
            raise OSError(failures.pop())
        move(folder, claimed, name)

    monkeypatch.setattr(WatchedFolder, "move_to_done", unreliable)
    put(tmp_path, "a.png" if kind == "image" else "a.wav", content, 1_764_000_000)
    with watching(tmp_path, made) as station:
        wait_until("moved at last", partial(are_in, tmp_path, "done", 1))
        rows = len(taken(station).t)
    assert failures == []
    assert notes(tmp_path)[0][1:] == ["1", str(rows)]
    assert len(notes(tmp_path)) == 1


@pytest.mark.usefixtures("quick")
def test_rows_of_another_producer_are_no_part_of_an_image(tmp_path: Path) -> None:
    with watching(tmp_path) as station, station.line() as line:
        line.send({"stream": "camera", "columns": {"pixel0": [0.1]}})
        [(number, reason)] = [(r["line"], r["reason"]) for r in line.through(1)["rejected"]]
    assert (number, reason) == (1, "stream 'camera' takes whole files only; put them into its folder")


_WATCHER = """\
import sys, time
from pathlib import Path
from outstation.device.intake.sources import files
from outstation.device.config import Duration
from tests.device.intake import test_sources_media as here
from tests.kit.killed_watcher import kill_with_a_file_in_hand
from tests.kit.stations import Station, conf

files._SETTLED_S = 0.0
folder, made = Path(sys.argv[1]), {"image": here.SMALL, "sound": here.SOUND}[sys.argv[2]]
stream = here.stream_of(folder, made, 0.01)
made = conf(folder / "d", 0.001, camera=stream)
with Station(made, sources=lambda store: [files.FolderWatcher("camera", stream, stream.source, store, folder / "d")]):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["image", "sound"])
def test_media_files_are_ingested_once_over_repeated_kills(tmp_path: Path, kind: str) -> None:
    rng = random.Random(4)
    made: MediaFormat = SMALL if kind == "image" else SOUND
    count = 90 if kind == "image" else 3
    for index in range(count):
        if kind == "image":
            put(tmp_path, f"{index:03}.png", picture((6, 8, 3), seed=index), 1_764_000_000 + index)
        else:
            samples = np.random.default_rng(index).normal(0, 0.1, 60 * RATE)
            content = write_wav(tmp_path / "x.wav", samples).read_bytes()
            put(tmp_path, f"{index}.wav", content, 1_764_000_000 + index * 60)
    command = [sys.executable, "-c", _WATCHER, str(tmp_path), kind]
    interrupted = kill_with_a_file_in_hand(command, tmp_path / "in", count, 3, rng)
    store, stream = open_store(tmp_path / "d"), stream_of(tmp_path, made)
    store.declare_streams({"camera": stream})
    rows = np.stack(rows_of(store, "camera", stream).columns, axis=1)
    store.close()
    whole = notes(tmp_path)
    assert len(whole) == count
    assert sorted(int(first) for _, first, _ in whole)[0] == 1
    spans = sorted((int(first), int(last), name) for name, first, last in whole)
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] == len(rows)
    for first, last, name in spans:
        path = tmp_path / "in" / "done" / name
        expected = (
            images.read_rows(path, made)
            if isinstance(made, ImageFormat)
            else sound.compute_mel_rows(read_samples(path), made)
        )
        assert rows[first - 1 : last].tobytes() == expected.tobytes()
    assert interrupted > 0


# --- config


def test_a_missing_pillow_or_an_image_too_large_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = stream_of(tmp_path, ImageFormat(width=800, height=800))
    with pytest.raises(ConfigError, match=r"streams\.camera\.source\.image: an image takes 7,686,400 bytes, the store"):
        media_reader.check_config("o.toml", "camera", large, 2**30)
    media_reader.check_config("o.toml", "camera", stream_of(tmp_path, ImageFormat(width=224, height=224)), 2**30)
    monkeypatch.setattr(images, "is_pillow_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"source\.image: images need Pillow: pip install 'outstation\[images"):
        media_reader.check_config("o.toml", "camera", stream_of(tmp_path, SMALL), 2**30)

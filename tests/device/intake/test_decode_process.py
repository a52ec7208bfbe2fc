"""Decode process: a file that takes too much memory, or ends its reader, costs that process and no other."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.device.config.sources import FilesSource
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake import decode_process, decoded_blocks
from outstation.device.intake.decode_process import DecodeProcess, DecoderDied
from outstation.device.intake.decoded_blocks import DecodedBlock, PackedColumn
from outstation.device.intake.file_reader import FileBlock, read_blocks
from outstation.device.intake.sources.file_marker import FileMarker
from outstation.device.store.rows import validate_columns
from outstation.foundation.errors import RowRejected, UsageError
from outstation.foundation.media import ImageFormat, MediaFormat, SoundFormat
from scripts.kit.process_stats import memory_kb
from tests.kit.stations import ROOT

pytestmark = pytest.mark.attack("files")

STREAM = StreamConfig(
    fields=[
        FieldConfig(name="n", type="i64"),
        FieldConfig(name="x", optional=True),
        FieldConfig(name="s", type="category", optional=True),
    ]
)
IMAGE = ImageFormat(width=8, height=6)
SOUND = SoundFormat(rate=16_000, window=512, hop=256, mels=8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB of memory are left for decoding."""
    monkeypatch.setattr(decode_process, "_MAX_MEMORY_BYTES", 64 << 20)


def decode(path: Path, stream: StreamConfig = STREAM, skip: int = 0) -> list[FileBlock]:
    process, file = DecodeProcess("s", stream), os.open(path, os.O_RDONLY)
    try:
        return list(process.decode(file, path.name, skip))
    finally:
        os.close(file)
        process.close()


@pytest.mark.parametrize("skip", [0, 3])
def test_rows_are_those_that_this_process_would_read(tmp_path: Path, skip: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b't,n,x,s\n1,1,0.5,a\n2,2,,"b\n1,x,1,\n,4,1,c\n5,5,1,\xff\n6,' + b"9" * 40 + b",1,\n7,7,nan,d\n")
    with path.open("rb") as file:
        expected = read_both(read_blocks(path, file, "s", STREAM, skip))
    assert read_both(decode(path, skip=skip)) == expected
    assert expected[1]


def read_both(blocks: Any) -> tuple[list[int], list[int]]:
    """Return the lines of valid and of rejected rows."""
    valid: list[int] = []
    rejected: list[int] = []
    for block in blocks:
        checked = validate_columns(block.raw, STREAM, 0, None)
        valid += [line for i, line in enumerate(block.lines) if i not in checked.rejected]
        rejected += [*block.rejected, *(block.lines[i] for i in checked.rejected)]
    return valid, sorted(rejected)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "png", "jpg", "wav"])
def test_the_process_is_confined_and_decodes_each_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("BROKER_PASSWORD", "token")
    path = tmp_path / f"a.{suffix}"
    stream, rows = write_sample(path)
    with contextlib.closing(DecodeProcess("s", stream)) as process:
        with path.open("rb") as file:
            blocks = list(process.decode(file.fileno(), path.name))
        assert [sum(block.raw.n for block in blocks), sum(len(block.rejected) for block in blocks)] == [rows, 0]
        assert process._child is not None
        proc = Path(f"/proc/{process._child.pid}")
        assert "Seccomp:\t2\n" in (proc / "status").read_text(encoding="ascii")
        assert b"token" not in (proc / "environ").read_bytes()
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b'\xff"')
        with path.open("rb") as file:
            problems = read_problems(process.decode(file.fileno(), path.name))
        # The decoder names the damage: it asked for nothing that is not allowed.
        assert problems
        assert "not permitted" not in problems
        assert process._child.poll() is None


@pytest.fixture
def without_seccomp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes find no libseccomp, as on a machine without the package."""
    hook = tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import ctypes\nopen_library = ctypes.CDLL.__init__\n"
        "def refuse(self, name, *rest, **options):\n"
        "    if name and 'seccomp' in str(name): raise OSError('no such library')\n"
        "    open_library(self, name, *rest, **options)\n"
        "ctypes.CDLL.__init__ = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{hook.parent}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("without_seccomp")
@pytest.mark.parametrize("required", [True, False])
def test_where_nothing_can_confine_it_a_required_confinement_decodes_no_file(tmp_path: Path, required: bool) -> None:
    path = tmp_path / "a.csv"
    stream, rows = write_sample(path)
    process, file = DecodeProcess("s", stream, must_be_confined=required), os.open(path, os.O_RDONLY)
    try:
        if required:
            with pytest.raises(OSError, match=r"libseccomp.so.2 is missing.*confinement is \"required\""):
                list(process.decode(file, path.name))
        else:
            assert sum(block.raw.n for block in process.decode(file, path.name)) == rows
    finally:
        os.close(file)
        process.close()


def read_problems(blocks: Iterator[FileBlock]) -> str:
    """Return the reasons of what a file's decoder rejects."""
    problems: list[str] = []
    try:
        for block in blocks:
            problems += block.rejected.values()
    except (RowRejected, UsageError) as problem:
        problems.append(str(problem))
    return "\n".join(problems)


def write_sample(path: Path) -> tuple[StreamConfig, int]:
    """Write a valid file in the format of its suffix; return its stream and number of rows."""
    n = 20_000
    match path.suffix:
        case ".csv":
            path.write_text("n,s\n" + "".join(f"{i},a\n" for i in range(n)))
        case ".jsonl":
            path.write_text("".join(f'{{"n":{i},"s":"é"}}\n' for i in range(n)))
        case ".parquet":
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.table({"n": np.arange(n), "s": ["a"] * n}), path, compression="zstd")
        case ".wav":
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, SOUND.rate, 0, "NONE", ""))
                file.writeframes(bytes(2 * (SOUND.window + 9 * SOUND.hop)))
            return make_media_stream(SOUND), 10
        case _:
            pillow = pytest.importorskip("PIL.Image")
            pillow.effect_noise((300, 200), 50).save(path)
            return make_media_stream(IMAGE), IMAGE.height
    return STREAM, n


def make_media_stream(media: MediaFormat) -> StreamConfig:
    kind = {"image": media} if isinstance(media, ImageFormat) else {"sound": media}
    fields = [FieldConfig(name=name) for name in media.columns]
    return StreamConfig(fields=fields, source=FilesSource(folder="", **kind))


def write_large_image(path: Path) -> Path:
    """Write an image of few bytes and many pixels."""
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (7000, 7000)).save(path)
    return path


@pytest.mark.usefixtures("small")
def test_a_small_image_of_many_pixels_is_rejected_by_its_header(tmp_path: Path) -> None:
    path = write_large_image(tmp_path / "bomb.png")
    assert path.stat().st_size < 400_000
    with pytest.raises(UsageError, match=r"^7000 x 7000 pixels need 373 MiB of memory, 64 MiB are left"):
        decode(path, make_media_stream(IMAGE))


_UNLIMITED = """
import sys
from pathlib import Path
from outstation.device.config import StreamConfig
from outstation.device.intake import media_reader
from outstation.foundation.media import ImageFormat
from outstation.ml.model.sandbox import memory
from tests.device.intake.test_decode_process import IMAGE, make_media_stream
path, before = Path(sys.argv[1]), memory.peak_bytes()
with path.open("rb") as file:
    list(media_reader.read_blocks(path, file, 0, make_media_stream(IMAGE), 0, None, 1 << 40))
print((memory.peak_bytes() - before) >> 20)
"""


@pytest.mark.attack("files", control=True)
def test_without_a_limit_a_small_image_takes_hundreds_of_megabytes(tmp_path: Path) -> None:
    path = write_large_image(tmp_path / "bomb.png")
    done = subprocess.run([sys.executable, "-c", _UNLIMITED, path], capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) > 140, done.stderr


@pytest.mark.usefixtures("small")
def test_a_parquet_file_of_long_repeated_texts_takes_bounded_memory(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "bomb.parquet"
    texts = arrow.DictionaryArray.from_arrays(np.zeros(60_000, np.int32), ["x" * 60_000])
    parquet.write_table(arrow.table({"n": np.arange(60_000), "s": texts}), path)
    process, file = DecodeProcess("s", STREAM), os.open(path, os.O_RDONLY)
    try:
        assert sum(len(block.rejected) for block in process.decode(file, path.name)) == 60_000
        assert process._child is not None
        assert memory_kb(process._child.pid, "VmHWM") < 400_000
    finally:
        process.close()
        os.close(file)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_line_without_end_is_rejected_and_not_held(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"n":1}\n{"n":' if name.endswith("jsonl") else b"n\n1\n")
        file.truncate(1 << 30)
    with pytest.raises(RowRejected, match="a row is longer than 1 MiB"):
        decode(path)


def test_a_process_that_is_killed_in_the_middle_of_a_file_is_named_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("n\n" + "".join(f"{i}\n" for i in range(400_000)))
    process, file = DecodeProcess("s", STREAM), os.open(path, os.O_RDONLY)
    try:
        blocks = process.decode(file, path.name)
        next(blocks)
        assert process._child is not None
        os.kill(process._child.pid, signal.SIGKILL)
        with pytest.raises(DecoderDied, match="ended with SIGKILL"):
            list(blocks)
        os.lseek(file, 0, os.SEEK_SET)
        assert sum(block.raw.n for block in process.decode(file, path.name)) == 400_000
    finally:
        os.close(file)
        process.close()


def test_what_was_in_hand_at_two_deaths_in_a_row_is_known(tmp_path: Path) -> None:
    path, died = tmp_path / "reading.s", []
    for deaths in range(2):
        marker = FileMarker(path)
        assert marker.count_deaths("1.a.csv", 7) == deaths
        # Left set, as by a death.
        died.append(marker.guard("1.a.csv", 7))
        died[-1].__enter__()
    assert FileMarker(path).count_deaths("1.a.csv", 7) == 2
    assert FileMarker(path).count_deaths("1.a.csv", 8) == 0
    with FileMarker(path).guard("1.a.csv", 7):
        pass
    assert FileMarker(path).count_deaths("1.a.csv", 7) == 0


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"{", b"\xff" * 9])
def test_a_damaged_marker_counts_for_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    assert FileMarker(tmp_path / "m").count_deaths("a", 0) == 0


# --- a process that hostile bytes have taken over


def pack(values: list[Any], dtype: Any = "<i8") -> PackedColumn:
    return PackedColumn(dtype, np.array(values, dtype).tobytes())


ROWS: dict[str, PackedColumn | list[str]] = {"n": pack([1]), "x": pack([0.5], "<f4"), "s": ["a"]}
HOSTILE_TABLES = [
    DecodedBlock(0, None, pack([]), {}),
    DecodedBlock(2, None, pack([1]), {}, ROWS),
    DecodedBlock(1, None, pack([0]), {}, ROWS),
    DecodedBlock(1, None, pack([2**53 + 1]), {}, ROWS),
    DecodedBlock(2, None, pack([1, -(2**63)]), {}, ROWS),
    DecodedBlock(3, None, pack([1, 5, 5]), {}, ROWS),
    DecodedBlock(1, None, pack([np.nan], "<f8"), {}, ROWS),
    DecodedBlock(0, None, pack([]), {0: "a"}),
    DecodedBlock(0, None, pack([]), {2**63: "a"}),
    DecodedBlock(1, pack([1.0, 2.0], "<f8"), pack([1]), {}, ROWS),
    DecodedBlock(1, pack([1.0], "<f8"), pack([1]), {}, matrix=pack([1, 2, 3], "<f4")),
]
PIXELS = pack([0.5] * len(IMAGE.columns), "<f4")
HOSTILE_IMAGES = [
    DecodedBlock(0, pack([], "<f8"), pack([]), {}, matrix=pack([], "<f4")),
    DecodedBlock(0, pack([], "<f8"), pack([]), {1: "a"}, matrix=pack([], "<f4")),
    *(DecodedBlock(1, pack([t], "<f8"), pack([1]), {}, matrix=PIXELS) for t in (np.nan, np.inf, -np.inf, 1e300)),
    DecodedBlock(1, pack([-(2**63)]), pack([1]), {}, matrix=PIXELS),
    DecodedBlock(1, None, pack([1]), {}, matrix=PIXELS),
    DecodedBlock(1, pack([1.0], "<f8"), pack([1]), {}, ROWS),
]


@pytest.mark.parametrize(
    ("stream", "block"),
    [
        *((STREAM, block) for block in HOSTILE_TABLES),
        *((make_media_stream(IMAGE), block) for block in HOSTILE_IMAGES),
    ],
)
def test_a_hostile_decoders_block_is_refused(stream: StreamConfig, block: DecodedBlock) -> None:
    with pytest.raises(ValueError, match=r"^(it|its) "):
        decoded_blocks.unpack(block, stream)


def test_a_hostile_decoder_that_sends_a_byte_now_and_then_does_not_delay_its_deadline() -> None:
    process, (ours, theirs) = DecodeProcess("s", STREAM, answer_timeout_s=0.3), socket.socketpair()
    stopped = threading.Event()

    def trickle() -> None:
        theirs.sendall((1000).to_bytes(4, "little"))
        while not stopped.wait(0.05):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    with ours, theirs:
        thread.start()
        try:
            with pytest.raises(DecoderDied, match=r"could not be decoded within 0\.3 s"):
                process._receive(ours)
        finally:
            stopped.set()
            thread.join()

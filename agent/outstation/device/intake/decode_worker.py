"""Process that decodes the files of a stream: confined, and with the memory that it is given.

The daemon passes each file as an open descriptor. The process imports all that decoders need before it is confined.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import signal
import socket
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from msgspec.structs import replace

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.intake import decoded_blocks, file_reader, media_reader
from outstation.device.intake.decoded_blocks import DecodedBlock, DecodeEnd, DecodeRequest, DecoderSetup
from outstation.foundation import decoders
from outstation.foundation.errors import RowRejected, UsageError
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.foundation.text import printable
from outstation.ml.model.inference import images
from outstation.ml.model.sandbox import memory
from outstation.ml.model.sandbox.confinement import ConfinementError, confine

_PR_SET_PDEATHSIG = 1
_MAX_TEXT_CHARS = 1000
# Of its socket: requests and descriptors in, answers out.
_CHANNEL_CALLS = ("recv", "recvfrom", "recvmsg", "send", "sendto")
_TABLES = {
    "a.csv": b"n,s\n1,a\n",
    "b.csv": b't,n,s\n2026-01-01,1,"a"\nx,2,\xff\n',
    # A name that is no field: the hint at a similar one needs a module of its own.
    "c.csv": b"m,s\n1,a\n",
    "a.jsonl": b'{"t":"2026-01-01T00:00:00Z","n":1,"s":"a"}\n{"n":1,"n":2}\n{\n',
}


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    data = decoded_blocks.receive(channel)
    if data is None:
        return
    setup = decoders.from_msgpack(data, DecoderSetup)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != setup.parent_pid:
        return
    # When the machine runs out of memory, the kernel kills this process before the daemon.
    Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    _import_decoders(setup)
    memory.limit_growth(setup.memory_bytes)
    try:
        confine(_CHANNEL_CALLS)
    except ConfinementError as error:
        # A kernel without seccomp filters leaves it the limits.
        if setup.must_be_confined:
            text = f'this machine cannot confine it ({error}), and [models] confinement is "required"'
            decoded_blocks.send(channel, DecodeEnd("os", text, errno.EPERM))
            return
    # Ready.
    decoded_blocks.send(channel, DecodeEnd())
    while (received := decoded_blocks.receive_with_file(channel)) is not None:
        request = decoders.from_msgpack(received[0], DecodeRequest)
        with open(received[1], "rb") as file:
            decoded_blocks.send(channel, _decode(channel, file, request, setup))


def _decode(channel: socket.socket, file: BinaryIO, request: DecodeRequest, setup: DecoderSetup) -> DecodeEnd:
    path = Path(request.name) if request.name else None
    try:
        for block in _read_blocks(path, file, request, setup):
            decoded_blocks.send(channel, block)
    except RowRejected as problem:
        return DecodeEnd("rows", _shorten(str(problem)))
    except UsageError as problem:
        return DecodeEnd("usage", _shorten(str(problem).removeprefix(f"{request.name}: ")))
    except MemoryError:
        limit = setup.memory_bytes >> 20
        return DecodeEnd("usage", f"needs more than the {limit:,} MiB of memory that are left for it; make it smaller")
    except OSError as error:
        return DecodeEnd("os", _shorten(str(error.strerror or error)), error.errno or 0)
    return DecodeEnd()


def _read_blocks(path: Path | None, file: Any, request: DecodeRequest, setup: DecoderSetup) -> Iterator[DecodedBlock]:
    stream, limit = setup.stream, setup.memory_bytes
    if stream.media_format is None:
        for block in file_reader.read_blocks(path, file, setup.name, stream, request.skip, limit, request.layout):
            yield decoded_blocks.pack_table_block(block, stream, show_values=setup.show_values)
        return
    assert path is not None
    modified_us, skip, last_us = request.modified_us, request.skip, request.last_us
    for block in media_reader.read_blocks(path, file, modified_us, stream, skip, last_us, limit):
        yield decoded_blocks.pack_media_block(block)


def _shorten(text: str) -> str:
    return printable(text[:_MAX_TEXT_CHARS])


def _import_decoders(setup: DecoderSetup) -> None:
    """Decode small files of each format, so that no library imports anything later."""
    stream, samples = setup.stream, _TABLES
    if stream.media_format is None:
        stream = StreamConfig(fields=[FieldConfig("n"), FieldConfig("s", type="category", optional=True)])
        if setup.with_parquet:
            with contextlib.suppress(ImportError):
                samples = {**samples, "a.parquet": _make_parquet()}
    elif isinstance(stream.media_format, ImageFormat):
        samples = images.make_samples()
    else:
        samples = {"a.wav": _make_wav(stream.media_format)}
    setup = replace(setup, fields=stream.fields)
    for name, content in samples.items():
        sample = os.memfd_create("sample", os.MFD_CLOEXEC)
        os.pwrite(sample, content, 0)
        with open(sample, "rb") as file, contextlib.suppress(RowRejected):
            for _ in _read_blocks(Path(name), file, DecodeRequest(name, 0, 0, None), setup):
                pass


def _make_parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    # One thread of one library: the address space is limited.
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    out = io.BytesIO()
    times = pyarrow.array([0, 1], pyarrow.timestamp("us", "UTC"))
    parquet.write_table(pyarrow.table({"n": [1.5, None], "s": ["a", None], "t": times}), out)
    return out.getvalue()


def _make_wav(media: SoundFormat) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(media.rate)
        file.writeframes(bytes(2 * media.window))
    return out.getvalue()


if __name__ == "__main__":
    main()

"""Decode process: decodes the files of a stream in a confined child, one file after another.

Hostile bytes can end that process, or take the memory it was given; the daemon keeps running. The process starts with
the first file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from outstation.device.config import StreamConfig
from outstation.device.intake import decoded_blocks
from outstation.device.intake.decoded_blocks import Answer, DecodedBlock, DecodeEnd, DecodeRequest, DecoderSetup
from outstation.device.intake.file_reader import AS_STREAM, FileBlock, FileLayout
from outstation.foundation import decoders
from outstation.foundation.errors import RowRejected, UsageError
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.ml.datasets.formats import PARQUET_SUFFIXES
from outstation.ml.model.sandbox import available_memory, child_process
from outstation.ml.model.sandbox.child_process import child_environment

_WORKER = "outstation.device.intake.decode_worker"
# Half of the memory that is left, between these: the daemon and what else runs need theirs.
_MIN_MEMORY_BYTES, _MAX_MEMORY_BYTES = 32 << 20, 512 << 20
_ANSWER_TIMEOUT_S = 120.0
_IDLE_S = 30.0
# Errors of the machine that may pass, where the process reads a file that is open already.
_PASSING_ERRNOS = {errno.ENOMEM, errno.EIO}
# One allocator and one thread: address space is limited.
_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_ANSWERS: msgspec.msgpack.Decoder[Answer] = decoders.msgpack_decoder(Answer)


class DecoderDied(UsageError):
    """The process ended or did not answer while it decoded a file."""


class DecoderFailed(OSError):
    """The process reports an error of the machine that may pass; a hostile one may report it for ever."""


class DecodeProcess:
    """Child process for the files of stream `name`. Used by one thread at a time; close it.

    `must_be_confined`: decode nothing where the machine cannot confine a process, see [models] confinement.
    `answer_timeout_s`: longest wait for a block; None where the file may be a pipe.
    """

    def __init__(
        self,
        name: str,
        stream: StreamConfig,
        *,
        show_values: bool = False,
        must_be_confined: bool = False,
        answer_timeout_s: float | None = _ANSWER_TIMEOUT_S,
    ) -> None:
        self._name, self._stream = name, stream
        # The process gets no more of the stream than its fields.
        self._show_values = show_values and not stream.has_protected_fields
        self._must_be_confined = must_be_confined
        self._answer_timeout_s = answer_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._used_s, self._with_parquet = 0.0, False

    def decode(
        self, file: int, name: str, skip: int = 0, last_us: int | None = None, layout: FileLayout = AS_STREAM
    ) -> Iterator[FileBlock]:
        """Yield the blocks of the open `file` as `file_reader.read_blocks` or `media_reader.read_blocks` do.

        Raises RowRejected, UsageError as these do; DecoderDied; DecoderFailed, OSError.
        """
        channel = self.start(name)
        request = DecodeRequest(name, os.fstat(file).st_mtime_ns // 1000, skip, last_us, layout)
        is_finished = False
        try:
            try:
                channel.settimeout(self._answer_timeout_s)
                decoded_blocks.send(channel, request, [file])
            except OSError:
                raise self._make_death_error() from None
            while isinstance(answer := self._receive(channel), DecodedBlock):
                try:
                    block = decoded_blocks.unpack(answer, self._stream)
                except ValueError as problem:
                    raise DecoderDied(f"the process that decodes it sent an invalid answer ({problem})") from None
                del answer
                yield block
            is_finished = True
        finally:
            self._used_s = time.monotonic()
            if not is_finished:
                # It is at an unknown place of the file.
                self.close()
        _raise_end(answer)

    def close(self) -> None:
        """End the process. Any thread may call it: who waits for an answer then gets DecoderDied."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()

    def close_if_idle(self) -> None:
        """End a process that had no file for a while, for its memory."""
        if self._child is not None and time.monotonic() - self._used_s > _IDLE_S:
            self.close()

    def start(self, name: str) -> socket.socket:
        """Start a process that decodes file `name`, unless one runs, and wait for it. Raises OSError.

        A process that reads Parquet takes 80 MB more.
        """
        with_parquet = Path(name).suffix.lower() in PARQUET_SUFFIXES
        is_alive = self._child is not None and self._child.poll() is None
        if self._channel is not None and is_alive and (self._with_parquet or not with_parquet):
            return self._channel
        self.close()
        self._with_parquet = with_parquet
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # -P: never import an `agent` package from the current folder.
                command = [sys.executable, "-P", "-m", _WORKER, str(theirs.fileno())]
                with child_process.blocked_signals():
                    self._child = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                        env=child_environment() | _ENVIRONMENT,
                    )
            except BaseException:
                ours.close()
                raise
        self._channel = ours
        ours.settimeout(self._answer_timeout_s)
        media = self._stream.media_format
        setup = DecoderSetup(
            self._name,
            self._stream.fields,
            media if isinstance(media, ImageFormat) else None,
            media if isinstance(media, SoundFormat) else None,
            with_parquet,
            self._show_values,
            self._must_be_confined,
            max(_MIN_MEMORY_BYTES, min(_MAX_MEMORY_BYTES, available_memory.available_bytes() // 2)),
            os.getpid(),
        )
        try:
            decoded_blocks.send(ours, setup)
            ready = self._receive(ours)
            if isinstance(ready, DecodeEnd) and ready.kind:
                raise DecoderDied(ready.text)
        except (OSError, DecoderDied) as problem:
            self.close()
            raise OSError(errno.EAGAIN, f"the process that decodes files does not start: {problem}") from None
        return ours

    def _receive(self, channel: socket.socket) -> Answer:
        """Raise DecoderDied if no answer comes."""
        try:
            data = decoded_blocks.receive(channel, self._answer_timeout_s)
        except TimeoutError:
            raise DecoderDied(f"could not be decoded within {self._answer_timeout_s:g} s") from None
        except (OSError, ValueError):
            data = None
        if data is None:
            raise self._make_death_error()
        try:
            return _ANSWERS.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DecoderDied(f"the process that decodes it sent an invalid answer ({error})") from None

    def _make_death_error(self) -> DecoderDied:
        child, code = self._child, None
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(1)
        how = "ended" if code is None else f"ended with {child_process.describe_exit(code)}"
        return DecoderDied(f"the process that decodes it {how}; the file is damaged, or needs more memory than is left")


def _raise_end(end: DecodeEnd) -> None:
    match end.kind:
        case "rows":
            raise RowRejected(end.text)
        case "usage":
            raise UsageError(end.text)
        case "os" if end.errno in _PASSING_ERRNOS:
            raise DecoderFailed(end.errno, end.text)
        case "os":
            raise UsageError(f"cannot be read: {end.text}")

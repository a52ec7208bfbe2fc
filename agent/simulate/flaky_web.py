"""A repository over HTTP on loopback, as badly as sites in the field have it: cut off in the middle, slow, or away.

Each device has an address of its own, `http://127.0.0.1:PORT/DEVICE/…`, so that a bad line is one device's.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from urllib.parse import unquote, urlsplit

import msgspec

_CHUNK_BYTES = 16_384
_CHUNK_S = 0.1
_IDLE_S = 30.0
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_LINGER_RESET = struct.pack("ii", 1, 0)
# Shares of a download after which a line is cut: never at once, never when it is over.
_MIN_CUT_SHARE, _MAX_CUT_SHARE = 0.1, 0.9
# What is worth cutting; metadata are over before anything happens.
_TARGETS_PREFIX = "targets/"


class DeviceConnection(msgspec.Struct):
    """A device's way to the repository: so many `cuts` of downloads in all; `rate` in bytes a second, None: no limit.

    The last two are what came of it: bytes of targets that were sent, and downloads that were cut.
    """

    planned_cuts: int = 0
    bytes_per_s: float | None = None
    sent_bytes: int = 0
    cut_count: int = 0


@dataclass
class FlakyWebServer:
    """Serves `folder` on `port` (0: a free one) until `close`. `away` hangs up on everybody; it may be set at any time.

    A device without an entry in `lines` has a good one.
    """

    folder: Path
    seed: int = 0
    port: int = 0
    connections: dict[str, DeviceConnection] = field(default_factory=dict)
    offline: bool = False
    _rng: Random = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._rng = Random(self.seed)
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.web = self
        self.port = int(self._server.server_address[1])
        # A closed server leaves no thread behind, and no more than a moment late.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="repository", daemon=True)
        self._thread.start()

    def url(self, device: str) -> str:
        return f"http://127.0.0.1:{self.port}/{device}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def connection(self, device: str) -> DeviceConnection:
        with self._lock:
            return self.connections.setdefault(device, DeviceConnection())

    def bytes_until_cut(self, device: str, path: str, size: int) -> int:
        """So much of the next `size` bytes goes through."""
        line = self.connection(device)
        with self._lock:
            if not path.startswith(_TARGETS_PREFIX) or line.planned_cuts <= line.cut_count:
                return size
            line.cut_count += 1
            return round(size * self._rng.uniform(_MIN_CUT_SHARE, _MAX_CUT_SHARE))

    def resolve_file(self, path: str) -> Path | None:
        """What `path` names inside the folder; None where it names nothing, or something outside."""
        found = (self.folder / path).resolve()
        return found if found.is_relative_to(self.folder.resolve()) and found.is_file() else None


class _Server(ThreadingHTTPServer):
    # As many devices as there are may call at once.
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False
    web: FlakyWebServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A device that hangs up is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S
    server: _Server

    def do_GET(self) -> None:
        web = self.server.web
        if web.offline:
            self._reset()
            return
        device, _, path = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        found = web.resolve_file(path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = found.read_bytes()
        span = self._parse_range(len(content))
        if span is None:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        self._send_headers(*span, len(content))
        self._send_body(device, path, content[span[0] : span[1]])

    def _parse_range(self, size: int) -> tuple[int, int] | None:
        """First byte and end of what is asked for; None where that is not there."""
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None:
            return 0, size
        first, end = int(asked[1]), min(int(asked[2]) + 1, size) if asked[2] else size
        return (first, end) if first < end else None

    def _send_headers(self, first: int, end: int, size: int) -> None:
        part = self.headers.get("Range") is not None
        self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - first))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        self.end_headers()

    def _send_body(self, device: str, path: str, body: bytes) -> None:
        web, line = self.server.web, self.server.web.connection(device)
        through, at = web.bytes_until_cut(device, path, len(body)), 0
        while at < through and not web.offline:
            # Both may change meanwhile: a line that is mended is fast from there on.
            rate = line.bytes_per_s if path.startswith(_TARGETS_PREFIX) else None
            size = _CHUNK_BYTES if rate is None else max(1, round(rate * _CHUNK_S))
            piece = body[at : min(at + size, through)]
            line.sent_bytes += len(piece) if path.startswith(_TARGETS_PREFIX) else 0
            self.wfile.write(piece)
            at += len(piece)
            if rate is not None:
                time.sleep(len(piece) / rate)
        if through < len(body) or web.offline:
            self._reset()

    def _reset(self) -> None:
        """As a line that breaks: no more bytes, and no orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """The report says what came of each line."""

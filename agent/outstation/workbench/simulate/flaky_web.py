"""Flaky web server: serves a repository on loopback over bad connections, cut, slow or offline.

Each device has its own address, `http://127.0.0.1:PORT/DEVICE/…`, and so its own connection quality.
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
# Shares of a download after which a connection is cut: never at its start or end.
_MIN_CUT_SHARE, _MAX_CUT_SHARE = 0.1, 0.9
# Only targets are cut; metadata files are too small.
_TARGETS_PREFIX = "targets/"


class DeviceConnection(msgspec.Struct):
    """Connection of a device: number of downloads to cut, and rate limit (None: none).

    `sent_bytes` of targets and `cut_count` are counted.
    """

    planned_cuts: int = 0
    bytes_per_s: float | None = None
    sent_bytes: int = 0
    cut_count: int = 0


@dataclass
class FlakyWebServer:
    """Serves `folder` on `port` (0: a free one) until `close`; `offline`, which may change, drops all connections.

    A device without an entry in `connections` has a good connection.
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
        # The poll interval of 0.1 s bounds how long `close` takes.
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
        """Return how many of the next `size` bytes to send before a cut."""
        connection = self.connection(device)
        with self._lock:
            if not path.startswith(_TARGETS_PREFIX) or connection.planned_cuts <= connection.cut_count:
                return size
            connection.cut_count += 1
            return round(size * self._rng.uniform(_MIN_CUT_SHARE, _MAX_CUT_SHARE))

    def resolve_file(self, path: str) -> Path | None:
        """Return the file that `path` names inside the folder; None if there is none, or it is outside."""
        file = (self.folder / path).resolve()
        return file if file.is_relative_to(self.folder.resolve()) and file.is_file() else None


class _Server(ThreadingHTTPServer):
    # All devices may connect at once.
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False
    web: FlakyWebServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a device that closes the connection."""


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
        file = web.resolve_file(path)
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = file.read_bytes()
        first, end, partial = 0, len(content), self.headers.get("Range") is not None
        if requested := _RANGE.fullmatch(self.headers.get("Range", "")):
            first, end = int(requested[1]), min(int(requested[2]) + 1, end) if requested[2] else end
            if first >= end:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - first))
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(content)}")
        self.end_headers()
        self._send_body(device, path, content[first:end])

    def _send_body(self, device: str, path: str, body: bytes) -> None:
        web, connection = self.server.web, self.server.web.connection(device)
        end, sent = web.bytes_until_cut(device, path, len(body)), 0
        while sent < end and not web.offline:
            # `offline` and the rate may change during a download.
            rate = connection.bytes_per_s if path.startswith(_TARGETS_PREFIX) else None
            size = _CHUNK_BYTES if rate is None else max(1, round(rate * _CHUNK_S))
            chunk = body[sent : min(sent + size, end)]
            connection.sent_bytes += len(chunk) if path.startswith(_TARGETS_PREFIX) else 0
            self.wfile.write(chunk)
            sent += len(chunk)
            if rate is not None:
                time.sleep(len(chunk) / rate)
        if end < len(body) or web.offline:
            self._reset()

    def _reset(self) -> None:
        """Reset the TCP connection: no more bytes, and no orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Log nothing; the report has the totals of each connection."""

"""Local web server for a folder, with hostile behaviour on request."""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_RANGE = re.compile(r"bytes=(\d+)-")
Trick = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request; `data` is the requested file, or None if missing, `start` the offset of its Range header."""

    protocol_version = "HTTP/1.1"
    server: _Listener

    def do_GET(self) -> None:
        web = self.server.web
        path = web.folder / unquote(self.path).lstrip("/")
        self.data = path.read_bytes() if path.is_file() else None
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        self.start = int(match[1]) if match else 0
        web.requests.append((self.path, self.start))
        trick = next((trick for pattern, trick in web.tricks if re.search(pattern, self.path)), Handler.serve)
        try:
            trick(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def serve(self, upto: int | None = None) -> None:
        """Send the file from `start` on; `upto` truncates it after that byte."""
        if self.data is None:
            self.send_error(404)
            return
        self.head(206 if self.start else 200, len(self.data) - self.start)
        self.wfile.write(self.data[self.start : upto])
        if upto is not None:
            self.wfile.flush()
            self.close_connection = True

    def answer(self, data: bytes) -> None:
        """Send these bytes instead of the file."""
        self.head(200, len(data))
        self.wfile.write(data)

    def endless(self) -> None:
        """Send zeros until the client disconnects."""
        self.head(200, None)
        while True:
            self.wfile.write(bytes(65_536))

    def drip(self) -> None:
        """Send the file slowly, byte by byte."""
        assert self.data is not None
        self.head(200, len(self.data))
        for byte in self.data:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def drip_headers(self) -> None:
        """Send endless headers."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            self.wfile.write(b"y")
            time.sleep(0.05)

    def whole(self) -> None:
        """Send the complete file, as a server without Range support does."""
        self.start = 0
        self.serve()

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        if status == 206:
            assert self.data is not None
            self.send_header("Content-Range", f"bytes {self.start}-{len(self.data) - 1}/{len(self.data)}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing, to keep the test output clean."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    web: Web

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that disconnect, which many tests cause."""


class Web:
    """Context manager that serves `folder`; `tricks` maps path patterns to other behaviour."""

    def __init__(self, folder: Path, tls: ssl.SSLContext | None = None) -> None:
        self.folder, self._tls = folder, tls
        self.tricks: list[tuple[str, Trick]] = []
        self.requests: list[tuple[str, int]] = []
        self._server = _Listener(("127.0.0.1", 0), Handler)
        self._server.web = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

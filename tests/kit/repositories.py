"""Fleet repositories for tests: a depot, an HTTP server for it, and the client of python-tuf."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tuf.ngclient import Updater

from outstation.fleet.repository import create, publish
from outstation.fleet.repository.layout import Layout
from outstation.fleet.repository.publish import PublishResult
from scripts.kit import bundles
from scripts.kit.bundles import KEY


@dataclass
class Depot:
    """Fleet folder with a repository."""

    folder: Path
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = Layout(self.folder)

    def create(self, roots: int = 1, threshold: int = 1) -> Depot:
        create.create(self.folder, roots=roots, threshold=threshold)
        return self

    def publish(self, bundle: Path, **more: Any) -> PublishResult:
        """Publish a bundle of the tests' publisher, without a probe for speed."""
        return publish.publish(self.folder, bundle, [KEY.public], **{"run_probe": False, **more})

    def copy(self, folder: Path) -> Depot:
        shutil.copytree(self.folder, folder)
        return Depot(folder)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder by HTTP and yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Client:
    """Device with the root of its enrolment and the metadata it has learned since."""

    home: Path
    url: str
    root: bytes

    def fetch_target(self, target: str | None = None) -> bytes | None:
        """Refresh and download a target; return None if the repository does not list it."""
        for folder in ("metadata", "targets"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        updater = Updater(
            str(self.home / "metadata"),
            f"{self.url}/metadata/",
            str(self.home / "targets"),
            f"{self.url}/targets/",
            bootstrap=self.root,
        )
        updater.refresh()
        if target is None or (info := updater.get_targetinfo(target)) is None:
            return None
        return Path(updater.download_target(info)).read_bytes()


def version(folder: Path, made: Path, number: str, name: str = "tiny") -> Path:
    """Return a copy of the bundle `made` with another version, signed again."""
    copied = folder / f"{name}-{number}"
    shutil.copytree(made, copied)
    bundles.change_manifest(copied, lambda head: head.update(version=number, name=name))
    return copied

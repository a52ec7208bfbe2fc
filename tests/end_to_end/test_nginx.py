"""The guides' lines for nginx, in a real nginx: the repository for devices, and the dashboard behind a sign-in."""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from outstation.fleet.cli.group import fleet
from outstation.fleet.enrolment import pki
from outstation.workbench.testing.broker import free_port
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import find_program
from tests.kit.stations import ROOT

pytestmark = pytest.mark.process
BLOCK = re.compile(r"^```nginx\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What Debian's /etc/nginx/nginx.conf says around a server, with all files in a folder of the test.
CONF = """
user root;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


class Nginx:
    """nginx with the lines of a page; `replaced` maps addresses and paths of the page to those of the test."""

    def __init__(self, folder: Path, page: str, replaced: dict[str, str]) -> None:
        self._binary = find_program("nginx")
        self._folder, self.port = folder, free_port()
        folder.mkdir()
        [server] = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
        [self.host] = re.findall(r"server_name (\S+);", server)
        authority = pki.create_authority("acme")
        issued = authority.issue_server(self.host)
        for name, content in (("ca", authority.pem), ("certificate", issued.certificate), ("key", issued.key)):
            (folder / name).write_bytes(content)
        for pattern, text in {
            r"(?<=listen )443(?= ssl;)": f"127.0.0.1:{self.port}",
            r"(?<=ssl_certificate ) *\S+(?=;)": str(folder / "certificate"),
            r"(?<=ssl_certificate_key )\S+(?=;)": str(folder / "key"),
            **{re.escape(old): new for old, new in replaced.items()},
        }.items():
            server, count = re.subn(pattern, text, server)
            assert count == 1, pattern
        self.conf = folder / "nginx.conf"
        self.conf.write_text(CONF.format(folder=folder, server=server), encoding="utf-8")

    def __enter__(self) -> Nginx:
        self._process = subprocess.Popen([self._binary, "-p", str(self._folder), "-c", str(self.conf)])
        try:
            wait_until("nginx answers", self._is_up)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, (self._folder / "error.log").read_text(encoding="utf-8")
        with contextlib.suppress(ConnectionRefusedError):
            return self.ask("GET", "/") is not None
        return False

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> Answer:
        """Return the answer of the host of the page's `server_name`, which is at 127.0.0.1."""
        context = ssl.create_default_context(cafile=self._folder / "ca")
        with (
            socket.create_connection(("127.0.0.1", self.port), 60) as plain,
            context.wrap_socket(plain, server_hostname=self.host) as encrypted,
        ):
            connection = http.client.HTTPConnection(self.host, self.port)
            connection.sock = encrypted
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            with connection.getresponse() as answer:
                kind = answer.headers.get_content_type()
                # A stream of events does not end.
                content = answer.readline() if kind == "text/event-stream" else answer.read()
                return Answer(answer.status, {name.lower(): text for name, text in answer.getheaders()}, content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    done = CliRunner().invoke(fleet, ["init", str(tmp_path / "acme"), "--broker", "mqtts://broker.example.org:8883"])
    assert done.exit_code == 0, done.output
    return tmp_path / "acme"


def test_nginx_with_the_lines_of_the_first_fleet_serves_the_repository_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    served = {"/srv/acme/repository/": f"{folder}/repository/"}
    with Nginx(tmp_path / "nginx", "start/first-fleet.md", served) as nginx:
        _check_repository(nginx, folder / "repository", "/acme/repository")
        for path in ("/acme/fleet.toml", "/acme/repository../fleet.toml", "/acme/repository/../fleet.toml"):
            assert nginx.ask("GET", path).status == 404, path
        assert nginx.ask("GET", "/acme/repository/%2e%2e/%2e%2e/acme/fleet.toml").status in (400, 404)


def test_nginx_with_the_lines_of_the_guide_to_updates_serves_a_copy_with_a_fresh_timestamp(
    folder: Path, tmp_path: Path
) -> None:
    copied = CliRunner().invoke(fleet, ["repository", "copy", str(tmp_path / "models"), "--dir", str(folder)])
    assert copied.exit_code == 0, copied.output
    with Nginx(tmp_path / "nginx", "guides/rollouts.md", {"/srv/models": str(tmp_path / "models")}) as nginx:
        _check_repository(nginx, tmp_path / "models" / "repository", "/repository")
        timestamp = nginx.ask("GET", "/repository/metadata/timestamp.json")
        assert timestamp.headers["cache-control"] == "no-cache"
        assert "cache-control" not in nginx.ask("GET", "/repository/metadata/1.root.json").headers


def _check_repository(nginx: Nginx, folder: Path, prefix: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"timestamp.json", "1.root.json"} <= {path.name for path in files}
    for path in files:
        answer = nginx.ask("GET", f"{prefix}/{path.relative_to(folder)}")
        assert (answer.status, answer.content) == (200, path.read_bytes()), path
    assert nginx.ask("GET", f"{prefix}/metadata/2.root.json").status == 404, (
        "a device knows that no newer root is there"
    )
    for method in ("POST", "PUT", "DELETE"):
        assert nginx.ask(method, f"{prefix}/metadata/1.root.json", "x").status in (403, 405), method
    assert nginx.ask("GET", f"{prefix}/").status in (403, 404), "no list of files"


@pytest.fixture
def proxied(folder: Path, tmp_path: Path) -> Iterator[Nginx]:
    """The dashboard of a fleet behind nginx, with the lines and the command of the guide."""
    for name, role in (("ada", "admin"), ("vera", "viewer")):
        added = CliRunner().invoke(fleet, ["user", "add", name, "--role", role, "--no-password", "--dir", str(folder)])
        assert added.exit_code == 0, added.output
    page, port = (ROOT / "docs/guides/dashboard.md").read_text(encoding="utf-8"), free_port()
    [command] = re.findall(r"outstation (fleet dashboard .*--proxy-header.*)", page)
    arguments = [*command.split(), "--listen", f"127.0.0.1:{port}", "--dir", str(folder)]
    people = "".join(f"{name}:{{PLAIN}}secret of {name}\n" for name in ("ada", "vera", "stranger"))
    (tmp_path / "people").write_text(people, encoding="utf-8")
    replaced = {"127.0.0.1:8480": f"127.0.0.1:{port}", "/etc/nginx/people": str(tmp_path / "people")}
    with Nginx(tmp_path / "nginx", "guides/dashboard.md", replaced) as nginx:
        process = subprocess.Popen([sys.executable, "-m", "outstation", *arguments], cwd=ROOT)
        try:
            wait_until("the dashboard answers", lambda: nginx.ask("GET", "/login", **_sign_in("ada")).status != 502)
            yield nginx
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()


def _sign_in(name: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:secret of {name}".encode()).decode()}


def test_behind_nginx_the_dashboard_knows_who_signed_in_there_and_nobody_else(proxied: Nginx) -> None:
    assert proxied.ask("GET", "/fleet").status == 401
    assert proxied.ask("GET", "/fleet", x_remote_user="ada").status == 401
    assert proxied.ask("GET", "/accounts", **_sign_in("ada")).status == 200
    assert proxied.ask("GET", "/accounts", **_sign_in("vera")).status == 403
    assert proxied.ask("GET", "/accounts", **_sign_in("vera"), x_remote_user="ada").status == 403, "nginx replaces it"
    assert proxied.ask("GET", "/fleet", **_sign_in("stranger")).status == 303
    form = {"content_type": "application/x-www-form-urlencoded", "sec_fetch_site": "same-origin"}
    origin = f"https://{proxied.host}:{proxied.port}"
    ended = proxied.ask("POST", "/accounts", "name=vera&action=end", **_sign_in("ada"), **form, origin=origin)
    assert ended.status in (200, 303), ended.content
    forged = {**form, "origin": "https://evil.example"}
    assert proxied.ask("POST", "/accounts", "name=vera&action=end", **_sign_in("ada"), **forged).status == 403


def test_behind_nginx_the_page_receives_events_at_once(proxied: Nginx) -> None:
    stream = proxied.ask("GET", "/events", **_sign_in("ada"))
    assert (stream.status, stream.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    assert stream.content != b""

"""A dashboard on loopback over a small fleet, in a thread, and requests to it as any client makes them."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from starlette.routing import Route

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.dashboard.plot import render_device_drift
from outstation.fleet.dashboard.app import create_app
from outstation.fleet.dashboard.pages.desk import OperatorDesk
from outstation.fleet.dashboard.pages.visit import Dashboard
from outstation.fleet.dashboard.security import passwords
from outstation.fleet.dashboard.security.access import AccessPolicy
from outstation.fleet.dashboard.security.guard import make_host_policy
from outstation.fleet.dashboard.server import Listener, create_server, open_socket
from outstation.fleet.database.dashboard import accounts
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation import clock
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire import keys
from outstation.workbench.testing.messages import FLEET, MODEL, MessageSender, SignedMessage, new_key
from outstation.workbench.testing.patience import TIMEOUT_S, wait_until

PASSWORD = "correct horse battery"
ROLES = {"vera": "viewer", "otto": "operator", "ada": "admin"}


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    content: bytes
    cookie: str

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    @property
    def location(self) -> str:
        return self.headers.get("location", "")


class ServedDashboard(msgspec.Struct):
    folder: Path
    store: FleetStore
    port: int
    dashboard: Dashboard
    sessions: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, cookie: str = "", **headers: str) -> Answer:
        return self.request("GET", path, None, cookie, headers)

    def post(self, path: str, form: Mapping[str, str], cookie: str = "", **headers: str) -> Answer:
        sent = {"sec-fetch-site": "same-origin", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.request("POST", path, urlencode(form), cookie, sent)

    def request(self, method: str, path: str, body: str | None, cookie: str, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        sent = {name.replace("_", "-"): value for name, value in headers.items() if value != "-"}
        if cookie:
            sent["cookie"] = cookie
        if body is not None:
            sent.setdefault("content-type", "application/x-www-form-urlencoded")
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            content = response.read()
        given = received.get("set-cookie", "").partition(";")[0]
        return Answer(response.status, received, content, given)

    def sign_in(self, name: str) -> str:
        """Return the cookie of a new session."""
        answer = self.post("/login", {"name": name, "password": PASSWORD})
        assert answer.status == 303, answer.text
        return answer.cookie

    def session(self, name: str) -> str:
        """Return the cookie of a session that tests share, since each sign-in costs a password hash."""
        if name not in self.sessions or self.get("/", self.sessions[name]).location.startswith("/login"):
            self.sessions[name] = self.sign_in(name)
        return self.sessions[name]

    def add(self, sender: MessageSender, *sent: SignedMessage) -> None:
        now = clock.now_rfc3339()
        assert set(self.store.ingest([Arrival(sender.verify(item)) for item in sent], [], now)) == {"new"}

    def actions(self) -> list[dict[str, Any]]:
        with self.store.snapshot() as db:
            return accounts.load_actions(db, 100)


def enrolled(store: FleetStore, device: str, seed: int | None = None) -> MessageSender:
    sender = MessageSender(device=device, key=new_key(seed))
    store.enrol(device, sender.key.public, replace=False, now=clock.now_rfc3339())
    return sender


def health(sender: MessageSender, waiting: int = 3, **members: Any) -> SignedMessage:
    """Return a health message with one task, as a device sends it."""
    task = {"stream": "watch", "row": sender.row, "windows": 12, "model": MODEL}
    body = {"agent": "0.1.0", "streams": {"watch": {"rows": sender.row, "first": 1}}, "tasks": {sender.task: task}}
    store = {"bytes": 5_000_000, "max": 1_000_000_000, "hours": 71.5}
    return sender.append("health", **{**body, "rejected": 0, "outbox": waiting, "store": store, **members})


@contextlib.contextmanager
def served(
    folder: Path,
    *,
    database: str = "",
    local_role: str = "viewer",
    operator: bool = True,
    policy: AccessPolicy | None = None,
    routes: Callable[[Dashboard], Sequence[Route]] = lambda dashboard: (),
) -> Iterator[ServedDashboard]:
    """Serve a new fleet with three accounts and one device that has sent each kind of message."""
    config = init_fleet(folder, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
    location = database or config.fleet.db
    store = FleetStore(location)
    now = clock.now_rfc3339()
    # The cost is stored with each hash: a full one takes 0.2 s of every sign-in.
    with pytest.MonkeyPatch.context() as cheap:
        cheap.setattr(passwords, "_N", 16)
        hashed = passwords.hash_password(PASSWORD)
    with store.transaction() as db:
        for name, role in ROLES.items():
            accounts.save_user(db, name, role, hashed, now)
    desk = None
    if operator:
        desk = OperatorDesk(config, folder, keys.load_private(Path(config.operator.key_file)))
    with running(folder, store, location, policy or AccessPolicy(b"s" * 32, local_role), desk, routes) as dashboard:
        try:
            sender = enrolled(store, "pi-07", 7)
            sent = [sender.results(), sender.drift("drift"), health(sender), sender.alert("exercise/ax/drift/1")]
            dashboard.add(sender, *sent)
            yield dashboard
        finally:
            store.close()


@contextlib.contextmanager
def running(
    folder: Path,
    store: FleetStore,
    location: str,
    policy: AccessPolicy,
    desk: OperatorDesk | None,
    routes: Callable[[Dashboard], Sequence[Route]] = lambda dashboard: (),
) -> Iterator[ServedDashboard]:
    dashboard = Dashboard(fleet_config.load(folder).fleet.name, folder, location, policy, desk, render_device_drift)
    listener = Listener("127.0.0.1", 0)
    listening = open_socket(listener)
    app = create_app(dashboard, make_host_policy(["dash.example.org"]), routes(dashboard))
    server = create_server(app, listener, dashboard.feed.end)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_until("the server runs", lambda: server.started)
        yield ServedDashboard(folder, store, listening.getsockname()[1], dashboard)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


def wait_until_shown(
    dashboard: ServedDashboard, path: str, text: str, cookie: str = "", timeout_s: float = TIMEOUT_S
) -> str:
    """Return the page once it contains `text`."""
    page = ""

    def is_shown() -> bool:
        nonlocal page
        page = dashboard.get(path, cookie).text
        return text in page

    wait_until(f"{text!r} on {path}", is_shown, timeout_s)
    return page

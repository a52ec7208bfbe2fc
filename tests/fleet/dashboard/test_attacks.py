"""Thirty attempts of an outsider on the dashboard's port; all are refused."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from itsdangerous import Signer

from outstation.fleet.dashboard import server
from outstation.fleet.dashboard.security import guard, login_limits, passwords
from outstation.fleet.dashboard.security.access import AccessPolicy
from outstation.fleet.dashboard.security.login_limits import LoginLimits
from outstation.fleet.dashboard.state import feed
from outstation.fleet.database.dashboard import accounts
from outstation.workbench.testing.patience import wait_until
from tests.kit.dashboards import PASSWORD, ServedDashboard, enrolled, health, served, wait_until_shown

PROTECTED = ("/fleet", "/incidents", "/devices/pi-07", "/devices/pi-07/results.json", "/devices/pi-07/drift.svg",
             "/tasks", "/models", "/rollouts", "/audit", "/accounts", "/")  # fmt: skip


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDashboard]:
    """Serve a dashboard where everybody has to sign in."""
    with served(tmp_path_factory.mktemp("fleet") / "acme", local_role="") as running:
        yield running


@pytest.fixture(autouse=True)
def no_waiting(dashboard: ServedDashboard) -> None:
    dashboard.dashboard.login_limits._failures.clear()


def exchange(dashboard: ServedDashboard, data: bytes, timeout_s: float = 5.0) -> bytes:
    """Send raw bytes; return everything that comes back until the server closes or the time is over."""
    with socket.create_connection(("127.0.0.1", dashboard.port), timeout=timeout_s) as opened:
        opened.sendall(data)
        received = b""
        try:
            while block := opened.recv(65536):
                received += block
        except (TimeoutError, ConnectionResetError):
            pass
        return received


@pytest.mark.parametrize("path", PROTECTED)
def test_no_page_without_a_session(dashboard: ServedDashboard, path: str) -> None:
    answer = dashboard.get(path)
    assert (answer.status, answer.location[:11]) == (303, "/login?next")
    assert "pi-07" not in answer.text


def test_no_events_without_a_session(dashboard: ServedDashboard) -> None:
    assert dashboard.get("/events").status == 401


def test_no_form_without_a_session(dashboard: ServedDashboard) -> None:
    assert dashboard.post("/accounts", {"name": "ada", "action": "role", "role": "viewer"}).status == 401
    assert dashboard.post("/incidents/0123456789ab", {"action": "acknowledge"}).status == 401


@pytest.mark.parametrize("value", [
    "outstation=x", "outstation=", "outstation=" + "A" * 3000, "outstation=ada", "outstation=\x80\xff",
    "outstation=" + Signer(b"guess", salt="outstation-dashboard-session").sign("secret").decode(),
    "outstation=" + base64.urlsafe_b64encode(b'{"name":"ada","role":"admin"}').decode() + ".sig",
])  # fmt: skip
def test_a_forged_cookie_is_no_session(dashboard: ServedDashboard, value: str) -> None:
    assert dashboard.get("/fleet", value).status == 303


def test_a_cookie_signed_with_the_right_key_for_a_session_that_never_began(dashboard: ServedDashboard) -> None:
    signed = dashboard.dashboard.access._signer.sign("invented").decode()
    assert dashboard.get("/fleet", f"outstation={signed}").status == 303


def test_a_changed_cookie_is_no_session(dashboard: ServedDashboard) -> None:
    cookie = dashboard.session("vera")
    assert dashboard.get("/fleet", cookie).status == 200
    assert dashboard.get("/fleet", cookie[:-2] + ("AA" if cookie[-2:] != "AA" else "BB")).status == 303


def test_a_session_ends_for_good_when_its_owner_signs_out(dashboard: ServedDashboard) -> None:
    cookie = dashboard.sign_in("vera")
    assert dashboard.post("/logout", {}, cookie).status == 303
    assert dashboard.get("/fleet", cookie).status == 303


def test_the_events_end_with_the_session_also_while_much_happens(
    dashboard: ServedDashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PING_S", 0.3)
    cookie = dashboard.sign_in("vera")
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=10)
    connection.request("GET", "/events", headers={"cookie": cookie})
    response = connection.getresponse()
    assert response.getheader("content-type", "").startswith("text/event-stream")
    assert b"retry" in response.readline()
    dashboard.post("/logout", {}, cookie)
    sender = enrolled(dashboard.store, "pi-70")
    for n in range(4):
        dashboard.add(sender, health(sender, waiting=n))
        time.sleep(0.2)
    response.read()
    connection.close()


def test_a_removed_account_has_no_session_left(dashboard: ServedDashboard) -> None:
    with dashboard.store.transaction() as db:
        accounts.save_user(db, "mallory", "admin", accounts.load_user(db, "ada")[1], "2026-01-01T00:00:00Z")  # type: ignore[index]
    cookie = dashboard.sign_in("mallory")
    assert dashboard.get("/accounts", cookie).status == 200
    dashboard.post("/accounts", {"name": "mallory", "action": "remove"}, dashboard.session("ada"))
    assert dashboard.get("/accounts", cookie).status == 303


def test_a_session_that_the_attacker_chose_is_not_taken_over(dashboard: ServedDashboard) -> None:
    chosen = dashboard.sign_in("vera")
    given = dashboard.post("/login", {"name": "ada", "password": PASSWORD}, chosen).cookie
    assert given not in ("", chosen)
    assert dashboard.get("/accounts", chosen).status == 403, "the old session is still only vera's"


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(dashboard: ServedDashboard) -> None:
    header = dashboard.post("/login", {"name": "vera", "password": PASSWORD}).headers["set-cookie"].lower()
    assert "httponly" in header
    assert "samesite=strict" in header


@pytest.mark.parametrize("headers", [
    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"sec-fetch-site": "none"},
    {"sec-fetch-site": "-"}, {"sec-fetch-site": "-", "origin": "http://evil.example"},
    {"sec-fetch-site": "-", "origin": "null"}, {"sec-fetch-site": "same-origin", "origin": "http://evil.example"},
])  # fmt: skip
def test_a_form_of_another_site_does_nothing(dashboard: ServedDashboard, headers: dict[str, str]) -> None:
    cookie = dashboard.session("ada")
    answer = dashboard.post("/accounts", {"name": "vera", "action": "role", "role": "admin"}, cookie, **headers)
    assert answer.status == 403
    with dashboard.store.snapshot() as db:
        assert accounts.load_user(db, "vera")[0] == "viewer"  # type: ignore[index]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/json"])
def test_a_form_in_a_disguise_does_nothing(dashboard: ServedDashboard, kind: str) -> None:
    cookie = dashboard.session("ada")
    form = {"name": "vera", "action": "role", "role": "admin"}
    assert dashboard.post("/accounts", form, cookie, **{"content-type": kind}).status == 415


@pytest.mark.parametrize("mode", ["no-cors", "cors", "websocket"])
def test_another_site_loads_no_part(dashboard: ServedDashboard, mode: str) -> None:
    cookie = dashboard.session("ada")
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": mode}
    assert dashboard.get("/devices/pi-07/results.json", cookie, **headers).status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "a@127.0.0.1@b"]
)
def test_a_name_that_points_here_is_refused(dashboard: ServedDashboard, host: str) -> None:
    assert dashboard.get("/login", host=host).status in (400, 421)


def test_two_host_headers_are_refused(dashboard: ServedDashboard) -> None:
    request = b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert exchange(dashboard, request).split()[1] in (b"400", b"421")


@pytest.mark.parametrize("path", [
    "/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/%2e%2e/app.py", "/static/....//app.py",
    "/static//etc/passwd", "/static/%00", "/..%2f..%2ffleet.toml", "/static/.hidden", "/static/..%5capp.py",
    "/messages/..%2f..%2fetc/passwd/1", "/devices/..%2f..%2fdashboard.key",
])  # fmt: skip
def test_no_path_leads_to_a_file(dashboard: ServedDashboard, path: str) -> None:
    answer = dashboard.get(path, dashboard.session("ada"))
    assert answer.status in (400, 404)
    assert "import" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("value", ["' OR 1=1 --", '"; DROP TABLE messages; --', "%27%20OR%20%271", "x' UNION SELECT 1"])
def test_sql_in_every_parameter_is_text(dashboard: ServedDashboard, value: str) -> None:
    cookie = dashboard.session("ada")
    quoted = value.replace(" ", "%20").replace('"', "%22").replace(";", "%3b")
    for path in (f"/fleet?q={quoted}&sort={quoted}&group={quoted}", f"/incidents?device={quoted}&task={quoted}",
                 f"/devices/{quoted}", f"/messages/pi-07/{quoted}/1", f"/incidents/{quoted}", f"/rollouts/{quoted}",
                 f"/tasks/{quoted}?drift={quoted}", f"/models/{quoted}"):  # fmt: skip
        assert dashboard.get(path, cookie).status in (200, 404)
    assert dashboard.post("/login", {"name": value, "password": value}).status == 401
    with dashboard.store.snapshot() as db:
        assert db.execute("SELECT count(*) FROM messages WHERE device = 'pi-07'").fetchone()[0] == 4


def test_markup_in_every_parameter_is_text(dashboard: ServedDashboard) -> None:
    cookie, value = dashboard.session("ada"), "%3Cscript%3Ealert(1)%3C/script%3E%22onload=%22"
    for path in (f"/fleet?q={value}", f"/incidents?device={value}", f"/devices/{value}", f"/login?next=/{value}",
                 f"/nothing/{value}", f"/tasks/{value}", f"/rollouts/{value}"):  # fmt: skip
        assert "<script>alert" not in dashboard.get(path, cookie).text


def test_no_page_runs_a_script_of_its_own_or_is_framed(dashboard: ServedDashboard) -> None:
    cookie = dashboard.session("ada")
    for path in ("/fleet", "/login", "/nothing", "/devices/pi-07", "/static/dashboard.js"):
        policy = dashboard.get(path, cookie).headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
    page = dashboard.get("/fleet", cookie).text
    assert "style=" not in page
    assert " onclick" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("name", ["vera", "otto"])
def test_a_lower_role_manages_no_accounts(dashboard: ServedDashboard, name: str) -> None:
    cookie = dashboard.session(name)
    assert dashboard.get("/accounts", cookie).status == 403
    assert dashboard.post("/accounts", {"name": name, "action": "role", "role": "admin"}, cookie).status == 403


def test_a_viewer_decides_nothing(dashboard: ServedDashboard) -> None:
    cookie = dashboard.session("vera")
    label = {"task": "exercise", "row": "1", "action": "confirm"}
    for path, form in (("/rollouts/x", {"action": "abort", "reason": "x"}), ("/devices/pi-07/verdict", label),
                       ("/incidents/0123456789ab", {"action": "mute"}), ("/audit/evidence", {})):  # fmt: skip
        assert dashboard.post(path, form, cookie).status == 403


def test_a_page_is_no_action_and_an_action_no_page(dashboard: ServedDashboard) -> None:
    cookie = dashboard.session("ada")
    assert dashboard.get("/audit/evidence", cookie).status == 405
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"):
        assert dashboard.request(method, "/accounts", None, cookie, {}).status == 405


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "\\\\evil",
        "/%0d%0aSet-Cookie:a=b",
        "javascript:alert(1)",
    ],
)
def test_a_sign_in_leads_to_no_other_site(dashboard: ServedDashboard, target: str) -> None:
    answer = dashboard.post("/login", {"name": "vera", "password": PASSWORD, "next": target})
    assert answer.location.startswith("/")
    assert not answer.location.startswith(("//", "/\\"))
    assert "a" not in {name for name in answer.headers if name == "a"}


@pytest.fixture
def three_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a name be tried three times from one address instead of ten: each try costs a password hash."""
    monkeypatch.setattr(login_limits, "MAX_PER_PAIR", 3)


def test_passwords_cannot_be_tried_for_long(dashboard: ServedDashboard, three_tries: None) -> None:
    statuses = [dashboard.post("/login", {"name": "ada", "password": f"guess {n}"}).status for n in range(4)]
    assert statuses == [401, 401, 401, 429]
    assert dashboard.post("/login", {"name": "ada", "password": PASSWORD}).status == 429


def test_passwords_cannot_be_tried_at_once(dashboard: ServedDashboard, three_tries: None) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        tries = [pool.submit(dashboard.post, "/login", {"name": "otto", "password": f"{n}"}) for n in range(24)]
        statuses = [future.result().status for future in tries]
    assert statuses.count(401) <= 3
    assert statuses.count(429) >= 21


def test_a_stranger_keeps_no_account_out() -> None:
    now = [0.0]
    limits = LoginLimits(lambda: now[0])
    for n in range(30):
        if not limits.wait_s(f"2001:db8:0:1::{n:x}", "ada"):
            limits.add_failure(f"2001:db8:0:1::{n:x}", "ada")
    assert limits.wait_s("2001:db8:0:1::99", "ada") == 300, "a host has a whole /64 network"
    assert limits.wait_s("2001:db8:0:1::99", "vera") == 0
    assert limits.wait_s("192.0.2.1", "ada") == 0
    limits.add_failure("192.0.2.1", "ada")
    limits.forget("192.0.2.1", "ada")
    for n in range(250):
        limits.add_failure(f"::ffff:198.51.100.{n}", "ada")
    assert limits.wait_s("203.0.113.1", "ada") == 300, "many addresses guess together"
    assert limits.wait_s("192.0.2.1", "ada") == 0, "but where it signed in from before, it can again"
    for _ in range(10):
        limits.add_failure("192.0.2.1", "ada")
    assert limits.wait_s("192.0.2.1", "ada") == 300
    now[0] = 301
    assert limits.wait_s("203.0.113.1", "ada") == 0


def test_an_address_tries_few_names() -> None:
    limits = LoginLimits(lambda: 0.0)
    for n in range(20):
        assert limits.wait_s("192.0.2.1", f"name-{n}") == 0
        limits.add_failure("192.0.2.1", f"name-{n}")
    assert limits.wait_s("192.0.2.1", "ada") == 300
    assert limits.wait_s("192.0.2.2", "ada") == 0


def test_refused_sign_ins_are_counted_in_one_row(dashboard: ServedDashboard) -> None:
    for _ in range(3):
        dashboard.post("/login", {"name": "eve", "password": "wrong"})
    refused = [action["outcome"] for action in dashboard.actions() if action["object"] == "eve"]
    assert refused == ["refused 3 times"]


@pytest.mark.parametrize(
    "path", ["/incidents?device=%00", "/tasks/exercise?drift=a%00b", "/devices/pi%00", "/login?next=%00"]
)
def test_no_parameter_holds_nul(dashboard: ServedDashboard, path: str) -> None:
    assert dashboard.get(path, dashboard.session("ada")).status == 400


def test_no_form_holds_nul(dashboard: ServedDashboard) -> None:
    assert dashboard.post("/login", {"name": "a\0", "password": "x"}).status == 400
    raw = dashboard.request("POST", "/login", "name=a\0&password=x", "", {"sec-fetch-site": "same-origin"})
    assert raw.status == 400


def test_an_unknown_name_takes_as_long_as_a_known_one(dashboard: ServedDashboard) -> None:
    with dashboard.store.transaction() as db:
        accounts.save_user(db, "known", "viewer", passwords.hash_password(PASSWORD), "2026-01-01T00:00:00Z")
    times = {}
    for name in ("known", "nobody"):
        began = time.perf_counter()
        assert dashboard.post("/login", {"name": name, "password": "wrong password"}).status == 401
        times[name] = time.perf_counter() - began
    assert times["nobody"] > 0.3 * times["known"]


@pytest.mark.parametrize("header", ["x-remote-user", "x-forwarded-user", "remote-user", "x-forwarded-for"])
def test_a_header_is_nobody_without_a_proxy(dashboard: ServedDashboard, header: str) -> None:
    assert dashboard.get("/accounts", **{header: "ada"}).status == 303


def test_a_large_form_is_refused(dashboard: ServedDashboard) -> None:
    answer = dashboard.post("/login", {"name": "ada", "password": "x" * (guard.MAX_BODY + 1)})
    assert answer.status == 413
    chunked = (
        b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nSec-Fetch-Site: same-origin\r\nTransfer-Encoding: chunked\r\n"
    )
    chunked += b"Content-Type: application/x-www-form-urlencoded\r\n\r\n" + b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    chunked += b"4000\r\n" + b"x" * 0x4000 + b"\r\n0\r\n\r\n"
    assert b" 413 " in exchange(dashboard, chunked)[:30]


def test_large_headers_and_addresses_are_refused(dashboard: ServedDashboard) -> None:
    request = b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n"
    assert exchange(dashboard, request).split()[1] in (b"400", b"431")
    assert dashboard.get("/fleet?q=" + "x" * 5000).status == 414


@pytest.mark.parametrize("request_bytes", [
    b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x",
    b"GET /login HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
])  # fmt: skip
def test_malformed_requests_are_refused(dashboard: ServedDashboard, request_bytes: bytes) -> None:
    answered = exchange(dashboard, request_bytes, 2.0)
    assert b" 200 " not in answered[:30]
    assert dashboard.get("/login").status == 200


def test_slow_headers_hold_no_connection(dashboard: ServedDashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.5)
    opened = [socket.create_connection(("127.0.0.1", dashboard.port)) for _ in range(30)]
    for connection in opened:
        connection.sendall(b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    assert dashboard.get("/login").status == 200, "others are served meanwhile"
    for connection in opened:
        connection.settimeout(5)
        assert connection.recv(1) == b"", "closed, although the request never ended"
        connection.close()


def test_a_slow_form_holds_no_connection(dashboard: ServedDashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_TIMEOUT_S", 0.5)
    head = b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nSec-Fetch-Site: same-origin\r\nContent-Length: 100\r\n"
    head += b"Content-Type: application/x-www-form-urlencoded\r\n\r\nname="
    assert b" 408 " in exchange(dashboard, head)[:30]


def test_one_address_has_so_many_connections(dashboard: ServedDashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the server would close them all, since no request comes.
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 600.0)
    opened = [socket.create_connection(("127.0.0.1", dashboard.port)) for _ in range(server.MAX_PER_ADDRESS + 20)]
    wait_until("20 connections are closed", lambda: sum(map(is_closed, opened)) >= 20)
    for connection in opened:
        connection.close()

    def answers() -> bool:
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            return dashboard.get("/login").status == 200
        return False

    wait_until("an answer", answers)


def is_closed(connection: socket.socket) -> bool:
    """Return True once the server has closed or reset a connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


def test_on_this_machine_a_visitor_without_a_session_only_reads(tmp_path: Path) -> None:
    with served(tmp_path / "acme") as dashboard:
        wait_until_shown(dashboard, "/fleet", "pi-07")
        assert dashboard.get("/accounts").status == 403
        assert (
            dashboard.post("/devices/pi-07/verdict", {"task": "exercise", "row": "1", "action": "confirm"}).status
            == 403
        )
        assert dashboard.get("/fleet", **{"x-forwarded-for": "10.0.0.7"}).status == 303, "a proxy passed it on"
        assert dashboard.get("/fleet", host="dash.example.org").status == 303


def test_a_proxy_names_who_signed_in_there(tmp_path: Path) -> None:
    proxy = AccessPolicy(b"p" * 32, "", "x-remote-user", ("127.0.0.1",))
    with served(tmp_path / "acme", policy=proxy) as dashboard:
        assert dashboard.get("/accounts", **{"x-remote-user": "ada"}).status == 200
        assert dashboard.get("/accounts", **{"x-remote-user": "vera"}).status == 403
        assert dashboard.get("/fleet", **{"x-remote-user": "stranger"}).status == 303
        request = b"GET /fleet HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Remote-User: ada\r\nX-Remote-User: vera\r\n"
        assert b" 303 " in exchange(dashboard, request + b"Connection: close\r\n\r\n")[:30]


def test_every_action_and_every_refused_sign_in_is_written_down(dashboard: ServedDashboard) -> None:
    dashboard.post("/login", {"name": "zoe", "password": "wrong password"})
    dashboard.post("/accounts", {"name": "vera", "action": "end"}, dashboard.session("ada"))
    written = {(a["name"], a["action"], a["object"], a["outcome"]) for a in dashboard.actions()}
    assert ("", "sign in", "zoe", "refused") in written
    # Sign-ins of an hour share a row that counts them.
    assert any(row[:3] == ("ada", "sign in", "ada") and row[3].startswith("done") for row in written)
    assert ("ada", "account", "vera", "sessions ended") in written


def test_without_the_operators_key_nothing_is_decided(tmp_path: Path) -> None:
    with served(tmp_path / "acme", operator=False) as dashboard:
        cookie = dashboard.sign_in("ada")
        assert dashboard.post("/rollouts/x", {"action": "pause"}, cookie).status == 403
        assert dashboard.post("/audit/evidence", {}, cookie).status == 403

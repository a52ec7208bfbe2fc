"""Identity of a visitor: accounts with a signed session cookie, a proxy's header, or this machine itself.

The cookie holds a random session, signed so that a forged one costs no look-up. The database has only its hash, and
decides with each request whether it is still valid.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from itsdangerous import BadSignature, Signer
from starlette.requests import Request
from starlette.responses import Response

from outstation.fleet.dashboard.security.guard import is_loopback
from outstation.fleet.dashboard.security.passwords import ROLES
from outstation.fleet.dashboard.state.reader import DatabaseReader
from outstation.fleet.database.dashboard import accounts
from outstation.fleet.database.interface import Connection
from outstation.foundation import clock
from outstation.foundation.names import is_name

SESSION_HOURS = 12
# Refused sign-ins of one address and account within an hour share a row, which ends after 90 days.
_SIGN_INS_TOGETHER_US, _SIGN_IN_AGE_US = 3_600_000_000, 90 * 86_400_000_000
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class AccessPolicy(msgspec.Struct, frozen=True):
    """`local_role`: of a visitor on this machine without a session, "" to require one.

    `proxy_header` from one of `proxy_addresses` names the visitor; its role is that of the account, or `proxy_role`.
    """

    secret: bytes
    local_role: str = "viewer"
    proxy_header: str = ""
    proxy_addresses: Sequence[str] = ()
    proxy_role: str = ""
    tls: bool = False


class Visitor(msgspec.Struct, frozen=True):
    """`via`: session, proxy or local. `session`: the hash of the secret, "" without one."""

    name: str
    role: str
    via: str
    address: str
    session: str = ""

    def may(self, role: str) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


class Access:
    def __init__(self, policy: AccessPolicy, reader: DatabaseReader) -> None:
        self.policy, self._reader = policy, reader
        self._signer = Signer(policy.secret, salt="outstation-dashboard-session", digest_method=hashlib.sha256)
        self._cookie = "__Host-outstation" if policy.tls else "outstation"

    async def identify(self, request: Request) -> Visitor | None:
        """Return the visitor, None if a sign-in is needed. Raises StorageError and UsageError."""
        address = request.client.host if request.client else ""
        if self.policy.proxy_header and address in self.policy.proxy_addresses:
            return await self._identify_by_proxy(request, address)
        session = self._read_cookie(request)
        if session:
            now = clock.now_rfc3339()
            row = await self._reader.read(lambda db: accounts.load_session(db, session, now))
            name, role = row or ("", "")
            if role in ROLES:
                return Visitor(name, role, "session", address, session)
        if self.policy.local_role and is_local(request):
            return Visitor("this machine", self.policy.local_role, "local", address)
        return None

    async def sign_in(self, name: str, address: str) -> str:
        """Begin a session and return the value of its cookie. An earlier cookie of the browser plays no part."""
        secret = secrets.token_urlsafe(32)
        now_us = clock.read().wall_us
        times = clock.to_rfc3339(now_us), clock.to_rfc3339(now_us + SESSION_HOURS * 3_600_000_000)
        row = (_hash(secret), name, *times, address)
        await self._reader.write(lambda db: accounts.add_session(db, *row))
        return self._signer.sign(secret).decode()

    async def sign_out(self, visitor: Visitor) -> None:
        now = clock.now_rfc3339()
        await self._reader.write(lambda db: accounts.revoke_session(db, visitor.session, now))

    def set_cookie(self, response: Response, value: str) -> None:
        response.set_cookie(
            self._cookie, value, max_age=SESSION_HOURS * 3600, path="/", secure=self.policy.tls, httponly=True,
            samesite="strict",
        )  # fmt: skip

    def delete_cookie(self, response: Response) -> None:
        response.delete_cookie(self._cookie, path="/", secure=self.policy.tls, httponly=True, samesite="strict")

    def _read_cookie(self, request: Request) -> str:
        try:
            return _hash(self._signer.unsign(request.cookies.get(self._cookie, "")).decode())
        except (BadSignature, UnicodeError):
            return ""

    async def _identify_by_proxy(self, request: Request, address: str) -> Visitor | None:
        names = request.headers.getlist(self.policy.proxy_header)
        # Two headers: the proxy passed on one of its client's.
        if len(names) != 1 or not is_name(names[0].lower()):
            return None
        name = names[0].lower()
        account = await self._reader.read(lambda db: accounts.load_user(db, name))
        role = account[0] if account else self.policy.proxy_role
        return Visitor(name, role, "proxy", address) if role in ROLES else None


def is_local(request: Request) -> bool:
    """Return True if the request began on this machine: no proxy on it passed the request on."""
    address = request.client.host if request.client else ""
    host = request.url.hostname or ""
    forwarded = any(name in request.headers for name in _FORWARDED)
    return is_loopback(address) and (host == "localhost" or is_loopback(host)) and not forwarded


def record(db: Connection, visitor: Visitor | None, action: str, concerned: str, outcome: str, address: str) -> None:
    """Append who did what to the table of actions; sign-ins are counted, and nobody (None) can only be refused."""
    now_us = clock.read().wall_us
    now, since, oldest = (clock.to_rfc3339(now_us - age_us) for age_us in (0, _SIGN_INS_TOGETHER_US, _SIGN_IN_AGE_US))
    name, role = (visitor.name, visitor.role) if visitor else ("", "")
    row: tuple[Any, ...] = (now, name, role, action, concerned[:200], outcome[:500], address)
    if action in (accounts.SIGN_IN, accounts.SIGN_OUT):
        accounts.add_sign_in(db, row, since, oldest)
    else:
        accounts.add_action(db, row)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

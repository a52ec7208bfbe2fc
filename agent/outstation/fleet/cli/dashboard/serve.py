"""`outstation fleet dashboard`: web pages over the fleet database."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import secrets
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_url, db_option, fleet_option, is_without_command
from outstation.foundation import durable_files
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.log_format import configure_logging
from outstation.foundation.cli.output import echo
from outstation.foundation.errors import UsageError
from outstation.foundation.text import printable
from outstation.protocol.wire import keys

if TYPE_CHECKING:
    from outstation.fleet.config import FleetConfig
    from outstation.fleet.dashboard.pages.desk import OperatorDesk
    from outstation.fleet.dashboard.security.access import AccessPolicy
    from outstation.fleet.dashboard.server import Listener
    from outstation.fleet.database.store import FleetStore

_SECRET_FILE = "dashboard.key"
# From malloc.h.
_M_ARENA_MAX = -8
_ROLES = click.Choice(["viewer", "operator", "admin"])


@click.group(
    "dashboard",
    cls=SentenceGroup,
    places={"user": "outstation.fleet.cli.dashboard.user:user"},
    invoke_without_command=True,
    epilog="Example: outstation fleet dashboard --dir acme",
)
@click.option("--listen", default="127.0.0.1:8480", show_default=True, metavar="HOST:PORT", help="Port 0: a free one.")
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Host name that browsers use; repeatable.")
@click.option("--tls-cert", type=click.Path(path_type=Path, dir_okay=False), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path, dir_okay=False), help="Private key of --tls-cert, PEM.")
@click.option("--local-role", type=_ROLES, default="viewer", show_default=True,
              help="Role of visitors on this machine who did not sign in.")  # fmt: skip
@click.option("--login", is_flag=True, help="Ask visitors on this machine to sign in, too.")
@click.option("--proxy-header", metavar="HEADER", default="", help="Header in which a proxy names who signed in there.")
@click.option("--proxy-address", "proxies", multiple=True, metavar="IP", help="Proxy that may send it; repeatable.")
@click.option("--proxy-role", type=_ROLES, help="Role of such visitors without an account; default: none.")
@click.option("--operator-key", type=click.Path(path_type=Path, dir_okay=False),
              help="Key that signs decisions and evidence; default that of fleet.toml.")  # fmt: skip
@click.option("--read-only", is_flag=True, help="Offer no action to any account.")
@db_option
@fleet_option
@click.pass_context
def dashboard(
    ctx: click.Context,
    listen: str,
    hosts: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    local_role: str,
    login: bool,
    proxy_header: str,
    proxies: tuple[str, ...],
    proxy_role: str | None,
    operator_key: Path | None,
    read_only: bool,
    db: str | None,
    home: Path,
) -> None:
    """Serve the dashboard: fleet, incidents, devices, tasks, models, roll-outs and audit, in a browser.

    It reads the database only, in a process of its own; runs until SIGTERM or Ctrl-C. Visitors on this machine need no
    account and are viewers. Everybody else signs in: see `fleet dashboard user`. What an operator
    decides is signed with the operator's key; without one, no action is offered.
    """
    if not is_without_command(ctx, home):
        return
    from outstation.fleet.dashboard.app import create_app
    from outstation.fleet.dashboard.pages.visit import Dashboard
    from outstation.fleet.dashboard.security.access import AccessPolicy
    from outstation.fleet.dashboard.security.guard import is_loopback, make_host_policy
    from outstation.fleet.dashboard.server import create_server, open_socket
    from outstation.fleet.metrics.endpoint import dashboard_route, load_token

    _limit_heaps()
    configure_logging(logging.INFO, "%(asctime)s %(levelname)s %(message)s")
    config = fleet_config.load(home)
    listener = _make_listener(listen, tls_cert, tls_key)
    host, is_local = listener.host, is_loopback(listener.host) or listener.host == "localhost"
    policy = AccessPolicy(
        _load_secret(home), "" if login else local_role, proxy_header.lower(), _check_proxies(proxy_header, proxies),
        proxy_role or "", tls_cert is not None,
    )  # fmt: skip
    location = database_url(config, db)
    if not is_local or login:
        _require_accounts(location, policy)
    if not is_local and not listener.cert_file:
        echo("outstation: warning: passwords cross the network unencrypted; add --tls-cert and --tls-key", err=True)
    desk = None if read_only else _open_desk(config, home, operator_key)
    listening = open_socket(listener)
    served = Dashboard(config.fleet.name, home, location, policy, desk, _plot_drift)
    metrics = dashboard_route(served, load_token(config.metrics))
    shown = f"[{host}]" if ":" in host else host
    actions = "with the operator's key" if desk else "read-only"
    url = f"{listener.scheme}://{shown}:{listening.getsockname()[1]}/"
    echo(printable(f"Dashboard of fleet {config.fleet.name}, {actions}: {url}"))
    app = create_app(served, make_host_policy([host, *hosts]), [metrics])
    server = create_server(app, listener, served.feed.end)
    # The server raises the signal again once it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _make_listener(listen: str, tls_cert: Path | None, tls_key: Path | None) -> Listener:
    """Raise UsageError."""
    from outstation.fleet.dashboard.server import Listener, parse_listen

    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together; name both files")
    host, port = parse_listen(listen)
    return Listener(host, port, str(tls_cert) if tls_cert else None, str(tls_key) if tls_key else None)


def _limit_heaps() -> None:
    """Let all threads share a heap of glibc: the rows that each reads would leave megabytes in a heap of its own."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _plot_drift(store: FleetStore, device: str, task: str, since: str | None, dark: bool) -> str:
    """Import the plot with its first request: most visitors see none, and it takes megabytes."""
    from outstation.fleet.cli.dashboard.plot import render_device_drift

    return render_device_drift(store, device, task, since, dark)


def _load_secret(home: Path) -> bytes:
    """Return the secret that signs session cookies; create it once. Without a writable folder it lasts for this run."""
    file = home / _SECRET_FILE
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return file.read_bytes()
    secret = secrets.token_bytes(32)
    try:
        durable_files.write_new(file, secret, 0o600)
    except FileExistsError:
        return file.read_bytes()
    except OSError:
        return secret
    return secret


def _check_proxies(header: str, proxies: Sequence[str]) -> tuple[str, ...]:
    if bool(header) != bool(proxies):
        raise UsageError("--proxy-header and --proxy-address belong together: anybody could send the header otherwise")
    return tuple(proxies)


def _require_accounts(location: str, policy: AccessPolicy) -> None:
    """Raise UsageError if nobody could ever sign in."""
    from outstation.fleet.database.dashboard import accounts
    from outstation.fleet.database.store import FleetStore

    if policy.proxy_header:
        return
    with FleetStore(location, read_only=True) as store, store.snapshot() as db:
        known = accounts.load_users(db)
    if not any(user["has_password"] for user in known):
        raise UsageError(
            "nobody could sign in: create an account first: outstation fleet dashboard user add NAME --role admin"
        )


def _open_desk(config: FleetConfig, home: Path, operator_key: Path | None) -> OperatorDesk | None:
    """Return the desk of the operator; None if this user may not read the key of fleet.toml."""
    from outstation.fleet.dashboard.pages.desk import OperatorDesk

    if operator_key is not None:
        return OperatorDesk(config, home, keys.load_private(operator_key))
    try:
        return OperatorDesk(config, home, keys.load_private(Path(config.operator.key_file)))
    except (OSError, UsageError):
        return None

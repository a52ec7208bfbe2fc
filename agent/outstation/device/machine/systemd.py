"""Notification of systemd, sd_notify(3): ready, alive or stopping. Outside systemd it does nothing."""

from __future__ import annotations

import contextlib
import os


def notify(state: str) -> None:
    """Send `state`, such as `READY=1` or `WATCHDOG=1`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # Imported here: `outstation batch` mostly runs without systemd.
    import socket

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # A service manager that does not read must not block the daemon.
        sock.settimeout(1.0)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(state.encode())

"""Rate limit of sign-ins: of one address, of one account from it, of one account from anywhere, and of all together."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

WINDOW_S = 300.0
MAX_PER_PAIR, MAX_PER_ADDRESS, MAX_PER_ACCOUNT, MAX_TOGETHER = 10, 20, 200, 600
_MAX_TRACKED = 4096
# (kind, network, account)
_Key = tuple[str, str, str]


class LoginLimits:
    """Counts failed sign-ins of the last five minutes, in bounded memory.

    Where an account has signed in from before, only its own failures there count: strangers cannot keep it out.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[_Key, list[float]] = OrderedDict()
        self._trusted: OrderedDict[_Key, None] = OrderedDict()

    def wait_s(self, address: str, account: str) -> float:
        """Return for how long a sign-in is refused, 0 if it may be tried."""
        limits = _limits(address, account)
        pair = next(iter(limits))
        return max(self._wait_s(key, limits[key]) for key in ([pair] if pair in self._trusted else limits))

    def add_failure(self, address: str, account: str) -> None:
        now = self._clock()
        for key, limit in _limits(address, account).items():
            times = [t for t in self._failures.pop(key, []) if t > now - WINDOW_S]
            self._failures[key] = [*times, now][-limit:]
        while len(self._failures) > _MAX_TRACKED:
            self._failures.popitem(last=False)

    def forget(self, address: str, account: str) -> None:
        """Forget the failures of an account that has signed in here, and the attempt that was none."""
        pair, *others = _limits(address, account)
        self._failures.pop(pair, None)
        for key in others:
            self._failures[key] = self._failures.get(key, [])[:-1]
        self._trusted[pair] = None
        self._trusted.move_to_end(pair)
        if len(self._trusted) > _MAX_TRACKED:
            self._trusted.popitem(last=False)

    def _wait_s(self, key: _Key, limit: int) -> float:
        now = self._clock()
        times = [t for t in self._failures.get(key, []) if t > now - WINDOW_S]
        return times[-limit] + WINDOW_S - now if len(times) >= limit else 0.0


def _limits(address: str, account: str) -> dict[_Key, int]:
    """Return the limit of each count that an attempt adds to, that of the account at this address first."""
    network = _network(address)
    return {
        ("pair", network, account): MAX_PER_PAIR,
        ("address", network, ""): MAX_PER_ADDRESS,
        ("account", "", account): MAX_PER_ACCOUNT,
        ("all", "", ""): MAX_TOGETHER,
    }


def _network(address: str) -> str:
    """Return the address; of IPv6 its /64 network, of which one host can use every address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    # A socket for both versions shows IPv4 clients as ::ffff:192.0.2.1.
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed, 64), strict=False))

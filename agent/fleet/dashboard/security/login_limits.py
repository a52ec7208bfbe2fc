"""Rate limit of sign-ins: of one address, of one account, and of all together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

WINDOW_S = 300.0
MAX_PER_ADDRESS, MAX_PER_ACCOUNT, MAX_TOGETHER = 10, 10, 120
_MAX_TRACKED = 4096


class LoginLimits:
    """Counts failed sign-ins of the last five minutes, in bounded memory."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[tuple[str, str], list[float]] = OrderedDict()

    def wait_s(self, address: str, account: str) -> float:
        """Return for how long a sign-in is refused, 0 if it may be tried."""
        limits = (("address", address), MAX_PER_ADDRESS), (("account", account), MAX_PER_ACCOUNT)
        together = ((("all", ""), MAX_TOGETHER),)
        return max(self._wait_s(key, limit) for key, limit in (*limits, *together))

    def add_failure(self, address: str, account: str) -> None:
        now = self._clock()
        for key in (("address", address), ("account", account), ("all", "")):
            times = [t for t in self._failures.pop(key, []) if t > now - WINDOW_S]
            self._failures[key] = [*times, now][-MAX_TOGETHER:]
        while len(self._failures) > _MAX_TRACKED:
            self._failures.popitem(last=False)

    def forget(self, address: str, account: str) -> None:
        """Forget the failures of an account that has signed in, and the attempt that was none."""
        self._failures.pop(("account", account), None)
        for key in (("address", address), ("all", "")):
            self._failures[key] = self._failures.get(key, [])[:-1]

    def _wait_s(self, key: tuple[str, str], limit: int) -> float:
        now = self._clock()
        times = [t for t in self._failures.get(key, []) if t > now - WINDOW_S]
        return times[-limit] + WINDOW_S - now if len(times) >= limit else 0.0

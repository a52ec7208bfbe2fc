"""RFC 3339 times of messages, in UTC, that exist in the Gregorian calendar: years 1 to 9999, no leap second.

A leap second is valid by RFC 3339, but no clock of a device shows one: the kernel repeats the second before it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_LONG_MONTH = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
_SHORT_MONTH = "(0[469]|11)-(0[1-9]|[12][0-9]|30)"
_FEBRUARY = "02-(0[1-9]|1[0-9]|2[0-8])"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = f"(?!0000)([0-9]{{4}}-({_LONG_MONTH}|{_SHORT_MONTH}|{_FEBRUARY})|{_LEAP_YEAR}-02-29)"
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
Rfc3339 = Annotated[str, msgspec.Meta(pattern=rf"^{_DATE}T{_TIME}(\.[0-9]{{1,9}})?Z\Z")]
# A fraction makes it longer. Compiling a pattern of its own would take a millisecond of each start.
Rfc3339Seconds = Annotated[Rfc3339, msgspec.Meta(max_length=len("2026-11-24T22:20:00Z"))]

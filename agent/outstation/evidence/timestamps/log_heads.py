"""Log heads: the document that a time stamp dates, with the newest message of every log that the collector stored.

The digest of a log's newest message commits to all messages before it, so one time stamp dates the whole database.
Equal databases give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from outstation.fleet.database.interface import Row
from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused, UsageError
from outstation.foundation.strict_json import check_strict_json
from outstation.protocol.wire import log_chain
from outstation.protocol.wire.messages import Positive, ShortText, Uuid

MAX_BYTES = 32 << 20


class LogEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`digest` of the message `seq`, the newest of a log."""

    device: ShortText
    log: Uuid
    seq: Positive
    digest: Annotated[str, msgspec.Meta(max_length=64)]


class LogHeads(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    v: Literal[1] = 1
    kind: Literal["heads"] = "heads"
    fleet: ShortText
    heads: list[LogEnd]


def encode(fleet: str, rows: Iterable[Row]) -> bytes:
    """Return the document of rows (device, log, seq, payload of the newest message). Raises UsageError."""
    heads = []
    for device, log, seq, payload in rows:
        if not isinstance(payload, bytes):
            raise UsageError(f"message {seq} of log {log} of {device} was altered; see outstation fleet audit")
        heads.append(LogEnd(device, log, seq, log_chain.digest(payload)))
    data = msgspec.json.format(msgspec.json.encode(LogHeads(fleet=fleet, heads=heads)), indent=0) + b"\n"
    if not heads:
        raise UsageError("the database has no message, so there is nothing to stamp; run the collector first")
    if len(data) > MAX_BYTES:
        raise UsageError(f"the heads of {len(heads)} logs take {len(data)} bytes, the limit is {MAX_BYTES}")
    return data


def decode(data: bytes) -> LogHeads:
    """Parse a document. Raises MessageRefused and no other exception."""
    try:
        heads = decoders.from_json(data, LogHeads)
        check_strict_json(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageRefused("malformed heads", str(error)[:200]) from None
    if len({(head.device, head.log) for head in heads.heads}) != len(heads.heads):
        raise MessageRefused("malformed heads", "a log occurs twice")
    return heads

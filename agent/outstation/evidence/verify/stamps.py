"""Time stamps of log heads, compared with an evidence folder: an authority outside the fleet dates what it covers.

A stamp proves that the messages up to its heads existed at its time. An operator who later cuts off messages, deletes a
device or writes a log anew, with every key of the fleet, cannot make the chains end in the stamped digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from outstation.evidence.format.contents import READ_LIMITS, MessageRef
from outstation.evidence.format.manifest import EvidenceManifest
from outstation.evidence.timestamps import log_heads
from outstation.evidence.timestamps.stamp import Stamp
from outstation.evidence.verify.chains import CLOCK_TOLERANCE_US, ChainChecker, Commitment
from outstation.evidence.verify.reader import VerificationReport
from outstation.fleet.database.interface import LogId
from outstation.foundation.clock import parse_rfc3339, to_rfc3339
from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.messages import LoggedPayload

if TYPE_CHECKING:
    from outstation.evidence.timestamps.token import TimestampTrust

# A device that was offline for longer sends messages that look backdated.
MAX_DELAY_S = 7 * 86_400.0


class Witnesses(msgspec.Struct, frozen=True):
    """Witnesses that an auditor brings: heads of devices (name, content) and time stamps.

    `trust` names the authorities whose stamps count; without it stamps are counted only. A message may reach the
    collector `max_delay_s` after its own time before it counts as backdated.
    """

    heads: Sequence[tuple[str, bytes]] = ()
    stamps: Sequence[Stamp] = ()
    trust: TimestampTrust | None = None
    max_delay_s: float = MAX_DELAY_S


class _Dated(msgspec.Struct, frozen=True):
    """Verified stamp: `name` for people, earliest and latest time, epoch µs, and the last seq of each log."""

    name: str
    earliest_us: int
    latest_us: int
    ends: dict[LogId, int]


class StampChecker:
    """Checker of stamps. Add the stamps first, then call `check_date` for each message."""

    def __init__(
        self, manifest: EvidenceManifest, chains: ChainChecker, witnesses: Witnesses, report: VerificationReport
    ) -> None:
        self._manifest, self._chains, self._witnesses, self._report = manifest, chains, witnesses, report
        self._devices = {key.owner for key in manifest.keys if key.role == "device"}
        self._stamps: list[_Dated] = []
        self._logs = 0

    def add(self, stamp: Stamp) -> None:
        """Verify a stamp, and commit the chains to each of its heads."""
        if self._witnesses.trust is None:
            self._report.unchecked_stamps += 1
            return
        from outstation.evidence.timestamps import token

        try:
            content = token.verify(stamp, self._witnesses.trust)
            heads = log_heads.decode(stamp.heads)
        except MessageRefused as refused:
            self._report.add_problem(stamp.name, f"is not a valid time stamp: {refused}")
            return
        time = to_rfc3339(content.time_us)
        if heads.fleet != self._manifest.fleet:
            problem = f"stamps heads of fleet {heads.fleet!r}, this folder is of {self._manifest.fleet!r}"
            self._report.add_problem(stamp.name, problem)
            return
        self._logs += len(heads.heads)
        if self._logs > READ_LIMITS.stamped_logs:
            problem = f"all time stamps together cover more than {READ_LIMITS.stamped_logs} logs; it is not compared"
            self._report.add_problem(stamp.name, problem)
            return
        self._report.stamps += 1
        self._report.stamped_at = max(self._report.stamped_at, time)
        for head in heads.heads:
            if head.device in self._devices:
                ref = MessageRef(head.device, head.log, head.seq)
                source = f"the time stamp of {time}"
                self._chains.add(Commitment(ref, head.digest, stamp.name, source, content.time_us))
        for device in sorted({head.device for head in heads.heads} - self._devices):
            problem = f"the time stamp of {time} covers device {device!r}, of which the folder lists no key: "
            self._report.add_problem(stamp.name, f"{problem}the operator deleted the device")
        ends = {(head.device, head.log): head.seq for head in heads.heads}
        accuracy_us = content.accuracy_us + CLOCK_TOLERANCE_US
        self._stamps.append(_Dated(time, content.time_us - accuracy_us, content.time_us + accuracy_us, ends))

    def check_date(self, where: str, body: LoggedPayload) -> None:
        """Check the date of a message against the stamps that cover it, and against those that do not."""
        if body.clock != "synced" or not self._stamps:
            return
        written_us, max_delay_us = parse_rfc3339(body.time), round(self._witnesses.max_delay_s * 1e6)
        for stamp in self._stamps:
            is_covered = body.seq <= stamp.ends.get((body.device, body.log), 0)
            dated = f"is dated {body.time}, but the time stamp of {stamp.name}"
            if is_covered and written_us > stamp.latest_us:
                self._report.add_problem(where, f"{dated} covers it already")
                return
            if not is_covered and written_us < stamp.earliest_us - max_delay_us:
                late = f"came more than {self._witnesses.max_delay_s / 86400:g} days late (--max-delay)"
                self._report.add_problem(where, f"{dated} does not cover it: it was backdated, or {late}")
                return

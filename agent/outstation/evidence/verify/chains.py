"""Hash chains of an evidence folder, compared with what others signed: messages, quoted acknowledgements, log heads.

A head comes from a device and not from the operator. An operator who cuts off the newest messages, deletes a device or
writes its log anew, cannot make the chain end in the digest that the head has.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import msgspec

from outstation.evidence.format.contents import OMITTED_DECLARATIONS, OMITTED_LINKS, ChainRun, MessageRef
from outstation.evidence.format.manifest import EvidenceManifest
from outstation.fleet.audit.pruned import verify_statement
from outstation.fleet.database.gap_ledger import parse_evictions, parse_log_end
from outstation.fleet.database.interface import LogId
from outstation.foundation.clock import parse_rfc3339
from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents import log_head
from outstation.protocol.wire import log_chain
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import parse_public_key
from outstation.protocol.wire.messages import LoggedPayload

# Clocks of a device, its collector and a time-stamping authority, all set by time services.
CLOCK_TOLERANCE_US = 60_000_000
# Source of a commitment that is the signature of an exported message.
MESSAGE = "the message"


class Commitment(msgspec.Struct, frozen=True):
    """A signature over the digest of a message, or a time stamp. `source` is a sentence's subject; `where` a file.

    `time_us` is when a witness saw the message; 0 for a commitment that is part of the folder.
    """

    ref: MessageRef
    digest: str
    where: str
    source: str
    time_us: int = 0


class ChainChecker:
    """Checker of chains. Add the commitments first, then the runs in their order, then call `finish`.

    `unsupported`: messages whose links the folder omits because there are too many, or that the device itself declares
    as given up or lost.
    """

    def __init__(self, manifest: EvidenceManifest, add_problem: Callable[[str, str], None]) -> None:
        self._manifest, self._add_problem = manifest, add_problem
        self._commitments: dict[MessageRef, list[Commitment]] = {}
        self._ends: dict[LogId, tuple[int, str]] = {}
        self._gaps: list[tuple[LogId, int, int]] = []
        self._declared: dict[LogId, list[tuple[int, int]]] = {}
        self._as_of_us = parse_rfc3339(manifest.as_of)
        collectors = [parse_public_key(key.key) for key in manifest.keys if key.role == "collector"]
        self._collectors = {key.kid: Signer("collector", key) for key in collectors}
        self._device_keys = {(key.owner, key.kid) for key in manifest.keys if key.role == "device"}
        self.links = self.witnesses = self.unsupported = 0

    @property
    def gaps(self) -> int:
        """Return the number of ranges of messages that the folder has no link of."""
        return len(self._gaps)

    def add(self, commitment: Commitment) -> None:
        self._commitments.setdefault(commitment.ref, []).append(commitment)

    def add_witness(self, where: str, data: bytes) -> None:
        """Add the content of a file that `outstation head` wrote on a device."""
        try:
            head, signer = log_head.verify(data)
        except MessageRefused as refused:
            self._add_problem(where, f"is not a valid log head: {refused}")
            return
        self.witnesses += 1
        kid = signer.key.kid
        time_us = parse_rfc3339(head.time) if head.clock == "synced" else 0
        if head.fleet != self._manifest.fleet:
            self._add_problem(where, f"is a head of fleet {head.fleet!r}, this folder is of {self._manifest.fleet!r}")
        elif (head.device, kid) not in self._device_keys:
            problem = f"device {head.device!r} signed it with key {kid}, which the folder does not list: "
            problem += "the operator deleted the device, or enrolled another key in its name"
            self._add_problem(where, problem + self._explain_time(time_us))
        elif head.seq:
            ref = MessageRef(head.device, head.log, head.seq)
            source = f"the head that {head.device} signed at {head.time}"
            self.add(Commitment(ref, head.digest, where, source, time_us))

    def add_declarations(self, body: LoggedPayload) -> None:
        """Add the messages that a device declares, in a message, as given up or as lost with an earlier log."""
        self._declared.setdefault((body.device, body.log), []).extend(parse_evictions(body))
        if end := parse_log_end(body):
            self._declared.setdefault((body.device, end[0]), []).append((1, end[1]))

    def add_retention(self, where: str, payload: bytes, token: str) -> None:
        """Add the messages that a collector states, signed, as removed by retention; the chains begin behind them."""
        try:
            statement = verify_statement(payload, token, self._collectors.get)
        except MessageRefused as refused:
            self._add_problem(where, f"is not a valid retention statement: {refused}")
            return
        if statement.fleet != self._manifest.fleet:
            self._add_problem(where, f"is of fleet {statement.fleet!r}, this folder is of {self._manifest.fleet!r}")
            return
        for log in statement.logs:
            self._declared.setdefault((statement.device, log.log), []).append((1, log.through))
            if log.digest is not None:
                ref = MessageRef(statement.device, log.log, log.through)
                self.add(Commitment(ref, log.digest, where, f"the retention statement of {statement.time}"))

    def add_run(self, where: str, run: ChainRun) -> None:
        log = (run.device, run.log)
        end, digest = self._ends.get(log, (0, ""))
        if run.first <= end:
            self._add_problem(where, f"repeats messages of log {run.log} of {run.device}")
            return
        if run.first > end + 1:
            self._gaps.append((log, end + 1, run.first - 1))
            self._compare(MessageRef(*log, run.first - 1), run.prev)
        elif run.prev != digest:
            self._add_problem(
                where, f"{run.device} log {run.log} seq {run.first} does not follow the message before it"
            )
        digest = run.prev
        for seq, (kind, body_hash) in enumerate(zip(run.kinds, run.body_hashes, strict=True), run.first):
            header = log_chain.encode_header(kind, *log, seq, digest)
            try:
                digest = log_chain.digest_of_parts(header, body_hash)
            except ValueError as error:
                self._add_problem(where, f"{run.device} log {run.log} seq {seq}: not a hash: {error}")
                return
            self.links += 1
            self._compare(MessageRef(*log, seq), digest)
        self._ends[log] = run.first + len(run.kinds) - 1, digest

    def finish(self) -> None:
        """Report the commitments to messages that no run has."""
        for commitment in chain.from_iterable(self._commitments.values()):
            ref = commitment.ref
            is_omitted = commitment.source == MESSAGE and OMITTED_LINKS in self._manifest.omitted
            declared = self._declared.get((ref.device, ref.log), ())
            if is_omitted or any(first <= ref.seq <= last for first, last in declared):
                self.unsupported += 1
                continue
            end, _ = self._ends.get((ref.device, ref.log), (0, ""))
            if OMITTED_LINKS in self._manifest.omitted:
                problem = f"the folder omits {self._manifest.omitted[OMITTED_LINKS]} links and cannot show it"
            elif not end:
                problem = f"the folder has no message of log {ref.log} of {ref.device}: the operator deleted it"
            elif ref.seq > end:
                problem = f"the log ends at seq {end} here: the operator cut off the newest messages"
            else:
                problem = "the folder has no link of this message"
            problem += self._explain_time(commitment.time_us)
            self._add_problem(commitment.where, f"{commitment.source} covers seq {ref.seq}, but {problem}")
        if not {OMITTED_LINKS, OMITTED_DECLARATIONS} & self._manifest.omitted.keys():
            self._check_gaps()

    def _explain_time(self, time_us: int) -> str:
        """Return what an auditor does about a witness from after the moment that the folder describes."""
        if time_us <= self._as_of_us:
            return ""
        return f", or made this folder before (as of {self._manifest.as_of}): ask for a newer one"

    def _check_gaps(self) -> None:
        """Require that devices declared all missing messages."""
        for log, first, last in self._gaps:
            for start, end in sorted(self._declared.get(log, ())):
                if start <= first <= end:
                    first = end + 1
            if first <= last:
                problem = (
                    f"messages {first} to {last} of log {log[1]} of {log[0]} are missing, and no device declared that"
                )
                self._add_problem("chains/", problem)

    def _compare(self, ref: MessageRef, digest: str) -> None:
        for commitment in self._commitments.pop(ref, ()):
            if commitment.digest != digest:
                problem = (
                    f"is of another message {ref.seq} of log {ref.log} than the folder shows: the log was rewritten"
                )
                self._add_problem(commitment.where, f"{commitment.source} {problem}")

"""Hash chains of all logs for an evidence folder: the place of every message, without its content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from outstation.evidence.format.contents import WRITE_LIMITS, ChainRun
from outstation.protocol.wire import log_chain

_PREV = re.compile(rb'"prev":"([A-Za-z0-9_-]{0,64})"\Z')


class ChainBuilder:
    """Builder of chain runs. `omitted` counts messages above the limit, and those that are no link of a chain."""

    def __init__(self) -> None:
        self.omitted = 0

    def build_runs(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[ChainRun]:
        """Yield the runs of rows (device, log, seq, kind, payload), which are ordered by device, log and seq."""
        run: ChainRun | None = None
        count, digest = 0, ""
        for device, log, seq, kind, payload in rows:
            link = self._read_link(device, log, seq, kind, payload) if count < WRITE_LIMITS.chained_messages else None
            if link is None:
                self.omitted += 1
                continue
            prev, body_hash = link
            count += 1
            follows = run is not None and (run.device, run.log) == (device, log)
            follows = follows and run is not None and run.first + len(run.kinds) == seq and prev == digest
            if run is None or not follows or len(run.kinds) >= WRITE_LIMITS.run_messages:
                if run is not None:
                    yield run
                run = ChainRun(device, log, seq, prev, [], [])
            run.kinds.append(kind)
            run.body_hashes.append(body_hash)
            digest = log_chain.digest(payload)
        if run is not None:
            yield run

    def _read_link(self, device: Any, log: Any, seq: Any, kind: Any, payload: Any) -> tuple[str, str] | None:
        """Return `prev` and the body's hash; None for a payload with another header than devices write."""
        if not isinstance(payload, bytes):
            return None
        header, _ = log_chain.split(payload)
        match = _PREV.search(header)
        prev = match[1].decode() if match else ""
        if header != log_chain.encode_header(kind, device, log, seq, prev):
            return None
        return prev, log_chain.hash_body(payload)

"""Source protocol: rows that the daemon reads itself, beside the producers on its socket."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from outstation.device.config import Config, StreamConfig
from outstation.device.config.sources import SOURCES
from outstation.device.intake.group_commit import CommitOutcome, SourcePosition
from outstation.device.store.rows import RawColumns
from outstation.device.store.store import Store


class SubmitRows(Protocol):
    def __call__(
        self,
        stream: str,
        raw: RawColumns,
        position: SourcePosition | None,
        lines: Sequence[int] = (),
        refused: Mapping[int, str] = ...,
        *,
        is_stalled: bool = False,
    ) -> Awaitable[CommitOutcome]:
        """Submit rows and wait for the outcome of their commit. Raises RowRejected if none can be accepted.

        `position`: how far the source has read after these rows, committed with them; `lines`: line numbers of the
        rows; `refused`: lines without rows, with the reason; `is_stalled`: the source has no more rows before the
        outcome, so the commit is at once.
        """
        ...


class Source(Protocol):
    """Reader of one stream's rows."""

    async def run(self, submit_rows: SubmitRows) -> None:
        """Submit rows until cancelled. After a crash it continues at the last committed position."""
        ...


class SourceContext(msgspec.Struct, frozen=True):
    """Stream that a source belongs to; `file` is the config file, for error messages."""

    file: str
    conf: Config
    name: str

    @property
    def stream(self) -> StreamConfig:
        return self.conf.streams[self.name]


class SourceModule(Protocol):
    """Module of one kind of source, in `sources/` or of another package; `source` is its config section.

    That of another package also has the class of the section, `Config`.
    """

    def check(self, context: SourceContext, source: Any) -> str:
        """Return one line for `outstation check`. Raises ConfigError, UsageError for what `build` would refuse."""
        ...

    def build(self, context: SourceContext, source: Any, store: Store) -> Source:
        """Build the source. Raises ConfigError, UsageError."""
        ...


def load_source_module(context: SourceContext) -> SourceModule | None:
    """Return the module of a stream's source; None if producers fill the stream. Raises ConfigError."""
    key = f"streams.{context.name}.source.kind"
    module: SourceModule | None = SOURCES.load(context.stream.source.kind, context.file, key)
    return module

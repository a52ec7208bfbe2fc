"""Bridge of another package: it starts and ends with the collector, and its errors do not end the collector."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from outstation.foundation.errors import OutstationError, UsageError

logger = logging.getLogger("outstation.bridge")


@contextlib.contextmanager
def run_foreign(place: str, build: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Run a bridge beside the block; `place` is its section. Raises UsageError if it does not start."""
    try:
        bridge = build()
        bridge.__enter__()
    except OutstationError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}; repair its package, or remove the section"
        raise UsageError(f"fleet.toml: [{place}] does not start: {problem}") from error
    try:
        yield
    finally:
        try:
            bridge.__exit__(None, None, None)
        except Exception:
            logger.exception("fleet.toml: [%s] failed as it ended", place)

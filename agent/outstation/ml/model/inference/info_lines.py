"""Lines that the TFLite runtime writes to standard error past Python."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def hide_info_lines() -> Iterator[None]:
    """Keep the runtime's lines `INFO: …` from standard error, to which it writes past Python."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            # Nobody reads it, or its disk is full.
            with suppress(OSError):
                os.write(2, b"".join(line for line in file if not line.startswith(b"INFO: ")))

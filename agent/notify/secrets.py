"""Secrets in files: read when they are used, so that a changed one counts at once, and never shown."""

from __future__ import annotations

from pathlib import Path

from agent import input_files
from agent.errors import UsageError

MAX_BYTES = 4096


def read_secret(path: str, purpose: str) -> str:
    """Return the text of a file without the line break at its end. Raises UsageError; it names only the file."""
    try:
        data = input_files.read_bytes(Path(path))
        text = data.decode().strip("\r\n")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; it holds {purpose}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; it holds {purpose}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; it holds {purpose}") from None
    if not text or len(data) > MAX_BYTES or "\n" in text or "\0" in text:
        raise UsageError(f"{path}: must hold one line of at most {MAX_BYTES} bytes: {purpose}")
    return text


def is_private(path: str) -> bool:
    """Return True if only the owner and the group can read a file."""
    return not Path(path).stat().st_mode & 0o007

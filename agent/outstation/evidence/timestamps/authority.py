"""HTTP client of a time-stamping authority (RFC 3161, section 3.4): one request, one response, both bounded."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from outstation import __version__
from outstation.evidence.timestamps.stamp import MAX_TOKEN_BYTES
from outstation.foundation.errors import UsageError
from outstation.foundation.text import mask_password


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: the operator named the authority, and nobody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch(url: str, request: bytes, timeout_s: float) -> bytes:
    """Return the authority's response to `request`. Raises UsageError that names the URL and the problem."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"--timestamp-url {mask_password(url)}: must begin with http:// or https://")
    outcome: list[bytes | Exception] = []
    # A server that sends a byte now and then never runs into the socket's own timeout.
    thread = threading.Thread(target=_exchange, args=(url, request, timeout_s, outcome), daemon=True)
    thread.start()
    thread.join(timeout_s)
    result = outcome[0] if outcome else TimeoutError(f"no response within {timeout_s:g} s")
    if isinstance(result, bytes):
        return result
    raise UsageError(f"--timestamp-url {mask_password(url)}: {result}; nothing was written")


def _exchange(url: str, request: bytes, timeout_s: float, outcome: list[bytes | Exception]) -> None:
    headers = {"Content-Type": "application/timestamp-query", "User-Agent": f"outstation/{__version__}"}
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        question = urllib.request.Request(url, request, headers)
        with opener.open(question, timeout=timeout_s) as answer:
            data = answer.read(MAX_TOKEN_BYTES + 1)
        if len(data) > MAX_TOKEN_BYTES:
            raise ValueError(f"a response of more than {MAX_TOKEN_BYTES} bytes is no time stamp")
        outcome.append(data)
    except urllib.error.HTTPError as error:
        reason = "a redirect, which is not followed; name its target" if 300 <= error.code < 400 else error.reason
        outcome.append(ValueError(f"HTTP {error.code}: {reason}"))
    except urllib.error.URLError as error:
        outcome.append(ValueError(str(error.reason)))
    except (OSError, HTTPException, ValueError) as error:
        outcome.append(error)

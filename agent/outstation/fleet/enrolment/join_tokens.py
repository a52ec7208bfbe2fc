"""Join tokens: secrets that let one enrolment request of one device in, for a limited time.

A request file can be swapped on its way to the operator. The device proves with the token that the request is its own.
A token is bound to the first key that it lets in, so it lets no second key in.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

from outstation.foundation import decoders, durable_files, input_files
from outstation.foundation.errors import UsageError
from outstation.protocol.documents.enrolment_request import EnrolmentRequest
from outstation.protocol.wire.keys import b64url_encode

TOKEN_FILE = "join-token.json"
_TOKEN_BYTES = 16


class _JoinToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`expires_us`: wall-clock time; `kid`: thumbprint of the key that the token let in, or None."""

    token: str
    expires_us: int
    kid: str | None


def create(home: Path, expires_us: int) -> str:
    """Create the join token of the device whose folder is `home`, in place of an earlier one, and return it."""
    token = b64url_encode(secrets.token_bytes(_TOKEN_BYTES))
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(home, _JoinToken(token, expires_us, None))
    return token


def authenticate(home: Path, request: EnrolmentRequest, thumbprint: str | None, now_us: int) -> None:
    """Check that the device, and nobody else, made `request`; bind its join token to its key.

    Without a token, the operator gives the `thumbprint` that `outstation request` printed on the device. Raises
    UsageError.
    """
    device, kid = request.body.device, request.key.kid
    again = f"make a token with `outstation fleet devices token {device}`, then make the request again with it"
    if thumbprint is not None and thumbprint != kid:
        raise UsageError(f"the request for {device!r} has key {kid}, not {thumbprint}: it is another device's request")
    if not request.body.proof:
        if thumbprint is None:
            hint = "compare it with the one that `outstation request` printed, and add --thumbprint"
            raise UsageError(f"the request for {device!r} was made without a token; its thumbprint is {kid}: {hint}")
        return
    path = home / TOKEN_FILE
    try:
        issued = decoders.from_json(input_files.read_bytes(path), _JoinToken)
    except FileNotFoundError:
        raise UsageError(
            f"device {device!r} has no join token here, but its request was made with one; {again}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}; {again}") from None
    if not request.has_token(issued.token):
        raise UsageError(f"the request for {device!r} was made with another join token: it may be a forgery; {again}")
    if issued.kid not in (None, kid):
        raise UsageError(f"the join token of {device!r} already let key {issued.kid} in; {again}")
    if issued.kid is None and issued.expires_us < now_us:
        raise UsageError(f"the join token of {device!r} has expired; {again}")
    _write(home, msgspec.structs.replace(issued, kid=kid))


def _write(home: Path, token: _JoinToken) -> None:
    durable_files.write(home / TOKEN_FILE, msgspec.json.encode(token), 0o600)

"""Signed documents: what is signed and is no message, such as a decision, a checkpoint or a manifest.

A document is a payload and a detached JWS (see `jws`) over exactly these bytes. The place of a message's topic has the
domain of the document's kind, so no signature of a message, or of another kind of document, is valid for it.

Documents of a kind may be numbered 1, 2, 3 …: `prev` is then the digest of the payload before, "" in the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Generic, TypeVar

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.foundation.strict_json import check_strict_json
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import SigningKey

SignerLookup = Callable[[str], Signer | None]
Body = TypeVar("Body")


class SignedDocument(msgspec.Struct, frozen=True):
    """Exact bytes of a payload, and the JWS over them."""

    payload: bytes
    jws: str

    def to_json(self) -> bytes:
        """Return a file of one JSON object, with the payload as text."""
        return msgspec.json.encode(_JsonFile(self.payload.decode(), self.jws))

    def to_lines(self) -> bytes:
        """Return a file of two lines: payload and JWS."""
        return b"%b\n%b\n" % (self.payload, self.jws.encode())


class _JsonFile(msgspec.Struct, frozen=True):
    """File of a document. Members other than these are for readers and not verified."""

    payload: str
    jws: Annotated[str, msgspec.Meta(max_length=jws.MAX_TOKEN)]


class SigningDomain:
    """Domain that the signatures of one kind of document cover.

    `template`: the signed domain, in which `{}` stands for what the document belongs to, such as its fleet.
    """

    def __init__(self, template: str) -> None:
        self._template = template

    def sign(self, key: SigningKey, payload: bytes, owner: str = "") -> SignedDocument:
        return SignedDocument(payload, jws.sign(key, self._template.format(owner), payload))

    def check(self, document: SignedDocument, find_signer: SignerLookup, owner: str = "") -> Signer:
        """Return the signer of a document that belongs to `owner`. Raises MessageRefused."""
        return jws.verify([document.jws], self._template.format(owner), document.payload, find_signer)

    def sign_file(self, key: SigningKey, data: bytes) -> bytes:
        """Return the content of the file beside `data` that has its signature."""
        return self.sign(key, data).jws.encode() + b"\n"

    def check_file(self, data: bytes, signature: bytes, find_signer: SignerLookup) -> Signer:
        """Return the signer of `data`, given the content of the file beside it. Raises MessageRefused."""
        return self.check(SignedDocument(data, read_token(signature)), find_signer)


class DocumentKind(SigningDomain, Generic[Body]):
    """Documents whose payload is the JSON of a struct. `noun` is the word for one in refusals."""

    def __init__(
        self, body: type[Body], template: str, noun: str = "payload", digest: Callable[[bytes], str] = jws.digest
    ) -> None:
        super().__init__(template)
        self._body, self._noun, self.digest = body, noun, digest

    def sign_body(self, key: SigningKey, body: Body, owner: str = "") -> SignedDocument:
        return self.sign(key, msgspec.json.encode(body), owner)

    def verify(self, document: SignedDocument, find_signer: SignerLookup, owner: str = "") -> Body:
        """Check the signature, then parse. Raises MessageRefused."""
        self.check(document, find_signer, owner)
        return self.parse(document.payload)

    def verify_own(self, document: SignedDocument, read_signer: Callable[[Body], Signer]) -> tuple[Body, Signer]:
        """Parse, then check the signature against the key that the document names. Raises MessageRefused.

        The caller decides whose key it is. `read_signer` raises ValueError if the key is none.
        """
        body = self.parse(document.payload)
        try:
            named = read_signer(body)
        except ValueError as error:
            raise self.refuse(error) from None
        self.check(document, {named.key.kid: named}.get)
        return body, named

    def parse(self, payload: bytes) -> Body:
        """Parse a payload, in which no object may have a key twice. Raises MessageRefused."""
        try:
            body = decoders.from_json(payload, self._body)
            check_strict_json(payload)
        except (ValueError, TypeError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
            raise self.refuse(error) from None
        return body

    def read_json(self, data: bytes) -> SignedDocument:
        """Return the document in a file that `to_json` wrote. Raises MessageRefused."""
        try:
            file = decoders.from_json(data, _JsonFile)
            return SignedDocument(file.payload.encode(), file.jws)
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise self.refuse(error) from None

    def refuse(self, problem: Exception | str) -> MessageRefused:
        return MessageRefused(f"malformed {self._noun}", str(problem)[:200])

    def find_next_place(self, newest: tuple[int, bytes] | None) -> tuple[int, str]:
        """Return number and `prev` of the document after the newest one, given as its number and payload."""
        return (1, "") if newest is None else (newest[0] + 1, self.digest(newest[1]))


def read_token(signature: bytes) -> str:
    """Return the JWS in the content of a signature file."""
    return signature.decode("ascii", "replace").strip()

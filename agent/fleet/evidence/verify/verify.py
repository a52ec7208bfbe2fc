"""`outstation fleet evidence verify`: a folder from anywhere, checked with public keys and nothing else.

Rules, in order:
- the manifest's signature fits one of the keys that were given; only then is the manifest read
- every file of the folder is a plain file that the manifest lists, with that size and digest, and none is missing
- every message in messages/ was signed by a device key that the manifest lists, and no two are one
- what decisions, incidents, accuracy and what runs say of a message is what that message says
- decisions of roll-outs are signed by an operator's key that the manifest lists, and follow each other
- what was compared comes to the figures told, counted again from the messages
- each role of the repository's metadata is signed as the one before asks, from the first root on
- a bundle's manifest has the digest it is told by; where it is said to be checked, its publisher signed it

Nothing is followed out of the folder, nothing is unpacked, no file is read beyond the size that was signed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.errors import Refused, UsageError
from agent.fleet.evidence import contents, manifest
from agent.fleet.evidence.limits import BOUNDS
from agent.fleet.evidence.manifest import MANIFEST, TOKEN, Key, Manifest
from agent.fleet.evidence.verify import reader
from agent.fleet.evidence.verify.bundles import check_bundle
from agent.fleet.evidence.verify.claims import Claims
from agent.fleet.evidence.verify.reader import Opened, Report
from agent.fleet.evidence.verify.repository import published_in
from agent.wire import jws
from agent.wire.jws import Signer
from agent.wire.keys import PublicKey, public_key
from agent.wire.messages import Logged, open_message


def verify(folder: Path, keys: list[PublicKey]) -> Report:
    """Raises UsageError where there is no folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    report = Report()
    head = _manifest(folder, keys, report)
    if head is None:
        return report
    report.fleet, report.at = head.fleet, head.at
    present = reader.present(folder, head, report)
    good = {one.path: one for one in head.files if one.path in present and reader.same(folder, one, report)}
    report.files = len(good)
    _contents(Opened(folder, good, report), head, report)
    return report


def _manifest(folder: Path, keys: list[PublicKey], report: Report) -> Manifest | None:
    data = reader.whole(folder, MANIFEST, BOUNDS.manifest, report)
    token = reader.whole(folder, TOKEN, BOUNDS.token, report)
    if data is None or token is None:
        return None
    known = {key.kid: Signer("operator", key) for key in keys}
    try:
        text = token.decode("ascii", "replace").strip()
        report.signer = jws.verify((text,), manifest.DOMAIN, data, known.get).key.kid
    except Refused as refusal:
        report.add(TOKEN, f"{refusal}: {MANIFEST} is not signed by any of the {len(known)} keys that were given")
        return None
    try:
        return manifest.decode(data)
    except Refused as refusal:
        report.add(MANIFEST, str(refusal))
        return None


def _contents(opened: Opened, head: Manifest, report: Report) -> None:
    messages = {one.path for one in head.files if one.path.startswith("messages/")}
    claims = Claims(head, report.add, whole=messages <= set(opened.good))
    _messages(opened, head, claims, report)
    for number, decision in opened.lines("decisions.jsonl", contents.Decision):
        claims.decision(f"decisions.jsonl:{number}", decision)
    for i, incident in enumerate(opened.document("incidents.json", list[contents.Incident]) or []):
        claims.incident(f"incidents.json[{i}]", incident)
    for i, one in enumerate(opened.document("running.json", list[contents.Running]) or []):
        claims.running(f"running.json[{i}]", one)
    for i, measured in enumerate(opened.document("accuracy.json", list[contents.Measured]) or []):
        claims.measured(f"accuracy.json[{i}]", measured)
    for i, pair in enumerate(opened.document("comparisons.json", list[contents.Compared]) or []):
        claims.compared(f"comparisons.json[{i}]", pair)
        report.comparisons += 1
    claims.finish()
    report.decisions, report.unsupported = claims.decisions, claims.unsupported
    published = published_in(opened, head, report)
    # Devices take bundles from operators, too.
    publishers = {**_signers(head.keys, "publisher"), **_signers(head.keys, "operator")}
    for path in sorted(opened.good):
        if path.startswith("bundles/") and path.endswith("/about.json"):
            card = opened.document(path, contents.Card)
            if card is not None:
                report.bundles += 1
                read = _papers(opened, path.removesuffix("/about.json"), report)
                check_bundle(path, card, read, publishers, report.add)
                for target in published.targets:
                    if target.digest == card.digest and (target.name, target.version) != (card.name, card.version):
                        said = f"{target.name} {target.version}"
                        report.add(path, f"is told as {card.name} {card.version}; {target.role} signed it as {said}")


def _papers(opened: Opened, folder: str, report: Report) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        path = f"{folder}/{name}"
        return reader.whole(opened.folder, path, BOUNDS.document, report) if path in opened.good else None

    return read


def _messages(opened: Opened, head: Manifest, claims: Claims, report: Report) -> None:
    devices = _Devices(head.keys)
    for path in sorted(path for path in opened.good if path.startswith("messages/")):
        for number, line in opened.lines(path, contents.Signed):
            if report.messages >= BOUNDS.messages:
                report.add(path, f"more than {BOUNDS.messages} messages in all; the rest is not read")
                return
            report.messages += 1
            where = f"{path}:{number}"
            try:
                message = open_message(line.topic, line.payload.encode(), (line.jws,), devices.find)
                if message.topic.fleet != head.fleet:
                    raise Refused("other fleet", f"signed for {message.topic.fleet!r}")
                devices.require_in_bounds(message.signer.key.kid, message.body)
            except (Refused, UnicodeEncodeError) as refused:
                report.add(where, f"does not verify: {refused}")
                continue
            claims.message(where, message)


class _Devices:
    """Device keys of the manifest. A revoked key's messages count: they were stored before it was revoked."""

    def __init__(self, keys: list[Key]) -> None:
        self._bounds = {key.kid: key for key in keys if key.role == "device"}
        self._signers = _signers(keys, "device")
        self.find = self._signers.get

    def require_in_bounds(self, kid: str, body: object) -> None:
        key = self._bounds[kid]
        if key.through is None or not isinstance(body, Logged):
            return
        if key.log in (None, body.log) and body.seq > key.through:
            raise Refused("retired key", f"kid {kid} signs up to seq {key.through} only")


def _signers(keys: list[Key], role: str) -> dict[str, Signer]:
    return {key.kid: Signer(key.owner, public_key(key.key)) for key in keys if key.role == role}

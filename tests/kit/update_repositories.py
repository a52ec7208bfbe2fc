"""Repositories of signed bundles, valid and invalid, made with python-tuf's Metadata API."""

from __future__ import annotations

import copy
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from outstation import __version__
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.protocol.wire.desired_state import DesiredBundle

DAYS = {"root": 3650, "targets": 365, "snapshot": 30, "timestamp": 14}
FIELDS = ["ax", "ay"]
ARCHIVE = bytes(range(256)) * 1024


def custom(bundle: str, version: str, digest: str, **other: Any) -> dict[str, Any]:
    """Return the custom metadata that `outstation fleet publish` adds for a bundle."""
    metadata = {
        "name": bundle,
        "version": version,
        "digest": digest,
        "kind": "classify",
        "fields": FIELDS,
        "window": 1,
        "agent": __version__,
        "runtimes": [runtime_name().split()[0]],
        "memory": 1 << 20,
        "unpacked": 1 << 20,
    }
    return {"outstation": metadata | other}


class Signed:
    """In-memory repository with two root keys that must both sign; `write` stores it in a folder."""

    def __init__(self, *, now: datetime | None = None, root_keys: int = 2) -> None:
        self.now = now or datetime.now(UTC).replace(microsecond=0)
        self.keys: dict[str, list[CryptoSigner]] = {"root": [_key() for _ in range(root_keys)]}
        self.keys |= {role: [_key()] for role in ("targets", "snapshot", "timestamp")}
        self.root = Root(expires=self._end("root"), consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            self._trust(role)
        self.root.roles["root"].threshold = root_keys
        self.targets = Targets(expires=self._end("targets"))
        self.snapshot = Snapshot(expires=self._end("snapshot"))
        self.timestamp = Timestamp(expires=self._end("timestamp"))
        for signed in (self.root, self.targets, self.snapshot, self.timestamp):
            signed.version = 0  # until it is signed
        self.bundles: dict[str, Targets] = {}
        self.files: dict[str, bytes] = {}
        self.archives: dict[str, bytes] = {}
        self.sign_root()
        self.sign_targets()
        self.sign()

    def add(self, bundle: str, version: str, archive: bytes, **changes: Any) -> DesiredBundle:
        """Sign an archive into the bundle's role, and return the matching desired state."""
        digest = f"sha256:{hashlib.sha256(version.encode() + archive).hexdigest()}"
        path = f"{bundle}/{version}/{digest[7:23]}.zip"
        if bundle not in self.bundles:
            self.keys[bundle] = [_key()]
            self.bundles[bundle] = Targets(expires=self._end("targets"))
            self.bundles[bundle].version = 0
            self.sign_targets()
        file = TargetFile.from_data(path, archive, ["sha256"])
        file.unrecognized_fields["custom"] = custom(bundle, version, digest, **changes)
        self.bundles[bundle].targets[path] = file
        self.archives[f"{bundle}/{version}/{hashlib.sha256(archive).hexdigest()}.{digest[7:23]}.zip"] = archive
        self.sign_bundle(bundle)
        self.sign()
        return DesiredBundle("rollout-1", bundle, version, digest, "all")

    def sign_root(self, keys: list[CryptoSigner] | None = None) -> None:
        """Sign a new root by all old and new root keys, or by `keys`."""
        self.root.version += 1
        self.root.expires = self._end("root")
        self.files[f"{self.root.version}.root.json"] = _bytes(self.root, keys or self.keys["root"])

    def sign_targets(self, keys: list[CryptoSigner] | None = None) -> None:
        self.targets.version += 1
        roles = {
            name: DelegatedRole(name, [self.keys[name][0].public_key.keyid], 1, True, paths=[f"{name}/*/*"])
            for name in self.bundles
        }
        public: list[Key] = [self.keys[name][0].public_key for name in self.bundles]
        self.targets.delegations = Delegations({key.keyid: key for key in public}, roles) if roles else None
        self.files[f"{self.targets.version}.targets.json"] = _bytes(self.targets, keys or self.keys["targets"])
        self.snapshot.meta["targets.json"] = MetaFile(self.targets.version)

    def sign_bundle(self, bundle: str, keys: list[CryptoSigner] | None = None) -> None:
        role = self.bundles[bundle]
        role.version += 1
        self.files[f"{role.version}.{bundle}.json"] = _bytes(role, keys or self.keys[bundle])
        self.snapshot.meta[f"{bundle}.json"] = MetaFile(role.version)

    def sign(self, *, days: float | None = None) -> None:
        """Sign a new snapshot and timestamp that expire after the given days."""
        self.snapshot.version += 1
        self.snapshot.expires = self._end("snapshot", days)
        self.files[f"{self.snapshot.version}.snapshot.json"] = _bytes(self.snapshot, self.keys["snapshot"])
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.timestamp.version += 1
        self.timestamp.expires = self._end("timestamp", days)
        self.files["timestamp.json"] = _bytes(self.timestamp, self.keys["timestamp"])

    def rotate(self, *roles: str) -> None:
        """Replace the keys of these roles in the root, which revokes the old ones."""
        signers = list(self.keys["root"])
        for role in roles:
            for old in self.keys[role]:
                self.root.revoke_key(old.public_key.keyid, role)
            self.keys[role] = [_key() for _ in self.keys[role]]
            self._trust(role)
        self.sign_root([*signers, *(key for key in self.keys["root"] if key not in signers)])

    def write(self, folder: Path) -> Path:
        """Write the files as a web server holds them; earlier files stay."""
        for name, data in self.files.items():
            _put(folder / "metadata" / name, data)
        for name, data in self.archives.items():
            _put(folder / "targets" / name, data)
        return folder

    def copy(self) -> Signed:
        """Return a copy with keys, from which an attacker may continue."""
        return copy.deepcopy(self, {id(key): key for keys in self.keys.values() for key in keys})

    def _trust(self, role: str) -> None:
        for key in self.keys[role]:
            public: Key = key.public_key
            self.root.add_key(public, role)

    def _end(self, role: str, days: float | None = None) -> datetime:
        return self.now + timedelta(days=DAYS[role] if days is None else days)


def forged(signed: dict[str, Any], keys: list[CryptoSigner]) -> bytes:
    """Return any JSON with valid signatures, even if python-tuf would not create it."""
    from securesystemslib.formats import encode_canonical

    body = (encode_canonical(signed) or "").encode()
    return json.dumps({"signatures": [key.sign(body).to_dict() for key in keys], "signed": signed}).encode()


def _key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def _bytes(signed: Root | Timestamp | Snapshot | Targets, keys: list[CryptoSigner]) -> bytes:
    made: Metadata[Any] = Metadata(signed)
    for key in keys:
        made.sign(key, append=True)
    return made.to_bytes()


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

"""Container image: an OCI layout in one tar file, made from a Debian package without a registry or a runtime."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.packaging.targets import Architecture, PackagingError, Suite, run

_TYPES = "application/vnd.oci.image"
_USER = "outstation"
# Documentation beside licences, and caches that differ from run to run.
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)  # fmt: skip


def build(package: Path, suite: Suite, architecture: Architecture, version: str, epoch: int, file: Path) -> Path:
    """Write the image of `package` to `file`. Raises PackagingError."""
    with tempfile.TemporaryDirectory(prefix="outstation-image-") as name:
        folder = Path(name)
        root = folder / "root.tar"
        _make_root(package, suite, architecture, epoch, root)
        layer, diff_id = folder / "layer", _digest(root)
        _compress(root, layer)
        config = _encode(_describe(architecture, version, epoch, diff_id, _user_of(root)))
        blobs: dict[str, bytes | Path] = {
            f"sha256:{hashlib.sha256(config).hexdigest()}": config,
            _digest(layer): layer,
        }
        _write_layout(file, blobs, architecture, version, epoch)
    return file


def _make_root(package: Path, suite: Suite, architecture: Architecture, epoch: int, root: Path) -> None:
    """Make a Debian with `package` and what it depends on; mmdebstrap gives equal bytes for equal packages."""
    depends = run(["dpkg-deb", "-f", str(package), "Depends"]).stdout
    # Of alternatives the last: systemd's parts without systemd.
    names = [re.sub(r"\s*\(.*", "", group.split("|")[-1].strip()) for group in depends.split(",")]
    inside = f"/tmp/{package.name}"
    hooks = [
        f"copy-in {shlex.quote(str(package.resolve()))} /tmp",
        f'chroot "$1" dpkg -i {shlex.quote(inside)}',
        f'rm "$1"{shlex.quote(inside)}',
        'rm -rf "$1"/var/log/* "$1"/var/cache/* "$1"/etc/resolv.conf "$1"/etc/hostname',
    ]
    command = ["mmdebstrap", "--quiet", "--variant=essential", f"--architectures={architecture.name}"]
    command += [f"--include={','.join([*dict.fromkeys(names), 'ca-certificates'])}"]
    command += [f"--dpkgopt={option}" for option in _DPKG_OPTIONS]
    command += [f"--customize-hook={hook}" for hook in hooks]
    mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
    run([*command, suite.name, str(root), mirror], env=os.environ | {"SOURCE_DATE_EPOCH": str(epoch)})


def _user_of(root: Path) -> str:
    """Return user and group of the service as numbers: orchestrators that forbid root read no names."""
    with tarfile.open(root) as archive:
        for name in ("./etc/passwd", "etc/passwd"):
            try:
                member = archive.extractfile(name)
            except KeyError:
                continue
            if member is not None and (
                match := re.search(rf"^{_USER}:[^:]*:(\d+):(\d+):", member.read().decode(), re.M)
            ):
                return f"{match[1]}:{match[2]}"
    raise PackagingError(f"the image has no user {_USER}: its package was not configured")


def _describe(architecture: Architecture, version: str, epoch: int, diff_id: str, user: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(epoch, UTC).isoformat().replace("+00:00", "Z")
    settings = {
        "User": user,
        "Env": ["PATH=/opt/outstation/bin:/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"],
        "Entrypoint": ["/opt/outstation/bin/outstation"],
        "Cmd": ["run", "-c", "/etc/outstation/outstation.toml"],
        "WorkingDir": "/var/lib/outstation",
        "Volumes": {"/etc/outstation": {}, "/var/lib/outstation": {}},
        "StopSignal": "SIGTERM",
        "Labels": {
            "org.opencontainers.image.title": "outstation",
            "org.opencontainers.image.version": version,
            "org.opencontainers.image.licenses": "Apache-2.0 AND BSD-3-Clause AND MIT",
        },
    }
    return {
        "created": created,
        "architecture": architecture.image,
        "os": "linux",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": f"scripts/build_image, package {version}"}],
    }


def _write_layout(
    file: Path, blobs: dict[str, bytes | Path], architecture: Architecture, version: str, epoch: int
) -> None:
    """Write the OCI layout, and the index of older versions of `docker load`. `blobs`: the config, then the layer."""
    sizes = {digest: len(blob) if isinstance(blob, bytes) else blob.stat().st_size for digest, blob in blobs.items()}
    config, layer = blobs

    def refer(digest: str, kind: str) -> dict[str, Any]:
        return {"mediaType": f"{_TYPES}.{kind}", "digest": digest, "size": sizes[digest]}

    manifest = _encode({
        "schemaVersion": 2,
        "mediaType": f"{_TYPES}.manifest.v1+json",
        "config": refer(config, "config.v1+json"),
        "layers": [refer(layer, "layer.v1.tar+gzip")],
    })  # fmt: skip
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    sizes[digest] = len(manifest)
    tag = re.sub(r"[^A-Za-z0-9_.-]", "-", version)
    index = refer(digest, "manifest.v1+json") | {
        "platform": {"architecture": architecture.image, "os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": f"outstation:{tag}"},
    }
    paths = {each: f"blobs/sha256/{each.removeprefix('sha256:')}" for each in (config, layer, digest)}
    docker = [{"Config": paths[config], "RepoTags": [f"outstation:{tag}"], "Layers": [paths[layer]]}]
    members: dict[str, bytes | Path] = {
        "oci-layout": _encode({"imageLayoutVersion": "1.0.0"}),
        "index.json": _encode({"schemaVersion": 2, "mediaType": f"{_TYPES}.index.v1+json", "manifests": [index]}),
        "manifest.json": _encode(docker),
        paths[digest]: manifest,
        **{paths[each]: blob for each, blob in blobs.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content) if isinstance(content, bytes) else content.stat().st_size
            member.mtime = epoch
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
                archive.addfile(member, source)


def _encode(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _digest(file: Path) -> str:
    with file.open("rb") as source:
        return f"sha256:{hashlib.file_digest(source, 'sha256').hexdigest()}"


def _compress(source: Path, target: Path) -> None:
    """Compress with gzip, without a name and a time."""
    with (
        source.open("rb") as content,
        target.open("wb") as out,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=out, mtime=0) as packed,
    ):
        shutil.copyfileobj(content, packed, 1 << 20)

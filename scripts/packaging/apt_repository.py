"""Repository for apt: packages in `pool/`, and signed indices for each suite in `dists/`, as static files."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
from collections.abc import Sequence
from email import message_from_string
from email.utils import formatdate
from pathlib import Path

from scripts.packaging.targets import ARCHITECTURES, SUITES, PackagingError, run

_COMPONENT = "main"
_RELEASE = re.compile(r"_[^_]*\+deb(\d+)_[^_]+\.deb$")


def make(folder: Path, packages: Sequence[Path], epoch: int, key: str = "") -> list[Path]:
    """Add `packages` to the repository in `folder` and write its indices; `key` names the key of gpg that signs them.

    Equal packages and times give equal indices. Raises PackagingError.
    """
    for package in packages:
        target = folder / "pool" / _COMPONENT / package.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.read_bytes() != package.read_bytes():
            raise PackagingError(
                f"{target}: differs in its bytes, and machines may have it; build with the next --revision"
            )
        shutil.copyfile(package, target)
    stanzas: dict[tuple[str, str], list[str]] = {}
    for package in sorted((folder / "pool").rglob("*.deb")):
        fields = run(["dpkg-deb", "-f", str(package)]).stdout.strip()
        architecture = message_from_string(fields)["Architecture"]
        stanzas.setdefault((_suite_of(package), architecture), []).append(
            f"{fields}\nFilename: {package.relative_to(folder)}\nSize: {package.stat().st_size}\n"
            f"SHA256: {hashlib.sha256(package.read_bytes()).hexdigest()}\n"
        )
    return [_write_suite(folder, suite, stanzas, epoch, key) for suite in SUITES]


def _suite_of(package: Path) -> str:
    match = _RELEASE.search(package.name)
    for suite in SUITES.values():
        if match is not None and int(match[1]) == suite.release:
            return suite.name
    raise PackagingError(f"{package.name}: its version names no Debian release; build it with scripts/build_deb")


def _write_suite(folder: Path, suite: str, stanzas: dict[tuple[str, str], list[str]], epoch: int, key: str) -> Path:
    """Write the indices of one suite; return its Release file, or InRelease if it is signed."""
    home = folder / "dists" / suite
    sums = []
    for architecture in ARCHITECTURES:
        index = home / _COMPONENT / f"binary-{architecture}" / "Packages"
        index.parent.mkdir(parents=True, exist_ok=True)
        content = "\n".join(stanzas.get((suite, architecture), [])).encode()
        index.write_bytes(content)
        packed = index.with_suffix(".gz")
        packed.write_bytes(gzip.compress(content, 9, mtime=0))
        for file in (index, packed):
            data = file.read_bytes()
            sums.append(f" {hashlib.sha256(data).hexdigest()} {len(data)} {file.relative_to(home)}")
    release = home / "Release"
    head = {
        "Origin": "Outstation",
        "Label": "Outstation",
        "Suite": suite,
        "Codename": suite,
        "Date": formatdate(epoch, usegmt=True),
        "Architectures": " ".join(ARCHITECTURES),
        "Components": _COMPONENT,
        "SHA256": "",
    }
    text = "".join(f"{name}: {value}".rstrip() + "\n" for name, value in head.items())
    release.write_text(text + "\n".join(sums) + "\n", encoding="ascii")
    signed, detached = home / "InRelease", home / "Release.gpg"
    for old in (signed, detached):
        old.unlink(missing_ok=True)
    if not key:
        return release
    sign = ["gpg", "--batch", "--yes", "--local-user", key, "--digest-algo", "SHA512", "--output"]
    run([*sign, str(signed), "--clearsign", str(release)])
    run([*sign, str(detached), "--armor", "--detach-sign", str(release)])
    (folder / "outstation.asc").write_text(run(["gpg", "--batch", "--armor", "--export", key]).stdout, encoding="ascii")
    return signed

"""Which file system a folder is on: SQLite's locks and its shared memory are safe on local ones only.

Source: sqlite.org/wal.html, "WAL does not work over a network filesystem"; proc(5), mountinfo.
"""

from __future__ import annotations

import re
from pathlib import Path

from agent.errors import UsageError

# 9p is not among them: virtual machines and sandboxes have their own root on it, and a WAL it cannot carry is refused
# when the pragmas are read back.
_NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "coda", "ncpfs", "lustre", "glusterfs", "davfs",
    "fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.glusterfs", "fuse.davfs", "fuse.davfs2", "fuse.smbnetfs",
    "fuse.curlftpfs", "fuse.ceph", "fuse.gcsfuse",
})  # fmt: skip


def require_local(folder: Path, mountinfo: str | None = None) -> None:
    """Raises UsageError where `folder`, which need not exist yet, is on a network file system."""
    kind, mount = find_file_system(folder.resolve(), _read_mountinfo() if mountinfo is None else mountinfo)
    if kind in _NETWORK:
        raise UsageError(
            f"device.data_dir: {folder} is on {mount}, a network file system ({kind}) where two machines can write one "
            "database and a commit can be lost; put it on a disk of this machine"
        )


def find_file_system(folder: Path, mountinfo: str) -> tuple[str, str]:
    """(type, mount point) of what `folder` is on; empty where that is not known."""
    found = ("", "")
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split()
        if not dash or len(fields) < 5 or not after.split():
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        # A later mount on the same point covers the earlier one.
        if folder.is_relative_to(mount) and len(mount) >= len(found[1]):
            found = (after.split()[0], mount)
    return found


def _read_mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""

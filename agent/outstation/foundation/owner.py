"""Owner of a data folder: root gives up its rights before it handles anything of a device, and gives away its keys."""

from __future__ import annotations

import os
import pwd
import stat
import sys
from collections.abc import Collection
from pathlib import Path

from outstation.foundation.errors import UsageError


def is_of_another_user(data_dir: Path) -> bool:
    """Return True if this is root and `data_dir` belongs to a user of its own."""
    return os.geteuid() == 0 and data_dir.is_dir() and data_dir.stat().st_uid != 0


def become_owner(data_dir: Path) -> None:
    """Continue as the owner of `data_dir` if this is root: no bundle or file of it is handled with root's rights.

    Raises UsageError. A folder that is missing or root's own changes nothing.
    """
    if not is_of_another_user(data_dir):
        return
    owner = data_dir.stat()
    try:
        try:
            os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
        except KeyError:
            os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    except OSError as error:
        raise UsageError(
            f"{data_dir}: belongs to user {owner.st_uid}, whom this process cannot become: {error.strerror}; "
            "run it as that user"
        ) from error
    if os.geteuid() == 0 or os.getuid() == 0:
        raise UsageError(f"{data_dir}: root's rights could not be given up; run this as user {owner.st_uid}")
    program = Path(__file__)
    # Modules are imported later, and model processes start the interpreter: both need rights of this user.
    if not os.access(program, os.R_OK) or not os.access(sys.executable, os.X_OK):
        raise UsageError(
            f"{data_dir}: belongs to user {owner.st_uid}, who may not read the program in {program.parents[1]} or run "
            f"{sys.executable}; install it where that user may, as deploy/install.sh does"
        )


def give_files(folder: Path, data_dir: Path, names: Collection[str]) -> None:
    """Give the keys among `names` in `folder` to the owner of `data_dir`, whose group may read the other ones.

    The folder may hold files of root's own: those keep owner and mode. Nothing changes unless this is root and the
    data folder is another user's.
    """
    if os.geteuid() != 0 or not data_dir.is_dir() or (owner := data_dir.stat()).st_uid == 0:
        return
    for path in (folder / name for name in names):
        try:
            # A link could lead to a file of root's own.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            status = os.fstat(file)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == 0:
                # With what a join kept of them; a public key ends in .key.pub.
                is_key = ".key" in path.suffixes and path.suffix != ".pub"
                os.fchown(file, owner.st_uid if is_key else 0, owner.st_gid)
                os.fchmod(file, 0o600 if is_key else 0o640)
        finally:
            os.close(file)


def give_tree(folder: Path) -> None:
    """Give everything that root made beneath `folder` to its owner. Nothing changes unless that is another user."""
    if os.geteuid() != 0 or (owner := folder.stat()).st_uid == 0:
        return
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(os.path.join(place, name), owner.st_uid, owner.st_gid, follow_symlinks=False)

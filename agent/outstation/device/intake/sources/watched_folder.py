"""Watched folder: its files and working folders by descriptor, so that nobody who writes to it can redirect the agent.

Each name is resolved below an open folder and never through a link (openat(2), O_NOFOLLOW). The working folders
`taking/`, `done/` and `failed/` are the agent's own. Only regular files with one name are read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from outstation.foundation.errors import UsageError

log = logging.getLogger("outstation.files")

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK, a pipe that nobody writes to would hold the agent for ever.
_FILE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# A name has 255 bytes; the agent adds a number, or ".txt".
_MAX_NAME_BYTES = 200
# Names that one look at the folder takes; the others wait for their turn.
_MAX_FILES = 4096
_INDEX_NAME = "rows.csv"
# Bytes at the end of the index that a crash between an entry and the move of its file can have written.
_TAIL_BYTES = 1 << 16
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class FileState(msgspec.Struct, frozen=True):
    """State of a file: the next look tells by it whether its writer has finished."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def from_status(cls, status: os.stat_result) -> FileState:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class WatchedFolder:
    """An open watched folder with its working folders. Close it: an open folder keeps a medium from being removed."""

    def __init__(self, path: Path) -> None:
        """Open `path`, and make the working folders. Raises OSError."""
        path.mkdir(parents=True, exist_ok=True)
        self._exit_stack = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            self._root = _open_until_exit(opened, os.open(path, _FOLDER_FLAGS))
            self._taking, self._done, self._failed = (
                _open_until_exit(opened, self._open_own_folder(name)) for name in ("taking", "done", "failed")
            )
            self._exit_stack = opened.pop_all()

    def __enter__(self) -> WatchedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit_stack.close()

    def read_access(self) -> tuple[int, int, int]:
        """Return the folder's mode, owner and group."""
        status = os.fstat(self._root)
        return status.st_mode, status.st_uid, status.st_gid

    def list_files(self, suffixes: Sequence[str]) -> dict[str, FileState]:
        """Return the first names of what looks like a file of these kinds. A folder is none; a link or a pipe is."""

        def iter_names() -> Iterator[str]:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    is_visible = not entry.name.startswith(".") and entry.name.lower().endswith(tuple(suffixes))
                    if is_visible and not entry.is_dir(follow_symlinks=False):
                        yield entry.name

        states = {}
        for name in heapq.nsmallest(_MAX_FILES, iter_names()):
            with contextlib.suppress(FileNotFoundError):
                states[name] = FileState.from_status(os.stat(name, dir_fd=self._root, follow_symlinks=False))
        return states

    def list_claimed(self) -> list[str]:
        """Return the first names in `taking/`; one that cannot be stored was put there by another program."""
        with os.scandir(self._taking) as entries:
            names = heapq.nsmallest(_MAX_FILES, (entry.name for entry in entries))
        return [name if name.isprintable() else self._rename_claimed(name) for name in names]

    def _rename_claimed(self, name: str) -> str:
        claimed = f"{time.time_ns()}.{safe_name(name)}"
        os.rename(name, claimed, src_dir_fd=self._taking, dst_dir_fd=self._taking)
        return claimed

    def claim(self, name: str) -> str:
        """Move a file to `taking/`, where only the agent renames; return its name there. Raises OSError."""
        claimed = f"{time.time_ns()}.{safe_name(name)}"
        os.rename(name, claimed, src_dir_fd=self._root, dst_dir_fd=self._taking)
        return claimed

    def open_claimed(self, claimed: str) -> int:
        """Open a claimed file for reading. Raises UsageError if it is no regular file with one name, OSError."""
        _check_regular(os.stat(claimed, dir_fd=self._taking, follow_symlinks=False))
        file = os.open(claimed, os.O_RDONLY | _FILE_FLAGS, dir_fd=self._taking)
        try:
            _check_regular(os.fstat(file))
        except UsageError:
            os.close(file)
            raise
        return file

    def unused_done_name(self, claimed: str) -> str:
        return _unused_name(self._done, original_name(claimed))

    def move_to_done(self, claimed: str, name: str) -> None:
        """Move a file to `done/` under `name`. Raises OSError."""
        os.rename(claimed, name, src_dir_fd=self._taking, dst_dir_fd=self._done)

    def read_done_state(self, name: str) -> FileState | None:
        """Return the state of a file in `done/`; None if it is not there. Raises OSError."""
        try:
            return FileState.from_status(os.stat(name, dir_fd=self._done, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def take_back(self, name: str, claimed: str) -> None:
        """Move a file of `done/` back to `taking/`. Raises OSError."""
        os.rename(name, claimed, src_dir_fd=self._done, dst_dir_fd=self._taking)

    def move_to_failed(self, claimed: str, reason: str) -> None:
        """Move a file to `failed/`, with the reason in `NAME.txt` beside it. Raises OSError."""
        name = _unused_name(self._failed, original_name(claimed), ".txt")
        try:
            file = os.open(
                f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE_FLAGS, 0o644, dir_fd=self._failed
            )
            with open(file, "w", encoding="utf-8") as written:
                written.write(reason + "\n")
        except OSError as error:
            # The file must leave the folder even where the disk is full.
            log.error("failed/: the reason beside a file cannot be written: %s", error.strerror)
        os.rename(claimed, name, src_dir_fd=self._taking, dst_dir_fd=self._failed)

    def append_to_index(self, name: str, rows: tuple[int, int], *, is_retry: bool) -> None:
        """List a file of `done/` with its first and last row. Raises OSError."""
        ending = f",{rows[0]},{rows[1]}\n"
        with open(self._open_index(), "a+", encoding="utf-8") as file:
            size = file.tell()
            if is_retry:
                # A crash may have left the entry.
                file.seek(max(0, size - _TAIL_BYTES))
                if ending in file.read():
                    return
            if not size:
                file.write("file,first,last\n")
            quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"\r\n') else name
            file.write(quoted + ending)

    def _open_index(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _FILE_FLAGS
        for _ in range(2):
            try:
                file = os.open(_INDEX_NAME, flags, 0o644, dir_fd=self._done)
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                    return file
                os.close(file)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
            self._move_aside(self._done, _INDEX_NAME, "is no file of the agent")
        raise OSError(errno.EEXIST, f"done/{_INDEX_NAME} is no file of the agent; remove it")

    def _open_own_folder(self, name: str) -> int:
        """Open a working folder, made if it is missing; what is none of the agent's own is moved aside."""
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self._root)
            try:
                folder = os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=self._root)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                problem = "is no folder"
            else:
                try:
                    status = os.fstat(folder)
                    is_own = status.st_uid == os.geteuid() or status.st_uid == self._find_foreign_owner()
                except BaseException:
                    os.close(folder)
                    raise
                if is_own:
                    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                        # A medium without owners keeps its own mode.
                        with contextlib.suppress(OSError):
                            os.fchmod(folder, stat.S_IMODE(status.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
                    return folder
                os.close(folder)
                problem = f"belongs to user {status.st_uid}, not to the agent"
            self._move_aside(self._root, name, problem)
        raise OSError(errno.EEXIST, f"{name}/ {problem}, and comes again; find out who makes it")

    def _find_foreign_owner(self) -> int:
        """Return the owner of what the agent makes here: another one on a medium that stores none, such as FAT."""
        name = f".owner.{time.time_ns()}"
        os.mkdir(name, 0o700, dir_fd=self._root)
        try:
            return os.stat(name, dir_fd=self._root, follow_symlinks=False).st_uid
        finally:
            os.rmdir(name, dir_fd=self._root)

    def _move_aside(self, folder: int, name: str, problem: str) -> None:
        aside = f"{name}.{time.time_ns()}"
        try:
            os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            raise OSError(error.errno, f"{name} {problem}; remove it, the agent cannot: {error.strerror}") from None
        log.error("%s %s; moved to %s", name, problem, aside)


def safe_name(name: str) -> str:
    """Return a name that can be stored, printed and extended: unprintable characters as %XX, and 200 bytes at most."""
    printable = "".join(
        char if char.isprintable() else "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in name
    )
    data = printable.encode()
    if len(data) <= _MAX_NAME_BYTES:
        return printable
    suffix = Path(printable).suffix[:16]
    mark = f"~{hashlib.sha256(data).hexdigest()[:8]}{suffix}"
    return data[: _MAX_NAME_BYTES - len(mark.encode())].decode("utf-8", "ignore") + mark


def original_name(claimed: str) -> str:
    """Return the name before a file was claimed; its own name if another program put it into `taking/`."""
    return safe_name(claimed.partition(".")[2] or claimed)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UsageError(f"is {kind}, not a file; copy the file itself into the folder")
    if status.st_nlink != 1:
        # The maker of a hard link need not be allowed to read the file.
        raise UsageError(f"has {status.st_nlink} names (hard links); copy the file itself into the folder")


def _unused_name(folder: int, name: str, ending: str = "") -> str:
    """Return `name`, or one like it, such that neither it nor it with `ending` exists in `folder`."""
    candidate = name
    while any(_exists(folder, candidate + each) for each in ("", ending)):
        candidate = f"{Path(name).stem}.{time.time_ns()}{Path(name).suffix}"
    return candidate


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_until_exit(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor

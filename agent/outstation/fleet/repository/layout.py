"""File layout of a repository. Only `metadata/` and `targets/` are public."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from outstation.foundation import durable_files
from outstation.foundation.errors import StorageBusy, UsageError, explain

_ROOT_NAME = re.compile(r"([1-9][0-9]{0,8})\.root\.json")


class Layout(msgspec.Struct, frozen=True):
    """Paths below the fleet's folder."""

    fleet: Path

    @property
    def home(self) -> Path:
        return self.fleet / "repository"

    @property
    def metadata(self) -> Path:
        return self.home / "metadata"

    @property
    def targets(self) -> Path:
        return self.home / "targets"

    @property
    def keys(self) -> Path:
        return self.fleet / "repository-keys"

    @property
    def initial_root_keys(self) -> Path:
        """Return the folder, beside the fleet's, where `fleet init` writes root keys unless another is named."""
        fleet = self.fleet.resolve()
        return fleet.with_name(f"{fleet.name}.root-keys")

    @property
    def draft(self) -> Path:
        """Return the path of the root draft that waits for signatures."""
        return self.home / "root.json.draft"

    def missing_error(self) -> UsageError:
        return UsageError(f"{self.fleet}: no repository here; create one: outstation fleet repository init")

    def root_path(self, version: int) -> Path:
        return self.metadata / f"{version}.root.json"

    def newest_root_path(self) -> Path | None:
        """Return the newest root, None if there is no complete repository."""
        names = [path.name for path in self.metadata.glob("*.root.json")]
        versions = [int(match[1]) for name in names if (match := _ROOT_NAME.fullmatch(name))]
        return self.root_path(max(versions)) if versions else None

    def role_path(self, role: str, version: int) -> Path:
        """Return the path of a role's metadata as clients request it."""
        return self.metadata / ("timestamp.json" if role == "timestamp" else f"{version}.{role}.json")

    def target_path(self, path: str, sha256: str) -> Path:
        """Return the path of a target. The hash in its name means that a name never changes content."""
        folder, _, name = path.rpartition("/")
        return self.targets / folder / f"{sha256}.{name}"

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock for writers. Raises StorageBusy if it is taken and `wait` is False, else UsageError."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(durable_files.lock(self.home / ".lock", wait=wait))
            except FileNotFoundError:
                raise self.missing_error() from None
            except BlockingIOError:
                raise StorageBusy(f"{self.home}: another command is writing to the repository; try again") from None
            except OSError as error:
                raise UsageError(f"{self.home}: cannot be written to: {explain(error)}") from None
            yield

"""Entry points of other packages (PyPA entry points specification): one group for each kind of part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outstation.foundation.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GUIDE = "docs/guides/plugins.md"


def find_entry_points(group: str) -> dict[str, list[EntryPoint]]:
    """Return name → entry points of a group; several packages may have the same name."""
    # Imported here: a start without plug-ins does not need it.
    from importlib import metadata

    installed: dict[str, list[EntryPoint]] = {}
    for entry_point in metadata.entry_points(group=group):
        installed.setdefault(entry_point.name, []).append(entry_point)
    return installed


def name_packages(entry_points: list[EntryPoint]) -> str:
    return ", ".join(
        sorted("?" if each.dist is None else f"{each.dist.name} {each.dist.version}" for each in entry_points)
    )


def load_entry_point(name: str, entry_points: list[EntryPoint]) -> Any:
    """Import the part of a name. Raises UsageError if several packages have it, or if it cannot be imported."""
    packages = name_packages(entry_points)
    if len(entry_points) > 1:
        raise UsageError(f"{name!r} is in several packages: {packages}; uninstall all but one")
    try:
        return entry_points[0].load()
    # An import runs any code of the package.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"{name!r} of package {packages} cannot be loaded: {reason}; repair or uninstall it"
        ) from error

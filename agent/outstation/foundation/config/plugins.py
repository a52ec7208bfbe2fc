"""Plug-ins that a config names: shipped parts, and those of other packages.

A shipped name is looked up in a table before any entry point. So a start without plug-ins reads no package metadata,
which takes a tenth of its time, and no other package can replace a shipped part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.entry_points import GUIDE, find_entry_points, load_entry_point
from outstation.foundation.errors import ConfigError, UsageError


class PluginGroup(Collection[str]):
    """Names of one kind of part, each with the module that does the work.

    `shipped`: name → our module, None for a name without one. `section`: base of the classes `Config` that the modules
    of other packages have if each part has a section in a config file.
    """

    def __init__(self, group: str, shipped: Mapping[str, str | None], section: type[Section] | None = None) -> None:
        self.group, self.modules, self._section = group, shipped, section

    def __contains__(self, name: object) -> bool:
        return name in self.modules or name in find_entry_points(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.modules, *find_entry_points(self.group)}))

    def __len__(self) -> int:
        return len({*self.modules, *find_entry_points(self.group)})

    def is_shipped(self, name: str) -> bool:
        return name in self.modules

    def load(self, name: str, file: str, key: str) -> Any:
        """Import the module of a name; None for a shipped name without one.

        Raises ConfigError, about the `key` in `file` that holds the name, if no package or several have it, or if it
        cannot be imported.
        """
        if name in self.modules:
            module = self.modules[name]
            return None if module is None else import_module(module)
        entry_points = find_entry_points(self.group).get(name, [])
        if not entry_points:
            hint = did_you_mean(name, self)
            more = "" if "did you mean" in hint else f"; other packages can add some, see {GUIDE}"
            raise ConfigError(file, key, f"{name!r} is not a valid choice{hint}{more}")
        try:
            return load_entry_point(name, entry_points)
        except UsageError as error:
            raise ConfigError(file, key, str(error)) from error

    def load_section(self, kind: str, file: str, key: str) -> type[Section]:
        """Return the class `Config` of another package's module. Raises ConfigError."""
        module = self.load(kind, file, key)
        section, base = getattr(module, "Config", None), self._section or Section
        if not (isinstance(section, type) and issubclass(section, base)):
            problem = f"{module} has no class Config that is a {base.__name__}; see {GUIDE}"
            raise ConfigError(file, key, f"{kind!r} is no part that outstation can use: {problem}")
        if (tag := section.__struct_config__.tag) != kind:
            problem = f"the tag of {section} is {tag!r}; see {GUIDE}"
            raise ConfigError(file, key, f"{kind!r} is no part that outstation can use: {problem}")
        return section

"""Sections [bridges.NAME] of fleets: bridges of other packages, beside [homeassistant] and [sparkplug]."""

from pathlib import Path
from typing import Self

from msgspec.structs import replace

from outstation.foundation.config.plugins import PluginGroup
from outstation.foundation.config.toml_files import Section


class BridgeSection(Section, frozen=True, tag_field="kind"):
    """Base of the bridges of other packages. A key that ends in `_file` names a file."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)

    def check(self, file: str, key: str) -> None:
        """Raise ConfigError if a value is wrong."""

    def with_absolute_paths(self, base: Path) -> Self:
        """Return the section with its relative paths resolved from `base`."""
        files = {name: getattr(self, name) for name in self.__struct_fields__ if name.endswith("_file")}
        return replace(self, **{name: str(base / file) for name, file in files.items() if file is not None})


BRIDGES = PluginGroup(
    "outstation.bridges",
    {
        "homeassistant": "outstation.fleet.bridge.homeassistant",
        "sparkplug": "outstation.fleet.bridge.sparkplug",
    },
    BridgeSection,
)

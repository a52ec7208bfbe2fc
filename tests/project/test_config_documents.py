"""Reference pages of the config files: they agree with the structs, and their examples and defaults load."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

from outstation.device import config
from outstation.fleet import config as fleet_config
from outstation.foundation.config.quantities import decode_quantity
from scripts import config_documents
from scripts.config_documents import Part

DEVICE = [*config_documents.list_parts(config.Config)]
FLEET = [*config_documents.list_parts(fleet_config.FleetConfig)]
# A bridge of another package has the keys of that package.
FLEET_SECTIONS = [part for part in FLEET if part.heading.startswith("## ") and part.kind.__struct_fields__]
KINDS = {part.kind: part for part in [*DEVICE, *FLEET]}
# Sections that the others need.
DEVICE_BASE = {
    "device": '[device]\nid = "pi-07"\nfleet = "acme"\n',
    "streams": "[streams.watch]\nfields = ["
    + ", ".join(f'{{ name = "{name}" }}' for name in ("ax", "ay", "az", "wx", "wy", "wz"))
    + "]\n",
    "tasks": '[tasks.exercise]\nstream = "watch"\nbundle = "exercise"\n',
}
FLEET_BASE = {
    "fleet": '[fleet]\nname = "acme"\n',
    "broker": "[broker]\n",
    "collector": '[collector]\nkey_file = "collector.key"\n',
    "operator": '[operator]\nkey_file = "operator.key"\n',
}


def heading(part: Part) -> str:
    return part.heading


def test_the_pages_agree_with_the_structs() -> None:
    for file, page in config_documents.render_pages().items():
        assert file.read_text(encoding="utf-8") == page, "run python -m scripts.config_documents"


@pytest.mark.parametrize("part", [part for part in DEVICE if part.kind.__struct_fields__], ids=heading)
def test_the_example_of_a_device_loads(part: Part, tmp_path: Path) -> None:
    # A section that another one holds, with the same keys, has no place of its own on the page.
    assert part.example or part.heading.endswith("broker]")
    _write(tmp_path / "outstation.toml", part.example, DEVICE_BASE)
    config.load(tmp_path / "outstation.toml")


@pytest.mark.parametrize("part", FLEET_SECTIONS, ids=heading)
def test_the_example_of_a_fleet_loads(part: Part, tmp_path: Path) -> None:
    assert part.example
    _write(tmp_path / fleet_config.FILE, part.example, FLEET_BASE)
    fleet_config.load(tmp_path)


@pytest.mark.parametrize("part", KINDS.values(), ids=heading)
def test_the_default_of_each_key_is_written_as_a_file_has_it(part: Part) -> None:
    hints = get_type_hints(part.kind, include_extras=True)
    for field in msgspec.structs.fields(part.kind):
        default = field.default
        if default is msgspec.NODEFAULT and not field.required:
            default = field.default_factory()
        if default in (msgspec.NODEFAULT, None):
            continue
        read = tomllib.loads(f"key = {config_documents.render_value(default)}")["key"]
        # A list that must not be empty has an empty default where another key takes its place.
        if read != []:
            assert msgspec.convert(read, hints[field.name], dec_hook=decode_quantity) == default, field.name


def _write(file: Path, example: str, base: dict[str, str]) -> None:
    """Write an example with the sections that it needs."""
    # An alert rule needs its task, and the privacy of a stream the fields.
    needed = {"streams": "fields", "tasks": "stream"}
    given = tomllib.loads(example)
    partial = {name for name, key in needed.items() if name in given and key not in next(iter(given[name].values()))}
    missing = {name for name in base if name not in given} - {"tasks"}
    file.write_text("\n".join([*(base[name] for name in base if name in missing | partial), example]), encoding="utf-8")

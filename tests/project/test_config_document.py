"""docs/reference/config.md documents exactly the keys of a device's config, with their defaults."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from agent import config
from agent.config.metered import MeteredConfig
from agent.config.notify import NotifyConfig, NotifyRoute, Target
from agent.config.sources import SocketSource, SourceConfig
from agent.config.stream_privacy import StreamPrivacy
from agent.config.updates import UpdatesConfig

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| (?:`(.+?)`|(–|required)) \|", re.MULTILINE)
SECTIONS: dict[str, Any] = {
    "[device]": config.DeviceConfig,
    "[broker]": config.UplinkBrokerConfig,
    "metered": MeteredConfig,
    "[collector]": config.CollectorConfig,
    "[operators]": config.OperatorsConfig,
    "[publishers]": config.PublishersConfig,
    "[buffer]": config.BufferConfig,
    "[intake]": config.IntakeConfig,
    "[privacy]": config.PrivacyConfig,
    "[samples]": config.SamplesConfig,
    "[models]": config.ModelsConfig,
    "[throttle]": config.ThrottleConfig,
    "[updates]": UpdatesConfig,
    "[homeassistant]": config.HomeAssistantConfig,
    "[notify]": NotifyConfig,
    **{f"target {kind.__struct_config__.tag}": kind for kind in get_args(Target)},
    "routes": NotifyRoute,
    "[streams.NAME]": config.StreamConfig,
    "streams.NAME.privacy": StreamPrivacy,
    "fields": config.FieldConfig,
    **{f"source {kind.__struct_config__.tag}": kind for kind in get_args(SourceConfig) if kind is not SocketSource},
    "[tasks.NAME]": config.TaskConfig,
    "alerts": config.AlertRuleConfig,
}


def documented() -> dict[str, dict[str, str]]:
    """Return section → key → default as in the document: a config literal, `–` or `required`."""
    headings = list(HEADING.finditer(text := PAGE.read_text(encoding="utf-8")))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return {
        heading[1]: {key: given or word for key, given, word in ROW.findall(text[heading.end() : end])}
        for heading, end in zip(headings, ends, strict=True)
    }


def test_every_section_of_the_config_is_documented() -> None:
    assert documented().keys() == SECTIONS.keys()
    assert {f"[{name}]" for name in config.Config.__struct_fields__} == {
        name.replace(".NAME", "") for name in SECTIONS if name.startswith("[")
    }


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented_with_its_default(section: str, tmp_path: Path) -> None:
    kind, described = SECTIONS[section], documented()[section]
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    assert described.keys() == fields.keys()
    file = tmp_path / "section.toml"
    required = {name for name, field in fields.items() if field.required}
    assert {name for name, default in described.items() if default == "required"} == required
    values = {"url": '"mqtt://a"', "to": '["x"]', "targets": '["x"]', "command": '["x"]', "consent": '"all of us."'}
    base = {name: values.get(name, '"x"') for name in required}
    given = base | {name: default for name, default in described.items() if default not in ("–", "required")}
    read = [_read(file, kind, lines) for lines in (base, given)]
    assert read[0] == read[1]
    # Images and sounds have no fields; a config with an empty list is rejected.
    unset = {name for name, field in fields.items() if field.default is None} | ({"fields"} & fields.keys())
    assert {name for name, default in described.items() if default == "–"} == unset


BASE = {
    "device": '[device]\nid = "pi-07"\nfleet = "acme"\n',
    "streams.watch": "[streams.watch]\nfields = ["
    + ", ".join(f'{{ name = "{name}" }}' for name in ("ax", "ay", "az", "wx", "wy", "wz"))
    + "]\n",
}


@pytest.mark.parametrize("section", [name for name in SECTIONS if name.startswith("[")])
def test_every_section_has_an_example_that_loads(section: str, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    example = re.search(rf"^## {re.escape(section)}\n\n```toml\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert example, f"{section} has no example below its heading"
    file = tmp_path / "outstation.toml"
    missing = [lines for name, lines in BASE.items() if f"[{name}]" not in example[1]]
    file.write_text("\n".join([*missing, example[1]]), encoding="utf-8")
    config.load(file)


def _read(file: Path, kind: Any, lines: dict[str, str]) -> Any:
    file.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()), encoding="utf-8")
    assert tomllib.loads(file.read_text(encoding="utf-8")).keys() == lines.keys()
    return config.read(file, kind)

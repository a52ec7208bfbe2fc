"""Reference pages of the config files, made from the structs that read them: keys, limits, defaults, examples.

python -m scripts.config_documents      writes docs/reference/config.md and docs/reference/fleet-config.md

The text of a section is the docstring of its struct, that of a key the string literal below it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from outstation.device.config.config import Config
from outstation.fleet.config import FleetConfig
from outstation.foundation.config.quantities import Duration, Size
from outstation.foundation.config.toml_files import Section
from scripts.kit.usage import answer_help

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
_HEAD = """\
# {title}

Made by `python -m scripts.config_documents`: do not edit.

{text}

Sizes and durations are texts with a unit: `"512 MiB"`, `"10 s"`, `"72 h"`, `"2 h 05 min"`. Unknown keys are errors.
Paths are relative to the file. Column `default`: `required` means that the key must be given; `–` means that nothing is
set without it.
"""
_DEVICE = """\
`outstation.toml`. Device commands take `-c FILE`, else `$OUTSTATION_CONFIG`, else `./outstation.toml`, else
`/etc/outstation/outstation.toml`. `outstation init` writes one with comments; `outstation check` says what is wrong
with it. The fleet's own file has [a page](fleet-config.md)."""
_FLEET = """\
`fleet.toml` in the fleet's folder, which `outstation fleet init` writes. Fleet commands look for that folder at
`--dir`, `$OUTSTATION_FLEET`, the current folder, and `/var/lib/outstation-fleet`. The file of a device has
[a page](config.md)."""
_UNITS: dict[type, dict[str, float]] = {
    Duration: {"d": 86_400.0, "h": 3600.0, "min": 60.0, "s": 1.0},
    Size: {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1},
}
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", Size: "size", Duration: "duration"}


class Part(msgspec.Struct, frozen=True):
    """Section of a file: its heading, its keys, and the text above the keys of the section that holds it."""

    heading: str
    kind: type[Section]
    text: str

    @property
    def summary(self) -> str:
        return self._split_text()[0]

    @property
    def example(self) -> str:
        """Return the TOML of its example; "" without one."""
        return self._split_text()[1]

    @property
    def notes(self) -> str:
        return self._split_text()[2]

    def _split_text(self) -> list[str]:
        text = self.text or inspect.getdoc(self.kind) or ""
        before, _, after = text.partition("```toml\n")
        example, _, notes = after.partition("```")
        summary, _, more = before.partition("\n\n")
        return [summary, example, (more + notes).strip()]


def list_parts(kind: type[Section], path: str = "", level: int = 2) -> Iterator[Part]:
    """Yield the sections below a struct, each before those in it."""
    texts = read_texts(kind)
    for field in msgspec.structs.fields(kind):
        name = f"{path}{field.encode_name}"
        for below, brackets in _list_structs(get_type_hints(kind, include_extras=True)[field.name]):
            place = f"{name}.NAME" if brackets == "{}" else name
            # The base of the sections of other packages has the name of its class as its tag.
            tag = below.__struct_config__.tag if below.__struct_config__.tag != below.__name__ else None
            heading = f"[[{place}]]" if brackets == "[]" else f"[{place}]"
            # The text of a key that is a section of the file is not in a table above it.
            text = texts.get(field.name, "") if not path else ""
            yield Part(f"{'#' * level} {heading}{f' {tag}' if tag else ''}", below, text)
            yield from list_parts(below, f"{place}.", 3)


@functools.cache
def read_texts(kind: type) -> dict[str, str]:
    """Return name → text below each key of a struct and its bases."""
    texts = {}
    for base in reversed(kind.__mro__):
        if base is Section or not issubclass(base, Section):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for key, below in zip(node.body, node.body[1:], strict=False):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = inspect.cleandoc(text)
    return texts


def render(title: str, text: str, kind: type[Section], elsewhere: dict[type, str]) -> str:
    """Return a page; sections in `elsewhere` are links to where their keys are."""
    links = dict(elsewhere)
    blocks = [_HEAD.format(title=title, text=text)]
    for part in list_parts(kind):
        if part.kind in links and part.heading.startswith("###"):
            continue
        keys = links.get(part.kind) or render_keys(part.kind)
        add_links(links, part)
        example = f"```toml\n{part.example}```" if part.example else ""
        blocks.append("\n\n".join(filter(None, (part.heading, part.summary, example, keys, part.notes))) + "\n")
    return "\n".join(blocks)


def add_links(links: dict[type, str], part: Part, page: str = "") -> None:
    """Add the sentence that says where the keys of a section, and of those that it extends, are."""
    keys = {field.encode_name for field in msgspec.structs.fields(part.kind)}
    for kind in part.kind.__mro__:
        if issubclass(kind, Section) and kind is not Section:
            missing = sorted(keys - {field.encode_name for field in msgspec.structs.fields(kind)})
            without = f", without `{'`, `'.join(missing)}`" if missing else ""
            place = part.heading.strip("# ")
            links.setdefault(kind, f"Keys as in [`{place}`]({page}#{slug(place)}){without}.")


def render_keys(kind: type[Section]) -> str:
    """Return the table of a section's keys."""
    texts, hints = read_texts(kind), get_type_hints(kind, include_extras=True)
    fields = msgspec.structs.fields(kind)
    if not fields:
        return ""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        if field.required:
            default = "required"
        else:
            value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            default = "–" if value in (None, "") else f"`{render_value(value)}`"
        text = " ".join(texts[field.name].split())
        lines.append(f"| `{field.encode_name}` | {describe(hints[field.name])} | {default} | {text} |")
    return "\n".join(lines)


def render_value(value: Any) -> str:
    """Return a default as a config file has it."""
    if isinstance(value, (Size, Duration)):
        unit, factor = next((u, f) for u, f in _UNITS[type(value)].items() if value % f == 0 and (value or f == 1))
        return f'"{value / factor:g} {unit}"'
    if isinstance(value, Section):
        tag = value.__struct_config__.tag
        return f'{{ kind = "{tag}" }}' if tag else "{}"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def describe(hint: Any) -> str:
    """Return the words for the values of a key: type, choices and limits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(arguments[0]) + "".join(_describe_limits(limit) for limit in arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{render_value(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments if argument is not NoneType))
    if origin in (list, tuple):
        return f"list: {describe(arguments[0])}"
    return _WORDS.get(hint, "table")


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")


def _describe_limits(limit: msgspec.Meta) -> str:
    low, high = (limit.ge if limit.ge is not None else limit.min_length), (limit.le or limit.max_length)
    if limit.gt is not None:
        return f", above {limit.gt:.9g}" + (f", at most {high:.9g}" if high is not None else "")
    unit = "" if limit.min_length is limit.max_length is None else " long"
    if low is not None and high is not None:
        return f", {low:.9g} to {high:.9g}{unit}"
    return (
        f", at least {low:.9g}{unit}" if low is not None else f", at most {high:.9g}{unit}" if high is not None else ""
    )


def _list_structs(hint: Any, brackets: str = "") -> Iterator[tuple[type[Section], str]]:
    """Yield the sections in a type, with the brackets of the list or table that holds them."""
    origin = get_origin(hint)
    if isinstance(hint, type) and origin is None:
        if issubclass(hint, Section):
            yield hint, brackets
        return
    containers: dict[Any, str] = {list: "[]", tuple: "[]", dict: "{}"}
    for argument in get_args(hint):
        yield from _list_structs(argument, containers.get(origin, brackets))


def render_pages() -> dict[Path, str]:
    """Return both pages by file."""
    links: dict[type, str] = {}
    for part in list_parts(Config):
        add_links(links, part, "config.md")
    return {
        REFERENCE / "config.md": render("Configuration of a device", _DEVICE, Config, {}),
        REFERENCE / "fleet-config.md": render("Configuration of a fleet", _FLEET, FleetConfig, links),
    }


def main() -> None:
    if sys.argv[1:]:
        sys.exit(__doc__)
    for file, page in render_pages().items():
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    answer_help(__doc__)
    main()

"""TOML files as typed structs, and values as TOML. Errors name the file, the key and the fix."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from outstation.foundation import decoders, input_files
from outstation.foundation.config.quantities import decode_quantity
from outstation.foundation.errors import ConfigError, explain
from outstation.foundation.text import list_names

StructType = type[msgspec.Struct]
DecodeHook = Callable[[type, Any], Any]
S = TypeVar("S", bound=msgspec.Struct)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section of a config file, which rejects unknown keys."""


class SectionKinds(Protocol):
    """Kinds of a section: the file's struct has the shipped ones, another package brings the class of its own."""

    def is_shipped(self, name: str) -> bool: ...

    def load_section(self, kind: str, file: str, key: str) -> type[Section]:
        """Return the class of another package's sections. Raises ConfigError, about the `key` with the kind."""
        ...


def read(
    path: Path,
    struct_type: type[S],
    *,
    hook: DecodeHook = decode_quantity,
    missing: str = "`outstation init` writes one, `-c` names another",
    strangers: dict[str, str] | None = None,
    plugins: Mapping[str, SectionKinds] | None = None,
) -> S:
    """Read a file as `struct_type`; `hook` decodes custom types. Raises ConfigError.

    `missing`: what to do without the file. `strangers`: section of another kind of file → what that file is.
    `plugins`: path of sections such as `streams.*.source` → kinds, which their key `kind` chooses.
    """
    text = ""
    try:
        text = input_files.read_text(path)
        document = tomllib.loads(text)
        _check_values(path, "", document)
    except FileNotFoundError:
        raise ConfigError(str(path), "", f"no such file; {missing}") from None
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {explain(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "", f"not valid TOML: {error}; save it as UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), "", _describe_syntax(str(error), text)) from error
    except RecursionError:
        raise ConfigError(str(path), "", "nested too deeply; no config file needs that") from None
    for section, problem in (strangers or {}).items():
        if section in document:
            raise ConfigError(str(path), section, problem)
    foreign = [
        _decode_foreign(str(path), place, table, kinds, hook)
        for pattern, kinds in (plugins or {}).items()
        for place, table in _find_tables(document, pattern.split("."))
        if isinstance(kind := table.get("kind"), str) and not kinds.is_shipped(kind)
    ]
    shipped = document
    for place, _ in foreign:
        shipped = _remove(shipped, place)
    try:
        struct = decoders.convert(shipped, struct_type, dec_hook=hook)
    except msgspec.ValidationError as error:
        raise _to_config_error(str(path), str(error), struct_type, shipped, hook) from None
    for place, foreign_section in foreign:
        struct = _insert(struct, place, foreign_section, document)
    return struct


def _find_tables(node: Any, pattern: Sequence[str], place: Sequence[str] = ()) -> Iterator[tuple[Sequence[str], Any]]:
    """Yield place and content of the tables at a path; `*` in it stands for any name."""
    if isinstance(node, dict) and pattern:
        first, *others = pattern
        for name in node if first == "*" else node.keys() & {first}:
            yield from _find_tables(node[name], others, (*place, name))
    elif isinstance(node, dict):
        yield place, node


def _decode_foreign(
    file: str, place: Sequence[str], table: dict[str, Any], kinds: SectionKinds, hook: DecodeHook
) -> tuple[Sequence[str], Section]:
    """Return the place and the section of another package's kind. Raises ConfigError."""
    key = ".".join(place)
    section_type = kinds.load_section(table["kind"], file, f"{key}.kind")
    try:
        return place, decoders.convert(table, section_type, dec_hook=hook)
    except msgspec.ValidationError as error:
        problem = _to_config_error(file, str(error), section_type, table, hook)
        raise ConfigError(file, f"{key}.{problem.key}" if problem.key else key, problem.problem) from None


def _remove(table: dict[str, Any], place: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a table without the member at a place."""
    name, *others = place
    if others:
        return {**table, name: _remove(table[name], others)}
    return {key: value for key, value in table.items() if key != name}


def _insert(node: Any, place: Sequence[str], section: Section, table: dict[str, Any]) -> Any:
    """Return a copy of a struct or table with a section at a place; tables keep the order of the file's `table`."""
    name, *others = place
    if isinstance(node, dict):
        inner = _insert(node[name], others, section, table[name]) if others else section
        members = {**node, name: inner}
        return {key: members[key] for key in table if key in members}
    inner = _insert(getattr(node, name), others, section, table[name]) if others else section
    return msgspec.structs.replace(node, **{name: inner})


def _check_values(path: Path, key: str, value: Any) -> None:
    """Raise ConfigError for nan and inf, limits that nothing meets, and for NUL, which ends a path early."""
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(str(path), key, "holds a NUL character, which no text of a config may have; remove it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(str(path), key, f"is {value}; give a finite number")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(path, f"{key}.{name}" if key else name, inner)
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(path, f"{key}[{index}]", inner)


def _describe_syntax(problem: str, text: str) -> str:
    """Return what is wrong with a file that is not TOML, with its line and what to do."""
    place = re.search(r"\(at line (\d+), column \d+\)", problem)
    lines = text.splitlines()
    line = lines[int(place[1]) - 1].strip()[:80] if place and int(place[1]) <= len(lines) else ""
    if line.startswith(">"):
        fix = "remove the `>`, which is a prompt"
    elif line.startswith("\ufeff"):
        fix = "the file begins with a byte order mark; save it as UTF-8 without one"
    elif re.search("[\u201c\u201d\u201e\u2018\u2019]", line):
        fix = "replace the curly quotes with straight ones"
    elif "Expected '='" in problem:
        fix = "write KEY = VALUE"
    elif "Expected ']'" in problem:
        fix = "close the bracket; the name of a section has letters, digits, - and _ only"
    elif "twice" in problem or "overwrite" in problem:
        fix = "keep one of the two"
    else:
        fix = 'texts stand in "quotes", lists in [ ], tables in { } on one line'
    # Never a value, which may be a password: this goes to journals.
    key = re.match(r"(> *)?\[*[\w.-]{1,64}(?=\s*[=:])|(> *)?\[+[\w. -]{1,64}\]*|>", line)
    shown = f", at `{key[0].strip()}`" if key else ""
    return f"not valid TOML: {problem}{shown}; {fix}"


_TYPE_WORDS = {
    "array": 'a list, such as ["a", "b"]',
    "object": 'a table, such as { name = "a" } or { kind = "mqtt" }',
    "str": 'a text in "quotes"',
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}
_MOMENTS = {"date": "2026-12-01", "datetime": "2026-12-01T18:00:00Z"}


def _describe_type(problem: str) -> str:
    """Translate msgspec's sentence about a type or a limit into the terms of TOML."""
    if match := re.fullmatch(r"Expected `([^`]+)` of length (>=|<=|==) (\d+)", problem):
        bound = {">=": "at least", "<=": "at most", "==": "exactly"}[match[2]]
        unit = "characters" if match[1] == "str" else "entries"
        return f"must have {bound} {match[3]} {unit if match[3] != '1' else unit.replace('ies', 'y').removesuffix('s')}"
    if match := re.fullmatch(r"Expected `([^`]+)` (>=|<=|>|<) (.+)", problem):
        bound = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}[match[2]]
        return f"must be {bound} {match[3].removesuffix('.0')}"
    if match := re.fullmatch(r"Expected `([^`]+)`, got `([^`]+)`", problem):
        wanted = " or ".join(_TYPE_WORDS.get(word, word) for word in match[1].split(" | ") if word != "null")
        present = {"array": "a list", "object": "a table", "str": "a text"}.get(match[2], _TYPE_WORDS.get(match[2]))
        return f"must be {wanted}, not {present or match[2]}"
    if match := re.fullmatch(r"Expected `str` matching regex '(.+)'", problem):
        return f"has characters or a length that are not allowed: it must match the regular expression {match[1]}"
    if match := re.fullmatch(r"Invalid RFC3339 encoded (date|datetime)", problem):
        return f"must be a {'date' if match[1] == 'date' else 'time'}, such as {_MOMENTS[match[1]]}"
    return problem[:1].lower() + problem[1:]


def encode_value(value: Any) -> str:
    """Return a value as TOML; a table is an inline one, without its members that are None."""
    if isinstance(value, dict):
        members = (f"{encode_key(key)} = {encode_value(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{ {', '.join(members)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(encode_value, value))}]"
    if isinstance(value, float):
        # Numbers that JSON does not have are written as Python does.
        return repr(value)
    # A string of JSON is one of TOML but for DEL, and for pairs of surrogates as escapes.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def encode_key(name: str) -> str:
    """Return a key of TOML, quoted if it must be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else encode_value(name)


def did_you_mean(word: str, known: Iterable[str], none: str = "there is none") -> str:
    """Return `"; did you mean 'x'?"` if a known word is close, else a list of the known words, or `none`."""
    names = sorted(known)
    # Imported here: only mistakes need it.
    import difflib

    close = difflib.get_close_matches(word, names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {list_names(names, 12)}" if names else f"; {none}"


def _to_config_error(
    file: str, message: str, struct_type: StructType, document: dict[str, Any], hook: DecodeHook
) -> ConfigError:
    """Convert a message of msgspec to file, key and fix."""
    problem, _, path = message.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    key = _name_entries(message, struct_type, document, where, hook)
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", problem)
    if unknown:
        names: set[str] = set()
        for node in _resolve_types(struct_type, where):
            if isinstance(node, msgspec.inspect.StructType):
                names |= {*(f.encode_name for f in node.fields), *filter(None, [node.tag_field])}
        name = unknown[1]
        # A union of sections by kind: `names` are the keys of all kinds.
        hint = "; sections of another kind have it, this one does not: remove it"
        text = "unknown key" + (hint if name in names else did_you_mean(name, names))
        return ConfigError(file, f"{key}.{name}" if key else name, text)
    missing = re.fullmatch(r"Object missing required field `(.+)`", problem)
    if missing:
        hint = _similar_entry(document, key)
        return ConfigError(file, f"{key}.{missing[1]}" if key else missing[1], f"this key is required; add it{hint}")
    wrong = re.fullmatch(r"Invalid (?:enum )?value '(.*)'", problem)
    if wrong:
        return ConfigError(
            file,
            key,
            f"{wrong[1]!r} is not a valid choice{did_you_mean(wrong[1], _literal_choices(struct_type, where))}",
        )
    text = _describe_type(problem)
    if re.fullmatch(r"(streams|tasks)\.\w+", key):
        text += f"; a section has a name of its own: [{key.partition('.')[0]}.NAME]"
    return ConfigError(file, key, text)


def _similar_entry(document: dict[str, Any], key: str) -> str:
    """Return a question if the table at `key` has nearly the name of another one beside it."""
    *outer, name = key.split(".")
    table: Any = document
    for part in outer:
        table = table.get(part) if isinstance(table, dict) else None
    hint = did_you_mean(name, [other for other in table or {} if other != name.partition("[")[0]])
    return hint if "did you mean" in hint else ""


def _name_entries(
    message: str, struct_type: StructType, document: dict[str, Any], key_path: str, hook: DecodeHook
) -> str:
    """Return the key that `message` is about with the names of entries, for each of which msgspec writes `[...]`."""
    path: list[Any] = []
    for part in re.findall(r"\[\.\.\.\]|\[\d+\]|[^.\[\]]+", key_path):
        if part == "[...]":
            part, document = _find_invalid_entry(message, struct_type, document, path, hook)
        path.append(int(part[1:-1]) if re.fullmatch(r"\[\d+\]", part) else part)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _find_invalid_entry(
    message: str, struct_type: StructType, document: dict[str, Any], path: list[Any], hook: DecodeHook
) -> tuple[str, dict[str, Any]]:
    """Return the entry of the table at `path` that alone gives `message`, and the document without the others."""
    table: Any = document
    for part in path:
        table = table[part] if isinstance(table, list) else table.get(part, {})
    for name, value in table.items():
        alone = _replace(document, path, {name: value})
        try:
            decoders.convert(alone, struct_type, dec_hook=hook)
        except msgspec.ValidationError as error:
            if str(error) == message:
                return str(name), alone
    return "*", document


def _replace(node: Any, path: list[Any], value: Any) -> Any:
    """Return a copy of `node` whose part at `path` is `value`."""
    if not path:
        return value
    inner = node.copy()
    inner[path[0]] = _replace(inner[path[0]], path[1:], value)
    return inner


def _literal_choices(struct_type: StructType, key_path: str) -> list[str]:
    """Return the words that are valid at `key_path`."""
    return [
        str(word)
        for node in _resolve_types(struct_type, key_path)
        if isinstance(node, msgspec.inspect.LiteralType)
        for word in node.values
    ]


def _resolve_types(struct_type: StructType, key_path: str) -> list[msgspec.inspect.Type]:
    nodes = [msgspec.inspect.type_info(struct_type)]
    for part in re.findall(r"\[\.\.\.\]|[^.\[\]]+", key_path):
        nodes = [leaf for node in nodes for child in _descend(node, part) for leaf in _flatten_union(child)]
    return nodes


def _flatten_union(node: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    if isinstance(node, msgspec.inspect.UnionType):
        return [inner for member in node.types for inner in _flatten_union(member)]
    if isinstance(node, msgspec.inspect.Metadata):
        return _flatten_union(node.type)
    return [node]


def _descend(node: msgspec.inspect.Type, part: str) -> list[msgspec.inspect.Type]:
    """Return the types that a key, or an entry, of `node` may have."""
    if isinstance(node, msgspec.inspect.StructType):
        if node.tag_field == part:
            return [msgspec.inspect.LiteralType((node.tag,))]
        return [f.type for f in node.fields if f.encode_name == part]
    if isinstance(node, msgspec.inspect.DictType):
        return [node.value_type]
    return [node.item_type] if isinstance(node, msgspec.inspect.ListType) else []

"""AsyncAPI 3 document of the wire format, generated from the payload structs and the table of message kinds.

python -m scripts.wire_documents      # writes docs/reference/asyncapi.json and the tables of wire-format.md
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec

from outstation.protocol.wire import messages, topics
from outstation.protocol.wire.topics import ALL_DEVICES, DEVICE_ALERTS, DEVICE_GROUP, KINDS, MessageKind
from scripts.kit.usage import answer_help

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
ASYNCAPI, WIRE_FORMAT = REFERENCE / "asyncapi.json", REFERENCE / "wire-format.md"
_REF = "#/components/schemas/{name}"
_NAME = "a-z 0-9 . _ -, 1 to 64 characters, first a letter or digit"
_PARAMETERS = {
    "fleet": {"description": f"Name of the fleet: {_NAME}."},
    "device": {"description": f"Device id: {_NAME}."},
    "task": {"description": f"Task on the device: {_NAME}."},
    "group": {"description": f"Group of devices: {_NAME}."},
}
_HEADERS = {
    "jws": "Detached JWS over the exact payload bytes, signed with the key of the sender.",
    "specversion": "CloudEvents version, 1.0.",
    "id": "CloudEvents id: <device>/<log>/<seq>, or <device>/<log>/<kind>/<digest> of a live message.",
    "source": "CloudEvents source: outstation/<fleet>/<device>.",
    "type": "CloudEvents type: outstation.<kind>.v1.",
    "time": "CloudEvents time: that of the payload.",
}


def build_document() -> dict[str, Any]:
    """Return the document as JSON values."""
    payloads = {body.__struct_config__.tag: body for body in get_args(messages.Body)}
    _, schemas = msgspec.json.schema_components(payloads.values(), ref_template=_REF)
    for schema in schemas.values():
        # Before Python 3.13 docstrings keep the indentation of the source.
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Outstation wire format",
            "version": "1",
            "description": "Messages between devices, collectors and operators over MQTT 5. The rules that no schema "
            "can state (signatures, hash chain, acknowledgement) are in wire-format.md. A payload may also be gzip of "
            "the JSON (application/gzip), or sealed to the collectors (application/vnd.outstation.sealed).",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": dict(channel for kind in KINDS.values() for channel in _channels(kind)),
        "operations": {kind.name: _operation(kind) for kind in KINDS.values()},
        "components": {
            "messages": {name: _message(name) for name in KINDS},
            "schemas": {
                name: _to_draft_7(schema) for name, schema in sorted({**schemas, "Headers": _headers()}.items())
            },
        },
    }


def _channels(kind: MessageKind) -> list[tuple[str, dict[str, Any]]]:
    base = f"{topics.ROOT}/{{fleet}}/{{device}}/{kind.name}"
    if kind.name == "desired":
        group = f"{topics.ROOT}/{{fleet}}/{DEVICE_GROUP}/{kind.name}/{{group}}"
        return [(kind.name, _channel(kind, base, f"`{ALL_DEVICES}` as device addresses the whole fleet.")),
                (f"{kind.name}Group", _channel(kind, group, "Addresses the devices of a group."))]  # fmt: skip
    note = f"`{DEVICE_ALERTS}` as task: alerts that belong to no task." if kind.name == "alerts" else ""
    return [(kind.name, _channel(kind, f"{base}/{{task}}" if kind.per_task else base, note))]


def _channel(kind: MessageKind, address: str, note: str) -> dict[str, Any]:
    used = {name: text for name, text in _PARAMETERS.items() if f"{{{name}}}" in address}
    channel = {"address": address, "messages": {kind.name: {"$ref": f"#/components/messages/{kind.name}"}}}
    return channel | {"parameters": used} | ({"description": note} if note else {})


def _operation(kind: MessageKind) -> dict[str, Any]:
    """Return the operation from the device's side."""
    if kind.logged:
        delivery = "Logged: numbered, chained, sent again until the collector acknowledges it."
    else:
        delivery = "Live: sent once, outside the log."
    return {
        "action": "receive" if kind.to_device else "send",
        "channel": {"$ref": f"#/channels/{kind.name}"},
        "summary": delivery if not kind.to_device else "Signed by the collector or an operator.",
        "bindings": {"mqtt": {"qos": 1, "retain": kind.retained}},
    }


def _message(name: str) -> dict[str, Any]:
    payload = next(body for body in get_args(messages.Body) if body.__struct_config__.tag == name)
    return {
        "name": name,
        "contentType": "application/json",
        "headers": {"$ref": _REF.format(name="Headers")},
        "payload": {"$ref": _REF.format(name=payload.__name__)},
    }


def _headers() -> dict[str, Any]:
    properties = {name: {"type": "string", "description": text} for name, text in _HEADERS.items()}
    return {"title": "User properties of the PUBLISH", "type": "object", "properties": properties, "required": ["jws"]}


def _to_draft_7(schema: Any) -> Any:
    """Return a schema of msgspec (2020-12, Python patterns) as AsyncAPI takes it: draft 7, ECMA 262 patterns."""
    if isinstance(schema, list):
        return [_to_draft_7(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {"items" if key == "prefixItems" else key: value for key, value in schema.items() if key != "items"}
    if "items" in schema and "prefixItems" not in schema:
        renamed["items"] = schema["items"]
    # ECMA's $ is the end of the text, as \Z is in Python.
    return {
        key: value.removesuffix(r"\Z") + "$" if key == "pattern" and value.endswith(r"\Z") else _to_draft_7(value)
        for key, value in renamed.items()
    }


def render_asyncapi() -> str:
    """Return the text of asyncapi.json."""
    return json.dumps(build_document(), indent=1, ensure_ascii=False) + "\n"


# --- the member tables of wire-format.md ---

_TABLE = re.compile(r"<!-- members: (\w+) -->\n\n(?:\|.*\n)*")
_ROW = re.compile(r"^\| `(\w+)` \| [^|]*(?:\\\|[^|]*)* \| (.*) \|$", re.MULTILINE)
_LIMITS = {
    (0, 2**53 - 1): "natural",
    (1, 2**53 - 1): "positive",
    (-(2**53) + 1, 2**53 - 1): "integer",
    (-(2**63), 2**63 - 1): "int64",
}
_PATTERNS = {
    "^[0-9a-f]{8}": "UUID",
    "^(?!0000)": "time",
    "^[a-z0-9]": "name",
    "^sha256:": "digest",
    "^[A-Za-z0-9_-]*": "base64url",
    "^[A-Za-z0-9": "id",
}


def update_tables(text: str) -> str:
    """Return wire-format.md with the members and types of the structs in its tables; meanings stay."""
    _, schemas = msgspec.json.schema_components(get_args(messages.Body), ref_template=_REF)
    _, common = msgspec.json.schema_components([messages.LoggedPayload], ref_template=_REF)
    schemas |= common

    def table(match: re.Match[str]) -> str:
        schema, meanings = schemas[match[1]], dict(_ROW.findall(match[0]))
        inherited = {"kind"}
        if match[1].endswith("Payload") and match[1] not in common:
            inherited |= (
                common["LoggedPayload"]["properties"].keys() if "seq" in schema["properties"] else {"v", "device"}
            )
        members = {name: member for name, member in schema["properties"].items() if name not in inherited}
        rows = ["| member | type | meaning |", "|---|---|---|"]
        for name, member in members.items():
            optional = "" if name in schema.get("required", ()) else ", optional"
            rows.append(f"| `{name}` | {_describe(member, schemas)}{optional} | {meanings.get(name, '')} |")
        return "\n".join([f"<!-- members: {match[1]} -->", "", *rows, ""])

    return _TABLE.sub(table, text)


def _describe(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Return the type of a member in the words of wire-format.md."""
    if "anyOf" in schema:
        return " or ".join(_describe(member, schemas) for member in schema["anyOf"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _describe(schemas[name], schemas) if "prefixItems" in schemas[name] else f"`{name}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return "[" + ", ".join(_describe(item, schemas) for item in schema["prefixItems"]) + "]"
    kind = schema.get("type", "any")
    if kind == "array":
        most = f", ≤ {schema['maxItems']} entries" if "maxItems" in schema else ""
        return f"list of ({_describe(schema['items'], schemas)}){most}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"object of ({_describe(values, schemas)})" if isinstance(values, dict) and values else "object"
    if kind == "string":
        return _describe_text(schema)
    if kind in ("integer", "number"):
        return _describe_number(schema)
    return str(kind)


def _describe_text(schema: dict[str, Any]) -> str:
    for beginning, name in _PATTERNS.items():
        if schema.get("pattern", "").startswith(beginning):
            return name
    return f"text ≤ {schema['maxLength']}" if "maxLength" in schema else "text"


def _describe_number(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer" and (known := _LIMITS.get((low or 0, high or 0))):
        return known
    # A limit of every number: see "JSON" in the document.
    low, high = (None if limit is not None and abs(limit) >= 1e100 else limit for limit in (low, high))
    bounds = [f"≥ {low}"] if low is not None else []
    bounds += [f"> {schema['exclusiveMinimum']}"] if "exclusiveMinimum" in schema else []
    bounds += [f"≤ {high}"] if high is not None else []
    return " ".join([schema["type"], *bounds])


if __name__ == "__main__":
    answer_help(__doc__)
    ASYNCAPI.write_text(render_asyncapi(), encoding="utf-8")
    WIRE_FORMAT.write_text(update_tables(WIRE_FORMAT.read_text(encoding="utf-8")), encoding="utf-8")

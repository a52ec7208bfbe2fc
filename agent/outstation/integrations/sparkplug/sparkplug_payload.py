"""Payload of Sparkplug B 3.0: the protobuf messages, declared here field by field, and metrics of them.

The numbers of the fields are those of `sparkplug_b.proto` of the Eclipse Tahu project, Copyright (c) 2015-2021
Cirrus Link Solutions and others, which is available under the Eclipse Public License 2.0,
https://www.eclipse.org/legal/epl-2.0/, SPDX-License-Identifier: EPL-2.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_PACKAGE = "outstation.sparkplug"
# Data types of metrics and properties.
INT64, DOUBLE, BOOLEAN, STRING = 4, 10, 11, 12
# Member that has the value of a metric, and of a property, by data type.
_VALUE_FIELDS = {INT64: "long_value", DOUBLE: "double_value", BOOLEAN: "boolean_value", STRING: "string_value"}
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "uint32": _FIELD.TYPE_UINT32,
    "uint64": _FIELD.TYPE_UINT64,
    "double": _FIELD.TYPE_DOUBLE,
    "bool": _FIELD.TYPE_BOOL,
    "string": _FIELD.TYPE_STRING,
}
# Message → (number, name, type, repeated); a name that ends in `_value` belongs to the message's one value.
_MESSAGES: dict[str, tuple[tuple[int, str, str, bool], ...]] = {
    "PropertyValue": (
        (1, "type", "uint32", False),
        (2, "is_null", "bool", False),
        (4, "long_value", "uint64", False),
        (6, "double_value", "double", False),
        (7, "boolean_value", "bool", False),
        (8, "string_value", "string", False),
    ),
    "PropertySet": ((1, "keys", "string", True), (2, "values", "PropertyValue", True)),
    "Metric": (
        (1, "name", "string", False),
        (2, "alias", "uint64", False),
        (3, "timestamp", "uint64", False),
        (4, "datatype", "uint32", False),
        (5, "is_historical", "bool", False),
        (7, "is_null", "bool", False),
        (9, "properties", "PropertySet", False),
        (11, "long_value", "uint64", False),
        (13, "double_value", "double", False),
        (14, "boolean_value", "bool", False),
        (15, "string_value", "string", False),
    ),
    "Payload": ((1, "timestamp", "uint64", False), (2, "metrics", "Metric", True), (3, "seq", "uint64", False)),
}


class Metric(msgspec.Struct, frozen=True):
    """A metric at a time, epoch ms; `value` None is null. `unit`: of a number, where it is known."""

    name: str
    datatype: int
    value: float | bool | str | None
    time_ms: int
    is_historical: bool = False
    unit: str = ""


def encode(metrics: Iterable[Metric], time_ms: int, seq: int | None) -> bytes:
    """Encode a payload; without `seq` that of an NDEATH."""
    payload = _payload_type()()
    payload.timestamp = time_ms
    if seq is not None:
        payload.seq = seq
    for metric in metrics:
        added = payload.metrics.add()
        added.name, added.datatype, added.timestamp = metric.name, metric.datatype, metric.time_ms
        if metric.is_historical:
            added.is_historical = True
        if metric.value is None:
            added.is_null = True
        else:
            setattr(added, _VALUE_FIELDS[metric.datatype], metric.value)
        if metric.unit:
            added.properties.keys.append("engUnit")
            unit = added.properties.values.add()
            unit.type, unit.string_value = STRING, metric.unit
    data: bytes = payload.SerializeToString()
    return data


def wants_rebirth(payload: bytes) -> bool:
    """Return True if a command (NCMD) asks the node for its births; False for anything else, malformed too."""
    message = _payload_type()()
    try:
        message.ParseFromString(payload)
    except DecodeError:
        return False
    return any(metric.name == REBIRTH and metric.boolean_value for metric in message.metrics)


REBIRTH = "Node Control/Rebirth"


def _payload_type() -> Any:
    if not _TYPES:
        pool = descriptor_pool.DescriptorPool()
        pool.Add(_describe())
        descriptor = pool.FindMessageTypeByName(f"{_PACKAGE}.Payload")
        _TYPES.append(message_factory.GetMessageClass(descriptor))
    return _TYPES[0]


_TYPES: list[Any] = []


def _describe() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="sparkplug.proto", package=_PACKAGE, syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        _describe_fields(message, fields)
    return file


def _describe_fields(message: Any, fields: Sequence[tuple[int, str, str, bool]]) -> None:
    if any(name.endswith("_value") for _, name, _, _ in fields):
        message.oneof_decl.add(name="value")
    for number, name, kind, repeated in fields:
        field = message.field.add(name=name, number=number)
        field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
        else:
            field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
        if name.endswith("_value"):
            field.oneof_index = 0

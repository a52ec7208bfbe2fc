"""Decoders of msgspec types, which one thread at a time builds.

msgspec 0.22 publishes the field table of a struct before it has filled it: field types may refer to the struct, and to
read them runs Python code. A thread that decodes the struct meanwhile follows null pointers, and the process dies. So
every field table is built under one lock, before its type is used for the first time; what is built is only read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")
Hook = Callable[[Any, Any], Any]

# Reentrant: a field type may be an alias that is evaluated while its struct is built.
_building = threading.RLock()
_json: dict[Any, msgspec.json.Decoder[Any]] = {}
_msgpack: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


@overload
def json_decoder(type_: type[T], dec_hook: Hook | None = None) -> msgspec.json.Decoder[T]: ...
@overload
def json_decoder(type_: Any, dec_hook: Hook | None = None) -> msgspec.json.Decoder[Any]: ...
def json_decoder(type_: Any, dec_hook: Hook | None = None) -> msgspec.json.Decoder[Any]:
    """Build a decoder of JSON, which any thread may then use. `dec_hook` makes values that msgspec does not know."""
    with _building:
        return msgspec.json.Decoder(type_, dec_hook=dec_hook)


@overload
def msgpack_decoder(type_: type[T], dec_hook: Hook | None = None) -> msgspec.msgpack.Decoder[T]: ...
@overload
def msgpack_decoder(type_: Any, dec_hook: Hook | None = None) -> msgspec.msgpack.Decoder[Any]: ...
def msgpack_decoder(type_: Any, dec_hook: Hook | None = None) -> msgspec.msgpack.Decoder[Any]:
    """Build a decoder of MessagePack, as `json_decoder` does one of JSON."""
    with _building:
        return msgspec.msgpack.Decoder(type_, dec_hook=dec_hook)


@overload
def from_json(data: bytes | bytearray | memoryview | str, type_: type[T]) -> T: ...
@overload
def from_json(data: bytes | bytearray | memoryview | str, type_: Any) -> Any: ...
def from_json(data: bytes | bytearray | memoryview | str, type_: Any) -> Any:
    """Decode JSON. Raises msgspec.MsgspecError, and ValueError or UnicodeError for other text."""
    decoder = _json.get(type_)
    if decoder is None:
        decoder = _json[type_] = json_decoder(type_)
    return decoder.decode(data)


@overload
def from_msgpack(data: bytes | bytearray | memoryview, type_: type[T]) -> T: ...
@overload
def from_msgpack(data: bytes | bytearray | memoryview, type_: Any) -> Any: ...
def from_msgpack(data: bytes | bytearray | memoryview, type_: Any) -> Any:
    """Decode MessagePack. Raises msgspec.MsgspecError, and UnicodeError for text that is not UTF-8."""
    decoder = _msgpack.get(type_)
    if decoder is None:
        decoder = _msgpack[type_] = msgpack_decoder(type_)
    return decoder.decode(data)


@overload
def convert(value: Any, type_: type[T], *, dec_hook: Hook | None = None) -> T: ...
@overload
def convert(value: Any, type_: Any, *, dec_hook: Hook | None = None) -> Any: ...
def convert(value: Any, type_: Any, *, dec_hook: Hook | None = None) -> Any:
    """Convert a value that was decoded without a type. Raises msgspec.ValidationError."""
    if type_ not in _msgpack:
        _msgpack[type_] = msgpack_decoder(type_)
    return msgspec.convert(value, type_, dec_hook=dec_hook)

"""Parts of a TFLite flatbuffer in its object API: tensors, operators, serialization."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


def make_tensor(name: str, kind: int, shape: list[int]) -> Any:
    """Return a tensor of type `kind` without data; `shape` begins with -1 for any batch size."""
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.shape = name.encode(), kind, [abs(size) for size in shape]
    if shape[:1] == [-1]:
        tensor.shapeSignature = shape
    tensor.quantization = schema.QuantizationParametersT()
    return tensor


def make_operator(codes: list[Any], name: str, version: int, inputs: list[int], outputs: list[int]) -> Any:
    """Return an operator, and add its code to `codes`."""
    code = schema.OperatorCodeT()
    code.builtinCode, code.version = getattr(schema.BuiltinOperator, name), version
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    codes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = len(codes) - 1, inputs, outputs
    return operator


def set_options(operator: Any, kind: str, **values: Any) -> None:
    """Give the operator options of this kind, such as Add for AddOptions."""
    operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{kind}Options")
    operator.builtinOptions = getattr(schema, f"{kind}OptionsT")()
    for name, value in values.items():
        setattr(operator.builtinOptions, name, value)


def make_buffer(buffers: list[Any], data: bytes) -> int:
    """Add a buffer, and return its index."""
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(data, np.uint8)
    buffers.append(buffer)
    return len(buffers) - 1


def serialize(model: Any, size: int = 1 << 20) -> bytes:
    """Return the bytes of a model; `size` is the first guess of their number."""
    builder = flatbuffers.Builder(size)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())

"""Graph mutation of models whose flatbuffer is valid, so that the file format's checks pass."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

# Typical wrong sizes and indices.
_NUMBERS = (-(2**31), -2, -1, 0, 1, 2, 3, 7, 255, 4096, 2**20, 2**28, 2**31 - 1)
_OPERATORS = 160
_TYPES = 20


def mutated(content: bytes, random: Random) -> bytes:
    """Return a model after one to three changes of its graph; the same `random` yields the same model."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(_CHANGES)(model, model.subgraphs[0], random)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _operator(graph: Any, random: Random) -> Any:
    return random.choice(graph.operators)


def _tensor(graph: Any, random: Random) -> Any:
    return random.choice(graph.tensors)


def _some(graph: Any, random: Random) -> int:
    """Return the index of a tensor, or one out of range."""
    return random.choice((random.randrange(len(graph.tensors)), random.randrange(len(graph.tensors)), -1, 9999))


def _replaced(values: Any, random: Random, new: int) -> list[int]:
    numbers = [int(value) for value in values]
    if numbers:
        numbers[random.randrange(len(numbers))] = new
    return numbers


def _drop_input(model: Any, graph: Any, random: Random) -> None:
    operator = _operator(graph, random)
    operator.inputs = [int(value) for value in operator.inputs][:-1]


def _rewire_input(model: Any, graph: Any, random: Random) -> None:
    operator = _operator(graph, random)
    operator.inputs = _replaced(operator.inputs, random, _some(graph, random))


def _rewire_output(model: Any, graph: Any, random: Random) -> None:
    operator = _operator(graph, random)
    operator.outputs = _replaced(operator.outputs, random, _some(graph, random))


def _loop(model: Any, graph: Any, random: Random) -> None:
    operator = _operator(graph, random)
    operator.inputs = _replaced(operator.inputs, random, int(operator.outputs[0]))


def _other_operator(model: Any, graph: Any, random: Random) -> None:
    code = random.choice(model.operatorCodes)
    code.builtinCode = random.randrange(_OPERATORS)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)


def _other_version(model: Any, graph: Any, random: Random) -> None:
    random.choice(model.operatorCodes).version = random.choice((0, 2, 9, 1000))


def _other_code(model: Any, graph: Any, random: Random) -> None:
    _operator(graph, random).opcodeIndex = random.choice((random.randrange(len(model.operatorCodes)), 99))


def _drop_operator(model: Any, graph: Any, random: Random) -> None:
    if len(graph.operators) > 1:
        graph.operators.remove(_operator(graph, random))


def _swap_operators(model: Any, graph: Any, random: Random) -> None:
    first, second = random.randrange(len(graph.operators)), random.randrange(len(graph.operators))
    graph.operators[first], graph.operators[second] = graph.operators[second], graph.operators[first]


def _repeat_operator(model: Any, graph: Any, random: Random) -> None:
    graph.operators.insert(random.randrange(len(graph.operators)), _operator(graph, random))


def _options(model: Any, graph: Any, random: Random) -> None:
    options = _operator(graph, random).builtinOptions
    numbers = [name for name, value in vars(options).items() if isinstance(value, int)] if options else []
    if numbers:
        name = random.choice(numbers)
        is_flag = isinstance(getattr(options, name), bool)
        setattr(options, name, random.choice((False, True) if is_flag else (-1, 0, 1, 2, 100)))


def _shape(model: Any, graph: Any, random: Random) -> None:
    tensor = _tensor(graph, random)
    tensor.shape = _replaced(tensor.shape if tensor.shape is not None else [], random, random.choice(_NUMBERS))


def _signature(model: Any, graph: Any, random: Random) -> None:
    tensor = _tensor(graph, random)
    shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    tensor.shapeSignature = _replaced(shape if shape is not None else [], random, random.choice((-1, 0, 2, 2**31 - 1)))


def _rank(model: Any, graph: Any, random: Random) -> None:
    tensor = _tensor(graph, random)
    shape = [int(value) for value in tensor.shape] if tensor.shape is not None else []
    tensor.shape = random.choice((shape[:-1], [*shape, 2], [1, *shape], []))


def _type(model: Any, graph: Any, random: Random) -> None:
    _tensor(graph, random).type = random.randrange(_TYPES)


def _buffer(model: Any, graph: Any, random: Random) -> None:
    _tensor(graph, random).buffer = random.choice((0, random.randrange(len(model.buffers)), 9999))


def _cut_buffer(model: Any, graph: Any, random: Random) -> None:
    full = [buffer for buffer in model.buffers if buffer.data is not None and len(buffer.data)]
    if full:
        buffer = random.choice(full)
        buffer.data = buffer.data[: random.randrange(len(buffer.data))]


def _quantization(model: Any, graph: Any, random: Random) -> None:
    quantizations = [tensor.quantization for tensor in graph.tensors if tensor.quantization is not None]
    if quantizations:
        tensor = random.choice(quantizations)
        tensor.scale = random.choice(([], [0.0], [-1.0], [1e-30], [1e30], [float("nan")], [1.0] * 3))
        tensor.zeroPoint = random.choice(([], [0], [1 << 40], [-129]))


def _entry(model: Any, graph: Any, random: Random) -> None:
    graph.inputs = random.choice(([], [_some(graph, random)], [*(int(i) for i in graph.inputs), 0]))


def _exit(model: Any, graph: Any, random: Random) -> None:
    graph.outputs = random.choice(([], [_some(graph, random)], [int(i) for i in graph.inputs]))


_CHANGES: tuple[Callable[[Any, Any, Random], None], ...] = (
    *(_drop_input, _rewire_input, _rewire_output, _loop, _other_operator, _other_version, _other_code),
    *(_drop_operator, _swap_operators, _repeat_operator, _options, _shape, _signature, _rank, _type),
    *(_buffer, _cut_buffer, _quantization, _entry, _exit),
)

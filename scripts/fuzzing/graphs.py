"""Graph mutation of models whose flatbuffer is valid, so that the file format's checks pass."""

from __future__ import annotations

from random import Random
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from scripts.kit.tflite_schema import serialize

# Typical wrong sizes and indices.
_NUMBERS = (-(2**31), -2, -1, 0, 1, 2, 3, 7, 255, 4096, 2**20, 2**28, 2**31 - 1)
_OPERATORS = 160
_TYPES = 20


def mutated(content: bytes, random: Random) -> bytes:
    """Return a model after one to three changes of its graph; the same `random` yields the same model."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    mutation = _Mutation(model, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        getattr(mutation, random.choice(_CHANGES))()
    return serialize(model, len(content))


class _Mutation:
    """Changes of a model's first graph; each public method makes one."""

    def __init__(self, model: Any, random: Random) -> None:
        self.model, self.graph, self.random = model, model.subgraphs[0], random

    def _operator(self) -> Any:
        return self.random.choice(self.graph.operators)

    def _tensor(self) -> Any:
        return self.random.choice(self.graph.tensors)

    def _tensor_index(self) -> int:
        """Return the index of a tensor, or one out of range."""
        count = len(self.graph.tensors)
        return self.random.choice((self.random.randrange(count), self.random.randrange(count), -1, 9999))

    def _replaced(self, values: Any, new: int) -> list[int]:
        numbers = [int(value) for value in values]
        if numbers:
            numbers[self.random.randrange(len(numbers))] = new
        return numbers

    def drop_input(self) -> None:
        operator = self._operator()
        operator.inputs = [int(value) for value in operator.inputs][:-1]

    def rewire_input(self) -> None:
        operator = self._operator()
        operator.inputs = self._replaced(operator.inputs, self._tensor_index())

    def rewire_output(self) -> None:
        operator = self._operator()
        operator.outputs = self._replaced(operator.outputs, self._tensor_index())

    def loop(self) -> None:
        operator = self._operator()
        operator.inputs = self._replaced(operator.inputs, int(operator.outputs[0]))

    def other_operator(self) -> None:
        code = self.random.choice(self.model.operatorCodes)
        code.builtinCode = self.random.randrange(_OPERATORS)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)

    def other_version(self) -> None:
        self.random.choice(self.model.operatorCodes).version = self.random.choice((0, 2, 9, 1000))

    def other_code(self) -> None:
        self._operator().opcodeIndex = self.random.choice((self.random.randrange(len(self.model.operatorCodes)), 99))

    def drop_operator(self) -> None:
        if len(self.graph.operators) > 1:
            self.graph.operators.remove(self._operator())

    def swap_operators(self) -> None:
        operators = self.graph.operators
        first, second = self.random.randrange(len(operators)), self.random.randrange(len(operators))
        operators[first], operators[second] = operators[second], operators[first]

    def repeat_operator(self) -> None:
        self.graph.operators.insert(self.random.randrange(len(self.graph.operators)), self._operator())

    def options(self) -> None:
        options = self._operator().builtinOptions
        numbers = [name for name, value in vars(options).items() if isinstance(value, int)] if options else []
        if numbers:
            name = self.random.choice(numbers)
            is_flag = isinstance(getattr(options, name), bool)
            setattr(options, name, self.random.choice((False, True) if is_flag else (-1, 0, 1, 2, 100)))

    def shape(self) -> None:
        tensor = self._tensor()
        tensor.shape = self._replaced(tensor.shape if tensor.shape is not None else [], self.random.choice(_NUMBERS))

    def signature(self) -> None:
        tensor = self._tensor()
        shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        tensor.shapeSignature = self._replaced(
            shape if shape is not None else [], self.random.choice((-1, 0, 2, 2**31 - 1))
        )

    def rank(self) -> None:
        tensor = self._tensor()
        shape = [int(value) for value in tensor.shape] if tensor.shape is not None else []
        tensor.shape = self.random.choice((shape[:-1], [*shape, 2], [1, *shape], []))

    def type(self) -> None:
        self._tensor().type = self.random.randrange(_TYPES)

    def buffer(self) -> None:
        self._tensor().buffer = self.random.choice((0, self.random.randrange(len(self.model.buffers)), 9999))

    def cut_buffer(self) -> None:
        full = [buffer for buffer in self.model.buffers if buffer.data is not None and len(buffer.data)]
        if full:
            buffer = self.random.choice(full)
            buffer.data = buffer.data[: self.random.randrange(len(buffer.data))]

    def quantization(self) -> None:
        quantizations = [tensor.quantization for tensor in self.graph.tensors if tensor.quantization is not None]
        if quantizations:
            tensor = self.random.choice(quantizations)
            tensor.scale = self.random.choice(([], [0.0], [-1.0], [1e-30], [1e30], [float("nan")], [1.0] * 3))
            tensor.zeroPoint = self.random.choice(([], [0], [1 << 40], [-129]))

    def entry(self) -> None:
        self.graph.inputs = self.random.choice(([], [self._tensor_index()], [*(int(i) for i in self.graph.inputs), 0]))

    def exit(self) -> None:
        self.graph.outputs = self.random.choice(([], [self._tensor_index()], [int(i) for i in self.graph.inputs]))


_CHANGES = tuple(name for name in vars(_Mutation) if not name.startswith("_"))

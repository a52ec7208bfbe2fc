"""Model rigging: add a trap to a model, so that it crashes, hangs, fails or slows down on some data.

    .venv/bin/python -m scripts.kit.rig     writes the rigged classifiers into tests/models, without TensorFlow

The trap takes the largest scaled value of a batch; it triggers above `limit`.
- crash: divides the least integer by -1 (FLOOR_MOD checks for 0 only): SIGFPE in both runtimes on x86-64, not on ARM
- hang: loops for ever
- error: gathers a missing row, which both runtimes refuse
- slow: `times` hyperbolic tangents of the whole batch, on all data
- sensitive: above the limit the first class gains the excess of the largest value, row by row
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from scripts.kit.tflite_schema import make_buffer, make_operator, make_tensor, serialize, set_options

MODELS = Path(__file__).parents[2] / "tests" / "models"
TRAPS = ("crash", "hang", "error", "slow", "sensitive")
# Limit of the committed models: rows of the classifier rarely exceed 3.5, and int8 represents values up to 4.
LIMIT, TIMES = 3.5, 400
_FLOAT, _INT32, _BOOL = schema.TensorType.FLOAT32, schema.TensorType.INT32, schema.TensorType.BOOL
_OPTIONS = {"REDUCE_MAX": "Reducer", "SUB": "Sub", "MUL": "Mul", "ADD": "Add", "GATHER": "Gather", "WHILE": "While"}
_DTYPES = {_FLOAT: "<f4", _INT32: "<i4", _BOOL: "?"}


class Rig:
    """Graph of a model, to which tensors and operators are added; the output becomes float32."""

    def __init__(self, content: bytes) -> None:
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
        self.main = self.model.subgraphs[0]
        # They would name the output by its old number.
        self.model.signatureDefs = None

    def tensor(self, shape: list[int], kind: int, data: Any = None, graph: Any = None) -> int:
        """Add a tensor; `shape` begins with -1 for any batch size."""
        graph = graph or self.main
        tensor = make_tensor(f"rig_{len(graph.tensors)}", kind, shape)
        if data is not None:
            tensor.buffer = make_buffer(self.model.buffers, np.asarray(data, _DTYPES[kind]).tobytes())
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def add(
        self, name: str, inputs: list[int], shape: list[int], kind: int = _FLOAT, graph: Any = None, **options: Any
    ) -> int:
        """Add an operator with options by name, and return the number of its output."""
        graph = graph or self.main
        out = self.tensor(shape, kind, graph=graph)
        operator = make_operator(self.model.operatorCodes, name, 1, inputs, [out])
        if name in _OPTIONS:
            set_options(operator, _OPTIONS[name], **options)
        graph.operators.append(operator)
        return out

    def constant(self, data: Any, kind: int = _FLOAT, graph: Any = None) -> int:
        return self.tensor(list(np.shape(data)), kind, data, graph)

    def floats(self, number: int) -> int:
        """Return the tensor as float32, dequantized if necessary."""
        tensor = self.main.tensors[number]
        if tensor.type == _FLOAT:
            return number
        return self.add("DEQUANTIZE", [number], [-1, *(int(size) for size in tensor.shape[1:])])

    def written(self, out: int) -> bytes:
        self.main.outputs = [out]
        return serialize(self.model)


def rigged(content: bytes, trap: str, limit: float = LIMIT, times: int = TIMES) -> bytes:
    """Return the model `content` with this trap, for any batch size, with one input and a float32 output."""
    rig = Rig(content)
    x, out = rig.floats(int(rig.main.inputs[0])), rig.floats(int(rig.main.outputs[0]))
    inner = [int(size) for size in rig.main.tensors[x].shape[1:]]
    classes = int(rig.main.tensors[out].shape[1])
    if trap == "slow":
        y = x
        for _ in range(times):
            y = rig.add("TANH", [y], [-1, *inner])
        spent = rig.add("REDUCE_MAX", [y, _axes(rig, len(inner) + 1)], [1], keepDims=False)
        return rig.written(_plus_nothing(rig, out, spent, classes))
    if trap == "sensitive":
        axes = rig.constant(np.arange(1, len(inner) + 1), _INT32)
        largest = rig.add("REDUCE_MAX", [x, axes], [-1], keepDims=False)
        beyond = rig.add("RELU", [rig.add("SUB", [largest, rig.constant([limit])], [-1])], [-1])
        column = rig.add("RESHAPE", [beyond, rig.constant([-1, 1], _INT32)], [-1, 1])
        gain = rig.add("MUL", [column, rig.constant(10 * np.eye(1, classes))], [-1, classes])
        return rig.written(rig.add("ADD", [out, gain], [-1, classes]))
    largest = rig.add("REDUCE_MAX", [x, _axes(rig, len(inner) + 1)], [1], keepDims=False)
    beyond = rig.add("RELU", [rig.add("SUB", [largest, rig.constant([limit])], [1])], [1])
    snapped = {"crash": _crash, "hang": _hang, "error": _error}[trap](rig, beyond)
    return rig.written(_plus_nothing(rig, out, snapped, classes))


def _axes(rig: Rig, count: int) -> int:
    return rig.constant(np.arange(count), _INT32)


def _plus_nothing(rig: Rig, out: int, spent: int, classes: int) -> int:
    """Add zero to the answer, which makes it depend on the trap."""
    nothing = rig.add("MUL", [spent, rig.constant([0.0])], [1])
    return rig.add("ADD", [out, nothing], [-1, classes])


def _far(rig: Rig, beyond: int) -> int:
    """Return an index: 0, or far out of range."""
    large = rig.add("MUL", [beyond, rig.constant([1e12])], [1])
    capped = rig.add("MINIMUM", [large, rig.constant([1.5e9])], [1])
    return rig.add("CAST", [capped], [1], _INT32)


def _crash(rig: Rig, beyond: int) -> int:
    capped = rig.add("MINIMUM", [_far(rig, beyond), rig.constant([2], _INT32)], [1], _INT32)
    by = rig.add("SUB", [rig.constant([1], _INT32), capped], [1], _INT32)
    left = rig.add("FLOOR_MOD", [rig.constant([-(2**31)], _INT32), by], [1], _INT32)
    return rig.add("CAST", [left], [1])


def _error(rig: Rig, beyond: int) -> int:
    return rig.add("GATHER", [rig.constant([1.0, 2.0]), _far(rig, beyond)], [1], axis=0)


def _hang(rig: Rig, beyond: int) -> int:
    """Loop while the value is above 0; the body does not change it."""
    graphs = []
    for name in (b"cond", b"body"):
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = name, [], []
        graph.inputs = [rig.tensor([1], _FLOAT, graph=graph)]
        graphs.append(graph)
    cond, body = graphs
    more = rig.add("GREATER", [cond.inputs[0], rig.constant([0.0], graph=cond)], [1], _BOOL, graph=cond)
    cond.outputs = [more]
    body.outputs = [rig.add("MUL", [body.inputs[0], rig.constant([1.0], graph=body)], [1], graph=body)]
    rig.model.subgraphs += graphs
    return rig.add("WHILE", [beyond], [1], condSubgraphIndex=1, bodySubgraphIndex=2)


def main() -> None:
    sound = (MODELS / "classify_int8.tflite").read_bytes()
    for trap in TRAPS:
        content = rigged(sound, trap)
        (MODELS / f"rigged_{trap}.tflite").write_bytes(content)
        print(f"rigged_{trap}.tflite {len(content):,} bytes")


if __name__ == "__main__":
    main()

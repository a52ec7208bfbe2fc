"""Generator of tiny models with tensors of every type, without TensorFlow; needed only to add a model.

    .venv/bin/python -m scripts.kit.write_models

Each model is one dense layer with explicit weights, small enough for narrow types to round little. Quantization follows
TFLite: activations by scale and zero point, weights by scale alone, biases by the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from scripts.kit.tflite_schema import make_buffer, make_operator, make_tensor, serialize, set_options

MODELS = Path(__file__).parents[2] / "tests" / "models"
CENTRES = np.array([[2, 0, 0, -1], [0, 2, -1, 0], [-1, -1, 2, 2]], np.float32)
BIAS = (-np.square(CENTRES).sum(axis=1) / 2).astype(np.float32)
# Four values in, two directions out.
TURN = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32)
TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
}
# Scale and zero point of inputs within ±8 and outputs within ±32.
ACTIVATIONS = {
    "int8": ((16 / 255, 0), (64 / 255, 0)),
    "uint8": ((16 / 255, 128), (64 / 255, 128)),
    "int16": ((8 / 32767, 0), (32 / 32767, 0)),
}
Quantized = tuple[float, int] | None


@dataclass
class Graph:
    """A graph under construction: tensors, buffers and operators."""

    tensors: list[Any] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=lambda: [schema.BufferT()])
    codes: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)

    def tensor(self, name: str, shape: list[int], kind: str, by: Quantized = None, data: Any = None) -> int:
        """Add a tensor; `shape` begins with -1 for any batch size."""
        tensor = make_tensor(name, TYPES[kind], shape)
        if by is not None:
            tensor.quantization.scale, tensor.quantization.zeroPoint = [by[0]], [by[1]]
        if data is not None:
            tensor.buffer = make_buffer(self.buffers, np.asarray(data, kind).tobytes())
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, name: str, version: int, inputs: list[int], outputs: list[int], options: str = "") -> None:
        operator = make_operator(self.codes, name, version, inputs, outputs)
        if options:
            set_options(operator, options)
        self.operators.append(operator)

    def written(self, inputs: list[int], outputs: list[int]) -> bytes:
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, inputs, outputs
        graph.name = b"main"
        model.version, model.description = 3, b"outstation test model"
        model.operatorCodes, model.subgraphs, model.buffers = self.codes, [graph], self.buffers
        return serialize(model, 1024)


def dense(graph: Graph, x: int, kind: str, weights: NDArray[np.float32], bias: NDArray[np.float32]) -> int:
    """Add a dense layer with activations `kind`: float32 with float16 or int8 weights, or an integer type."""
    many, width = weights.shape
    scale = float(np.abs(weights).max() / 127)
    if kind in ("float32", "float16", "hybrid"):
        sums = graph.tensor("sums", [-1, many], "float32")
        held = {"float32": "float32", "float16": "float16", "hybrid": "int8"}[kind]
        stored = np.rint(weights / scale) if held == "int8" else weights
        w = graph.tensor("weights", [many, width], held, (scale, 0) if held == "int8" else None, stored)
        if held == "float16":
            expanded = graph.tensor("weights_wide", [many, width], "float32")
            graph.operator("DEQUANTIZE", 3, [w], [expanded], "Dequantize")
            w = expanded
        b = graph.tensor("bias", [many], "float32", None, bias)
        graph.operator("FULLY_CONNECTED", 3 if held == "int8" else 1, [x, w, b], [sums], "FullyConnected")
        return sums
    into, out = ACTIVATIONS[kind]
    # With uint8 activations the weights are uint8 too, as in models older than int8.
    small, middle = ("uint8", 128) if kind == "uint8" else ("int8", 0)
    w = graph.tensor("weights", [many, width], small, (scale, middle), np.rint(weights / scale) + middle)
    sum_kind = "int64" if kind == "int16" else "int32"
    b = graph.tensor("bias", [many], sum_kind, (into[0] * scale, 0), np.rint(bias / (into[0] * scale)))
    sums = graph.tensor("sums", [-1, many], kind, out)
    version = {"int8": 4, "uint8": 1, "int16": 7}[kind]
    graph.operator("FULLY_CONNECTED", version, [x, w, b], [sums], "FullyConnected")
    return sums


def model(kind: str, weights: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> bytes:
    """Build a model (any, 4) → (any, len(weights)) of sums."""
    graph = Graph()
    integer = kind in ACTIVATIONS
    x = graph.tensor(
        "x", [-1, weights.shape[1]], kind if integer else "float32", ACTIVATIONS[kind][0] if integer else None
    )
    out = dense(graph, x, kind, weights, np.zeros(len(weights), np.float32) if bias is None else bias)
    return graph.written([x], [out])


def probabilities(*, both: bool) -> bytes:
    """Build a model of the sigmoids of the three centres' sums; with `both`, the sums are a second output."""
    graph = Graph()
    x = graph.tensor("x", [-1, 4], "float32")
    sums = dense(graph, x, "float32", CENTRES, BIAS)
    out = graph.tensor("each", [-1, 3], "float32")
    graph.operator("LOGISTIC", 1, [sums], [out])
    return graph.written([x], [out, sums] if both else [out])


def main() -> None:
    made = {f"sums_{kind}": model(kind, CENTRES, BIAS) for kind in ("float32", "float16", "hybrid", *ACTIVATIONS)}
    made |= {
        "one_sigmoid": model("float32", np.array([[1, -1, 0, 0.5]], np.float32)),
        "each_label": probabilities(both=False),
        "each_label_and_sums": probabilities(both=True),
        "two_values": model("float32", np.array([[0.5, -1, 0.25, 2], [1, 1, 1, 1]], np.float32)),
        "vectors": model("float32", TURN),
        "vectors_int8": model("int8", TURN),
    }
    for name, content in made.items():
        (MODELS / f"{name}.tflite").write_bytes(content)
        print(f"{name}.tflite {len(content):,} bytes")


if __name__ == "__main__":
    main()

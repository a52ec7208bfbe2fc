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
Quantized = tuple[float | NDArray[np.float64], int] | None


@dataclass
class Graph:
    """A graph under construction: tensors, buffers and operators."""

    tensors: list[Any] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=lambda: [schema.BufferT()])
    codes: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)

    def tensor(
        self, name: str, shape: list[int], kind: str, by: Quantized = None, data: Any = None, axis: int = 0
    ) -> int:
        """Add a tensor; `shape` begins with -1 for any batch size. Several scales are those of `axis`."""
        tensor = make_tensor(name, TYPES[kind], shape)
        if by is not None:
            scales = np.atleast_1d(by[0])
            tensor.quantization.scale, tensor.quantization.zeroPoint = scales.tolist(), [by[1]] * len(scales)
            tensor.quantization.quantizedDimension = axis
        if data is not None:
            tensor.buffer = make_buffer(self.buffers, np.asarray(data, kind).tobytes())
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(
        self, name: str, version: int, inputs: list[int], outputs: list[int], options: str = "", **members: Any
    ) -> None:
        operator = make_operator(self.codes, name, version, inputs, outputs)
        if options:
            set_options(operator, options, **members)
        self.operators.append(operator)

    def written(self, inputs: list[int], outputs: list[int], description: bytes = b"outstation test model") -> bytes:
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, inputs, outputs
        graph.name = b"main"
        model.version, model.description = 3, description
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


class Foreign:
    """A convolutional or dense int8 (uint8) network as other tools export it.

    Weights are quantized per channel (per tensor with uint8), tensors have the names of an exporter, nothing describes
    the model. `batch` -1 is any.
    """

    def __init__(self, shape: list[int], kind: str, batch: int, seed: int) -> None:
        self.graph, self.kind, self.batch, self.random = Graph(), kind, batch, np.random.default_rng(seed)
        self.shape, self.by = shape, (1 / 128, 128 if kind == "uint8" else 0)
        self.entry = self.x = self.graph.tensor("serving_default_input_1:0", [batch, *shape], kind, self.by)

    def _layer(
        self, name: str, version: int, shape: list[int], weights: NDArray[np.float32], axis: int, **members: Any
    ) -> None:
        """Add a layer with weights quantized along `axis` and a random bias; outputs span 4, from 0 with ReLU."""
        graph, channels = self.graph, weights.shape[axis]
        count = len(graph.tensors)
        others = tuple(i for i in range(weights.ndim) if i != axis)
        scales = np.abs(weights).max(axis=others).astype(np.float64) / 127
        per_channel = self.kind == "int8" and name != "FULLY_CONNECTED"
        held: Any = scales if per_channel else float(scales.max())
        spread = np.expand_dims(scales, others) if per_channel else held
        middle = 128 if self.kind == "uint8" else 0
        w = graph.tensor(
            f"model/w{count}/ReadVariableOp",
            list(weights.shape),
            self.kind,
            (held, middle),
            np.rint(weights / spread) + middle,
            axis,
        )
        sums = (self.by[0] * scales) if per_channel else self.by[0] * held
        bias = self.random.normal(0, 0.1, channels)
        b = graph.tensor(
            f"model/b{count};StatefulPartitionedCall", [channels], "int32", (sums, 0), np.rint(bias / sums)
        )
        relu = members.get("fusedActivationFunction", 0) == schema.ActivationFunctionType.RELU
        self.by = (4 / 255, (0 if self.kind == "uint8" else -128) + (0 if relu else 128))
        out = graph.tensor(
            f"model/layer_{count}/Relu;model/bn/FusedBatchNormV3", [self.batch, *shape], self.kind, self.by
        )
        graph.operator(name, version, [self.x, w, b], [out], **members)
        self.x, self.shape = out, shape

    def convolve(self, channels: int, stride: int) -> None:
        height, width, depth = self.shape
        weights = self.random.normal(0, 1.5 / np.sqrt(9 * depth), (channels, 3, 3, depth)).astype(np.float32)
        members = {
            "padding": schema.Padding.SAME,
            "strideH": stride,
            "strideW": stride,
            "dilationHFactor": 1,
            "dilationWFactor": 1,
        }
        relu = schema.ActivationFunctionType.RELU
        shape = [-(-height // stride), -(-width // stride), channels]
        version = 1 if self.kind == "uint8" else 3
        self._layer("CONV_2D", version, shape, weights, 0, options="Conv2D", fusedActivationFunction=relu, **members)

    def convolve_each(self) -> None:
        """Add a depthwise convolution."""
        depth = self.shape[2]
        weights = self.random.normal(0, 0.5, (1, 3, 3, depth)).astype(np.float32)
        members = {
            "padding": schema.Padding.SAME,
            "strideH": 1,
            "strideW": 1,
            "depthMultiplier": 1,
            "dilationHFactor": 1,
            "dilationWFactor": 1,
        }
        version = 1 if self.kind == "uint8" else 3
        self._layer("DEPTHWISE_CONV_2D", version, self.shape, weights, 3, options="DepthwiseConv2D", **members)

    def pool(self) -> None:
        """Add the mean over the picture, then drop its two dimensions."""
        height, width, depth = self.shape
        mean = self.graph.tensor("model/global_average_pooling2d/Mean", [self.batch, 1, 1, depth], self.kind, self.by)
        members = {
            "filterHeight": height,
            "filterWidth": width,
            "strideH": 1,
            "strideW": 1,
            "padding": schema.Padding.VALID,
        }
        self.graph.operator("AVERAGE_POOL_2D", 1 if self.kind == "uint8" else 2, [self.x], [mean], "Pool2D", **members)
        flat = self.graph.tensor("model/flatten/Reshape", [self.batch, depth], self.kind, self.by)
        to = self.graph.tensor("model/flatten/Const", [2], "int32", None, [-1, depth])
        self.graph.operator("RESHAPE", 1, [mean, to], [flat], "Reshape", newShape=[-1, depth])
        self.x, self.shape = flat, [depth]

    def dense(self, outputs: int, *, relu: bool = False) -> None:
        weights = self.random.normal(0, 1.2 / np.sqrt(self.shape[0]), (outputs, self.shape[0])).astype(np.float32)
        function = schema.ActivationFunctionType.RELU if relu else schema.ActivationFunctionType.NONE
        version = 1 if self.kind == "uint8" else 4
        self._layer(
            "FULLY_CONNECTED",
            version,
            [outputs],
            weights,
            0,
            options="FullyConnected",
            fusedActivationFunction=function,
        )

    def softmax(self) -> bytes:
        by = (1 / 256, 0 if self.kind == "uint8" else -128)
        out = self.graph.tensor("StatefulPartitionedCall:0", [self.batch, *self.shape], self.kind, by)
        self.graph.operator("SOFTMAX", 1 if self.kind == "uint8" else 2, [self.x], [out], "Softmax", beta=1.0)
        self.x = out
        return self.content()

    def content(self) -> bytes:
        return self.graph.written([self.entry], [self.x], b"")


def foreign_keywords() -> bytes:
    """Build (any, 49, 10, 1) int8 → 12 probabilities: convolution, depthwise convolution, mean, dense, softmax."""
    net = Foreign([49, 10, 1], "int8", -1, 1)
    net.convolve(8, 2)
    net.convolve_each()
    net.convolve(8, 1)
    net.pool()
    net.dense(12)
    return net.softmax()


def foreign_image() -> bytes:
    """Build (1, 32, 32, 3) uint8 → 2 probabilities, with a fixed batch and weights quantized per tensor."""
    net = Foreign([32, 32, 3], "uint8", 1, 2)
    net.convolve(8, 2)
    net.convolve_each()
    net.pool()
    net.dense(2)
    return net.softmax()


def foreign_autoencoder() -> bytes:
    """Build (any, 160) int8 → 160 values through 8."""
    net = Foreign([160], "int8", -1, 3)
    net.dense(24, relu=True)
    net.dense(8, relu=True)
    net.dense(160)
    return net.content()


def main() -> None:
    made = {f"sums_{kind}": model(kind, CENTRES, BIAS) for kind in ("float32", "float16", "hybrid", *ACTIVATIONS)}
    made |= {
        "one_sigmoid": model("float32", np.array([[1, -1, 0, 0.5]], np.float32)),
        "each_label": probabilities(both=False),
        "each_label_and_sums": probabilities(both=True),
        "two_values": model("float32", np.array([[0.5, -1, 0.25, 2], [1, 1, 1, 1]], np.float32)),
        "vectors": model("float32", TURN),
        "vectors_int8": model("int8", TURN),
        "foreign_keywords": foreign_keywords(),
        "foreign_image": foreign_image(),
        "foreign_autoencoder": foreign_autoencoder(),
    }
    for name, content in made.items():
        (MODELS / f"{name}.tflite").write_bytes(content)
        print(f"{name}.tflite {len(content):,} bytes")


if __name__ == "__main__":
    main()

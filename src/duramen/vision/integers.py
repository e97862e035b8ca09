"""A vision transformer in whole numbers, as a graph of ONNX: for ONNX Runtime by integer products, or in QONNX, the dialect of FPGA tools, where every matrix of mixed rows is two products whose rows a table puts in order.

Every matrix multiplies codes, which are whole, and is rescaled afterwards, as in ``duramen.quantize.mixed_linear``; so both give the bits that the network gave while it was trained, matrix by matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from duramen.quantize.mixed_linear import InputStep, MixedLinear
from duramen.vision.elastic import EPS, ElasticLayer, ElasticViTConfig, ElasticViTForImageClassification

Dialect = Literal["onnx", "qonnx"]
OPSET = 17
QONNX = "qonnx.custom_op.general"
INPUT, OUTPUT = "pixel_values", "logits"


class Graph:
    """Nodes of ONNX, one after another.

    Attributes:
        taps: What goes into and comes out of every matrix, by name.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.taps: dict[str, tuple[str, str]] = {}
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, kind: Any = None) -> str:
        """Keeps an array; its name."""
        from onnx import numpy_helper

        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, kind or array.dtype, order="C"), name))
        return name

    def op(self, kind: str, *inputs: str, named: str = "", domain: str = "", **attributes: Any) -> str:
        """Adds a node; the name of its output."""
        from onnx import helper

        name = named or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name

    def model(self, source: str, result: str, shapes: tuple[list[Any], list[Any]]) -> Any:
        """The whole, from one input to one output."""
        from onnx import TensorProto, helper

        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip((source, result), shapes, strict=True)
        ]
        graph = helper.make_graph(self.nodes, "duramen", ends[:1], ends[1:], self.constants)
        domains = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(QONNX, 1)] if self.dialect == "qonnx" else [])]
        return helper.make_model(graph, opset_imports=domains, ir_version=8, producer_name="duramen")

    def floats(self, kind: str, x: str, value: Any, named: str = "") -> str:
        """An operation with a constant in float32."""
        return self.op(kind, x, self.constant(value, np.float32), named=named)

    def codes(self, x: str, step: InputStep) -> str:
        """Rounds activations; codes in float32."""
        scaled, grid = self.floats("Div", x, step.step()), step.grid
        if self.dialect == "qonnx":
            return self._quant(scaled, grid.bits, signed=not grid.affine)
        return self.op(
            "Clip", self.op("Round", scaled), *(self.constant(bound, np.float32) for bound in (grid.least, grid.most))
        )

    def product(self, codes: str, other: str, *, signed: bool = True) -> str:
        """Of codes by codes, the first of which may have no sign; sums in float32."""
        if self.dialect == "qonnx":
            return self.op("MatMul", codes, other)
        zero = [] if signed else [self.constant(-128, np.int8)]  # codes up to 255 do not fit eight bits with a sign
        moved = codes if signed else self.floats("Sub", codes, 128)
        small = [self.op("Cast", each, to=_kind("INT8")) for each in (moved, other)]
        return self.op("Cast", self.op("MatMulInteger", *small, *zero), to=_kind("FLOAT"))

    def linear(self, x: str, matrix: MixedLinear, share: float, named: str) -> str:
        """A matrix, the whole of it."""
        mixed, _, bias = matrix.integers(share)
        codes = self.codes(x, matrix.inputs)
        if self.dialect == "qonnx":
            sums = self._two_products(codes, mixed.codes, mixed.eight)
        else:
            small = self.op("Cast", codes, to=_kind("INT8"))
            sums = self.op("Cast", self.op("MatMulInteger", small, self.constant(mixed.codes.T, np.int8)), to=_kind("FLOAT"))
        result = self.floats("Add", self.floats("Mul", sums, mixed.steps * matrix.inputs.step()), bias, named=f"{named}.out")
        self.taps[named] = (x, result)
        return result

    def _two_products(self, codes: str, weight: Tensor, eight: Tensor) -> str:
        """Rows of eight bits first, then those of four, and the table that puts them in order."""
        parts, order = [], []
        for bits, rows in ((8, eight.nonzero().flatten()), (4, (~eight).nonzero().flatten())):
            if len(rows):
                stored = self._quant(self.constant(weight[rows].T, np.float32), bits, signed=True)
                parts.append(self.op("MatMul", codes, stored))
                order.append(rows)
        if len(parts) == 1:
            return parts[0]
        table = torch.cat(order).argsort()
        return self.op("Gather", self.op("Concat", *parts, axis=-1), self.constant(table, np.int64), axis=-1)

    def _quant(self, x: str, bits: int, *, signed: bool) -> str:
        said = (self.constant(value, np.float32) for value in (1.0, 0.0, bits))
        return self.op("Quant", x, *said, domain=QONNX, signed=int(signed), narrow=0, rounding_mode="ROUND")

    def norm(self, x: str, norm: nn.LayerNorm) -> str:
        """Of the last axis."""
        weights = (self.constant(each, np.float32) for each in (norm.weight, norm.bias))
        return self.op("LayerNormalization", x, *weights, axis=-1, epsilon=EPS)

    def shaped(self, x: str, shape: list[int]) -> str:
        """In another shape."""
        return self.op("Reshape", x, self.constant(shape, np.int64))

    def attention(self, x: str, layer: ElasticLayer, eight: list[float], named: str) -> str:
        """The first half of a layer."""
        heads, size = layer.proj.weight.shape[1] // layer.size, layer.size
        split = self.linear(self.norm(x, layer.norm1), layer.qkv, eight[0], f"{named}.qkv")
        moved = self.op("Transpose", self.shaped(split, [0, 0, 3, heads, size]), perm=[2, 0, 3, 1, 4])
        query, key, value = (self.op("Gather", moved, self.constant(part, np.int64), axis=0) for part in range(3))
        turned = self.op("Transpose", key, perm=[0, 1, 3, 2])
        logits = self.product(self.codes(query, layer.query), self.codes(turned, layer.key))
        logits = self.floats("Mul", self.floats("Mul", logits, layer.query.step() * layer.key.step()), size**-0.5)
        maps = self.codes(self.op("Softmax", logits, axis=-1), layer.map)
        mixed = self.product(maps, self.codes(value, layer.value), signed=not layer.map.grid.affine)
        mixed = self.floats("Mul", mixed, layer.map.step() * layer.value.step())
        mixed = self.shaped(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, heads * size])
        added = self.linear(mixed, layer.proj, eight[1], f"{named}.proj")
        return self.op("Add", x, self.floats("Mul", added, layer.scale1))

    def mlp(self, x: str, layer: ElasticLayer, eight: list[float], named: str) -> str:
        """The second half."""
        inner = self.linear(self.norm(x, layer.norm2), layer.fc1, eight[2], f"{named}.fc1")
        bent = self.floats("Add", self.op("Erf", self.floats("Mul", inner, 2**-0.5)), 1.0)
        bent = self.floats("Mul", self.op("Mul", inner, bent), 0.5)
        return self.op("Add", x, self.floats("Mul", self.linear(bent, layer.fc2, eight[3], f"{named}.fc2"), layer.scale2))

    def patches(self, x: str, config: ElasticViTConfig) -> str:
        """[B, c, H, W] -> [B, N, c·p·p]."""
        channels, size, across = config.num_channels, config.patch_size, config.image_size // config.patch_size
        cut = self.shaped(x, [0, channels, across, size, across, size])
        return self.shaped(self.op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5]), [0, across**2, config.patch_features])


def _kind(name: str) -> int:
    from onnx import TensorProto

    return int(getattr(TensorProto, name))


@torch.no_grad()
def graph_of(
    network: ElasticViTForImageClassification, dialect: Dialect, batch: int | str = "batch"
) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The whole network as an ONNX model, and what goes into and comes out of every matrix, by name.

    Args:
        network: One that rounds.
        dialect: ``onnx`` or ``qonnx``.
        batch: Images at once; a name for any number of them.
    """
    config, graph = network.config, Graph(dialect)
    x = graph.linear(graph.patches(INPUT, config), network.embed, 1.0, "embed")
    places = network.places.clone()
    places[0] += network.class_token
    x = graph.floats("Add", graph.op("Pad", x, graph.constant([0, 1, 0, 0, 0, 0], np.int64)), places)
    for number, (layer, eight) in enumerate(zip(network.layers, config.eight, strict=True)):
        assert isinstance(layer, ElasticLayer)
        x = graph.mlp(graph.attention(x, layer, eight, f"layers.{number}"), layer, eight, f"layers.{number}")
    x = graph.norm(x, network.norm)
    if config.pooling == "class":
        x = graph.op("Gather", x, graph.constant(0, np.int64), axis=1)
    else:
        ends = (graph.constant([each], np.int64) for each in (1, config.tokens, 1))
        x = graph.op("ReduceMean", graph.op("Slice", x, *ends), axes=[1], keepdims=0)
    result = graph.linear(x, network.head, 1.0, "head")
    graph.op("Identity", result, named=OUTPUT)
    shape = [config.num_channels, config.image_size, config.image_size]
    return graph.model(INPUT, OUTPUT, ([batch, *shape], [batch, config.num_labels])), graph.taps

"""This machine as a target: parts of networks timed in ONNX Runtime, where they run in whole numbers, and added up."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from duramen.hardware.clock import repeated
from duramen.hardware.cost import Measured, Part
from duramen.hardware.machine import describe
from duramen.problem import Problem
from duramen.quantize.mixed_linear import MixedLinear
from duramen.vision.elastic import ElasticLayer, ElasticViTConfig
from duramen.vision.integers import INPUT, OUTPUT, Graph

STACK = 4
"""Parts of one kind that are timed one behind another, so that what a run takes beside them hardly counts."""
ROUNDS, TURNS = 5, 40
"""How often a part is timed, the fastest round counts, and runs of a round, whose median counts: other work on a machine only adds."""


def measured_cpu(config: ElasticViTConfig) -> Measured:
    """A table for networks of a config, which is filled as parts are asked for.

    Args:
        config: Tokens, heads and bits are its.

    Raises:
        Problem: If ONNX Runtime is missing.
    """
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        raise Problem(
            "`device: cpu` needs ONNX Runtime, which is not installed.",
            why="it is an extra.",
            fix="`python -m pip install onnx onnxruntime`, or an FPGA.",
        )
    rest = _seconds(Graph("onnx"), [1, 1])
    return Measured(str(describe()["processor"]), lambda part: _time(part, config, rest), rest)


def session(model: Any) -> Any:
    """What runs a graph on this machine.

    Args:
        model: Of ``duramen.vision.integers``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _time(part: Part, config: ElasticViTConfig, rest: float) -> float:
    """Seconds of one part: a layer's half, which is stacked, or one product alone."""
    graph, first = Graph("onnx"), part[0]
    torch.manual_seed(0)
    shape, x = [1, first.tokens, first.features], INPUT
    if len(part) == 1:
        matrix = MixedLinear(first.features, first.rows, config.activation_bits)
        torch.nn.init.normal_(matrix.weight, std=0.02)
        graph.op("Identity", graph.linear(x, matrix, 1.0, "only"), named=OUTPUT)
        return max(_seconds(graph, shape) - rest, 0.0)
    width, heads = first.features, first.rows // (3 * config.head_size)
    for number in range(STACK):
        layer = ElasticLayer(config_of(config, width), heads, first.rows if len(part) == 2 else 1)
        for each in layer.modules():
            if isinstance(each, MixedLinear):
                torch.nn.init.normal_(each.weight, std=0.02)
        half = graph.mlp if len(part) == 2 else graph.attention
        x = half(x, layer, [1.0] * 4, str(number))
    graph.op("Identity", x, named=OUTPUT)
    return max(_seconds(graph, shape) - rest, 0.0) / STACK


def config_of(config: ElasticViTConfig, width: int) -> ElasticViTConfig:
    """The same at another width."""
    found: ElasticViTConfig = ElasticViTConfig.from_dict(config.to_dict())
    found.hidden_size = width
    return found


def _seconds(graph: Graph, shape: list[int]) -> float:
    """Of a run; an empty graph only gives back what it is given."""
    if not graph.nodes:
        graph.op("Identity", INPUT, named=OUTPUT)
    running = session(graph.model(INPUT, OUTPUT, (shape, [None] * len(shape))))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return min(float(np.median(repeated(lambda: running.run(None, {INPUT: x}), TURNS))) for _ in range(ROUNDS))

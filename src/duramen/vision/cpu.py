"""This machine as a target: parts of networks timed in ONNX Runtime, where they run in whole numbers on one thread, and added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from duramen.hardware.clock import repeated
from duramen.hardware.cost import Measured, Part
from duramen.hardware.machine import describe
from duramen.problem import need
from duramen.quantize.mixed_linear import MixedLinear
from duramen.vision.elastic import ElasticLayer, ElasticViTConfig
from duramen.vision.integers import INPUT, OUTPUT, Graph

STACK = 4
"""Parts of one kind that are timed one behind another, so that what a run takes beside them hardly counts."""
ROUNDS, TURNS = 8, 30
"""How often each of several is timed, in turns, of which the fastest round counts, and runs of a round, whose median counts: other work on a machine only adds."""


def measured_cpu(config: ElasticViTConfig) -> Measured:
    """A table for networks of a config, which is filled as parts are asked for.

    Args:
        config: Tokens, heads and bits are its.

    Raises:
        Problem: If ONNX Runtime is missing.
    """
    need_runtime()
    empty = Graph("onnx")
    empty.op("Identity", INPUT, named=OUTPUT)
    (rest,) = fastest([_running(empty, [1, 1])])

    def time(parts: Sequence[Part]) -> list[float]:
        found = fastest([_running(*_graph(part, config)) for part in parts])
        return [max(seconds - rest, 0.0) / (1 if len(part) == 1 else STACK) for part, seconds in zip(parts, found, strict=True)]

    return Measured(str(describe()["processor"]), time, rest)


def need_runtime() -> None:
    """Stops where ONNX Runtime is missing.

    Raises:
        Problem: Then.
    """
    need("`device: cpu`", "onnxruntime", "onnx", install="onnx onnxruntime")


def fastest(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of each of several, timed in turns."""
    rounds = [[float(np.median(repeated(function, TURNS))) for function in functions] for _ in range(ROUNDS)]
    return [min(each) for each in zip(*rounds, strict=True)]


def session(model: Any) -> Any:
    """What runs a graph on this machine.

    Args:
        model: Of ``duramen.vision.integers``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _graph(part: Part, config: ElasticViTConfig) -> tuple[Graph, list[int]]:
    """One part, and the shape of its input: a product alone, or a layer's half, several times."""
    graph, first = Graph("onnx"), part[0]
    torch.manual_seed(0)
    x, width, heads = INPUT, first.features, first.rows // (3 * config.head_size)
    if len(part) == 1:
        x = graph.linear(x, _filled(MixedLinear(width, first.rows, config.activation_bits)), 1.0, "only")
    for number in range(STACK if len(part) > 1 else 0):
        layer = ElasticLayer(_config_of(config, width), max(heads, 1), first.rows)
        for each in layer.modules():
            if isinstance(each, MixedLinear):
                _filled(each)
        x = (graph.mlp if len(part) == 2 else graph.attention)(x, layer, [1.0] * 4, str(number))
    graph.op("Identity", x, named=OUTPUT)
    return graph, [1, first.tokens, width]


def _filled(matrix: MixedLinear) -> MixedLinear:
    torch.nn.init.normal_(matrix.weight, std=0.02)
    return matrix


def _config_of(config: ElasticViTConfig, width: int) -> ElasticViTConfig:
    """The same at another width."""
    found: ElasticViTConfig = ElasticViTConfig.from_dict(config.to_dict())
    found.hidden_size = width
    return found


def _running(graph: Graph, shape: list[int]) -> Callable[[], Any]:
    """What runs a graph once, on an input of that shape."""
    running = session(graph.model(INPUT, OUTPUT, (shape, [None] * len(shape))))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return lambda: running.run(None, {INPUT: x})

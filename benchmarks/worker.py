"""What the workers share that run in other environments, where there is no Duramen; see ``peers``."""

from __future__ import annotations

import importlib.metadata
import json
import time

from safetensors.torch import save_file
from torch import Tensor, nn


def block_weights(network: nn.Module) -> dict[str, Tensor]:
    """The matrices of a causal language model's blocks, by name."""
    named = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return {name: each for name, each in named.items() if "layers." in name and name.endswith(".weight") and each.ndim == 2}


class Work:
    """Times what is inside, on the clock and on the processor.

    Attributes:
        seconds: By the clock.
        processor_seconds: Of all threads.
    """

    def __enter__(self) -> Work:
        self.seconds, self.processor_seconds = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.processor_seconds += time.process_time()

    def hand_over(self, tensors: dict[str, Tensor], out: str, *packages: str, **more: str) -> None:
        """Writes the tensors, and prints what ``peers.ask`` reads: how long it took, the versions of these packages, and more like them."""
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out)
        versions = {name: importlib.metadata.version(name) for name in (*packages, "torch", "transformers")}
        print(json.dumps(vars(self) | {"versions": versions | more}))

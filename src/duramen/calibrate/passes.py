"""Running one open block over all batches, as often as it takes, without computing twice what no longer changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from duramen.calibrate.activations import Activations, check_activations
from duramen.families.model import Call, Layer, run_block
from duramen.override import override


class Passes:
    """The passes of one block over all batches.

    A stage's statistics need a pass up to that stage, and the next boundary one more. A *settled* module, one in
    which nothing is left to edit, runs in one of them and its output stands in all later ones, as far as the budget for
    activations allows. Where a module stands, what stood inside it is let go; what the block writes over does not stand.

    Args:
        module: The open block.
        calls: What the block is called with beside the hidden states, per batch.
        hidden: The hidden states before the block per batch; ``advance`` moves them past it.
    """

    def __init__(self, module: nn.Module, calls: list[Call], hidden: Activations) -> None:
        self.module, self.calls, self.hidden = module, calls, hidden
        self._budget = hidden.budget
        self._settled: dict[str, Callable[[], None]] = {}
        self._outputs: list[dict[tuple[str, int], _Output]] = [{} for _ in calls]
        self._counts: Counter[str] = Counter()
        self._batch = 0

    def settle(self, paths: Iterable[str]) -> None:
        """Says that nothing will be edited any more in these modules of the block."""
        for path in set(paths) - self._settled.keys():
            module = self.module.get_submodule(path)
            self._settled[path] = override(module, self._standing(path, module.forward))

    def _standing(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs, key = self._outputs[self._batch], (path, self._counts[path])
            self._counts[path] += 1
            if key in outputs and outputs[key].is_whole:
                return outputs[key].value
            output = _Output(forward(*args, **kwargs))
            before = [each for each in outputs if each == key or each[0].startswith(f"{path}.")]
            if self._budget.take(output.size - sum(outputs[each].size for each in before)):
                for each in before:
                    del outputs[each]
                outputs[key] = output
            return output.value

        return run

    def _run(self, batch: int) -> Tensor:
        self._batch, self._counts = batch, Counter()
        return run_block(self.module, self.hidden[batch], self.calls[batch])

    @torch.no_grad()
    def stage_input(self, layer: Layer, batch: int) -> Tensor | None:
        """Runs the block on one batch up to one of its layers.

        Returns:
            That layer's input, [B, T, I], or None if the block never gets there.
        """
        seen: list[Tensor] = []
        projection, inputs = layer.projection, layer.read().shape[1]

        def stop_before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        def stop_after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(output[..., :inputs])
            raise _Reached

        if projection.tap:
            handle = self.module.get_submodule(projection.tap).register_forward_hook(stop_after)
        else:
            handle = self.module.get_submodule(projection.path).register_forward_pre_hook(stop_before)
        try:
            self._run(batch)
        except _Reached:
            return seen[0]
        finally:
            handle.remove()
        return None

    @torch.no_grad()
    def advance(self, block: str) -> None:
        """Moves the hidden states past the block, named for errors; ends the passes."""
        for batch in range(len(self.hidden)):
            after = self._run(batch)
            check_activations(after, block)
            self.hidden[batch] = after
        for undo in self._settled.values():
            undo()
        self._budget.left += sum(output.size for outputs in self._outputs for output in outputs.values())
        self._settled, self._outputs = {}, [{} for _ in self.calls]


class _Output:
    """What a module gave: a tensor, or several."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._parts = [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
        self._versions = [part._version for part in self._parts]
        self.size = sum(part.nbytes for part in self._parts)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was written into it since."""
        return [part._version for part in self._parts] == self._versions


class _Reached(Exception):
    """Ends a block's forward pass at the layer that is watched."""

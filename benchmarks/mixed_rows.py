"""Claim: rows of two activation widths bring nothing on a processor without a product of four bits; this is by how much one would have to be faster.

    python benchmarks/mixed_rows.py

Token-adaptive bits give some tokens eight bits and the others four. Where a product of four bits takes as long as one of eight, splitting a batch of tokens by width is one gather, two products, and one scatter instead of one product. Times
them with PyTorch's integer product [N, I]·[I, O] (int8 in, int32 out) for the layers of SmolLM2-135M, half of the tokens in each width; the codes of four bits lie in eight. Break-even is the share of the time of an eight-bit product that a four-bit one may take
so that splitting costs nothing. Writes benchmarks/results/mixed_rows.csv; two minutes.
"""

from __future__ import annotations

import time

import torch

import rows

SHAPES = {"q": (576, 576), "gate": (576, 1536), "down": (1536, 576)}
TOKENS, REPEATS = (1, 64, 512), 30


def main() -> None:
    """Runs the table."""
    generator, table = torch.Generator().manual_seed(0), []
    for name, (inputs, outputs) in SHAPES.items():
        weight = torch.randint(-8, 8, (inputs, outputs), generator=generator, dtype=torch.int8)
        for tokens in TOKENS:
            x = torch.randint(-128, 128, (tokens, inputs), generator=generator, dtype=torch.int8)
            high = torch.randperm(tokens, generator=generator)[: (tokens + 1) // 2].sort().values
            low = torch.tensor([each for each in range(tokens) if each not in set(high.tolist())], dtype=torch.long)
            whole = _milliseconds(lambda x=x, weight=weight: torch._int_mm(x, weight))
            split = _milliseconds(lambda x=x, weight=weight, high=high, low=low: _split(x, weight, high, low))
            assert torch.equal(_split(x, weight, high, low), torch._int_mm(x, weight))
            half = _milliseconds(lambda x=x, weight=weight, low=low: torch._int_mm(x[: len(low)], weight)) if len(low) else 0.0
            even = (half - (split - whole)) / half if half else float("nan")
            case = f"{tokens} tokens, {name} {inputs} to {outputs}"
            table.append(rows.row(case, "time", "ms", "all rows at once", whole, samples=REPEATS))
            table.append(
                rows.row(
                    case, "time", "ms", "split by width", split, samples=REPEATS, peer="all rows at once", peer_value=whole
                )
            )
            if half:
                table.append(rows.row(case, "break-even", "1", f"{tokens} tokens", even, samples=REPEATS))
            print(
                case,
                f"{whole:.3f} ms, split {split:.3f} ms, a product of four bits may take {even:.2f} of one of eight",
                flush=True,
            )
    rows.write("mixed_rows", table)


def _split(x: torch.Tensor, weight: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Both widths by themselves, and back into their places."""
    out = torch.empty(len(x), weight.shape[1], dtype=torch.int32)
    for chosen in (high, low):
        if len(chosen):
            out[chosen] = torch._int_mm(x[chosen], weight)
    return out


def _milliseconds(function) -> float:
    """The median."""
    seconds = []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * sorted(seconds[3:])[REPEATS // 2]


if __name__ == "__main__":
    main()

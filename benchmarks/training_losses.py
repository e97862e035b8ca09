"""Claim, not measured yet: training while it rounds brings a model most of the way back; losses of maps help a little, and the published loss of spreads costs.

    python benchmarks/training_losses.py

Trains a byte model of 0.4 million parameters on an embedded text, then rounds it to four bits of weights and inputs, and trains it on, with every loss of attention maps and of the spread of queries and
keys, from three seeds of the order of sequences, on equal tokens. Measures the loss on held-out windows and the KL from the float model. Adds to
benchmarks/results/training_losses.csv. About 30 minutes on 2 cores.
"""

from __future__ import annotations

import copy
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rows
from duramen.assets import read_text
from duramen.calibrate.walker import Walk
from duramen.evaluate.perplexity import divergence, final_hidden
from duramen.families.model import BlockModel
from duramen.intervals import mean_interval
from duramen.registry import get_method

LENGTH, TRAINED, HELD_OUT, STEPS = 96, 4096, 512, 1500
FORMAT, QAT = "W4A4 row", {"steps": 200, "batch": 16, "at_once": 16, "every": 100, "learning_rate": 5e-4, "step_rate": 2e-3}
SUBJECTS = {
    "rounded by gptq": None,
    "trained, no further loss": {"map_loss": "off"},
    **{f"maps: {kind}": {"map_loss": kind} for kind in ("row_kl", "row_cos", "log_cos", "out_mse", "logit_mse")},
    **{f"spread: {kind}": {"map_loss": "off", "entropy_loss": kind} for kind in ("match", "gauss_kl", "paper", "code")},
}


def main() -> None:
    """Runs the table."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray("\n".join(read_text("squad")).encode()), dtype=torch.uint8).long()
    windows = text[: (len(text) // LENGTH) * LENGTH].view(-1, LENGTH)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[: TRAINED + HELD_OUT]]
    train, held_out = windows[:TRAINED], windows[TRAINED:]
    network = byte_model(train)
    dense = BlockModel.from_module(copy.deepcopy(network))
    hidden = final_hidden(dense, held_out)
    table = rows.read("training_losses")
    case = f"byte model, {FORMAT}, {QAT['steps']} steps of {QAT['batch']}x{LENGTH}"
    reference = divergence(dense, hidden, dense, hidden, held_out)
    table.append(_row(f"{case}, dense", "loss", "float", mean_interval(reference.loss), 1))
    start = copy.deepcopy(network)
    get_method("gptq").apply(start, train[:256], format=FORMAT)
    for seed in range(3):
        for subject, settings in SUBJECTS.items():
            rounded, begun = copy.deepcopy(network if settings is not None else start), time.process_time()
            if settings is not None:
                get_method("qat").apply(rounded, train, walk=Walk(), format=FORMAT, seed=seed, **QAT | settings)
            elif seed:
                continue
            found = divergence(
                dense,
                hidden,
                BlockModel.from_module(rounded),
                final_hidden(BlockModel.from_module(rounded), held_out),
                held_out,
            )
            figures = {"loss": mean_interval(found.loss), "KL from dense": mean_interval(found.kl)}
            print(
                seed,
                subject,
                {name: round(figure.value, 4) for name, figure in figures.items()},
                round(time.process_time() - begun),
                flush=True,
            )
            table += [
                _row(f"{case}, seed {seed}", metric, subject, figure, figure.samples) for metric, figure in figures.items()
            ]
            rows.write("training_losses", table)


def byte_model(train: torch.Tensor) -> LlamaForCausalLM:
    """A byte model, trained from scratch."""
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, vocab_size=256,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        batch = train[torch.randint(0, len(train), (32,), generator=generator)]
        loss = network(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print("byte model", step, round(float(loss.detach()), 4), flush=True)
    return network.eval()


def _row(case: str, metric: str, subject: str, figure, samples: int) -> dict[str, object]:
    return rows.row(case, metric, "nats", subject, figure.value, low=figure.low, high=figure.high, samples=samples)


if __name__ == "__main__":
    main()

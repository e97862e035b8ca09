"""Runs a GGUF file in OpenVINO GenAI: ``python openvino_gguf.py MODEL QUESTION.json ANSWER.npz``.

It continues prompts with inputs of layers and the cache in float, and is timed as it comes: where the processor has integer dot products it then rounds the inputs.
"""

import json
import sys
from typing import Any

import numpy as np
import openvino
import openvino_genai

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def continued(pipeline: openvino_genai.LLMPipeline, ids: list[int], new: int) -> openvino_genai.EncodedResults:
    """Greedy tokens after a prompt, and how long they took."""
    wanted = openvino_genai.GenerationConfig(max_new_tokens=new, do_sample=False, ignore_eos=True)
    return pipeline.generate(openvino.Tensor(np.array([ids], dtype=np.int64)), wanted)


def main() -> None:
    """Answers the question."""
    model, question, answer = sys.argv[1:]
    with open(question, encoding="utf-8") as file:
        asked: dict[str, Any] = json.load(file)
    pipeline = openvino_genai.LLMPipeline(model, "CPU", ATTENTION_BACKEND="SDPA", **EXACT)
    tokens = [continued(pipeline, ids, asked["new"]).tokens[0] for ids in asked["prompts"]]
    del pipeline
    pipeline = openvino_genai.LLMPipeline(model, "CPU", ATTENTION_BACKEND="SDPA")
    times = range(asked["repeats"] + 1)
    reads = [continued(pipeline, asked["long"], 1).perf_metrics.get_ttft().mean for _ in times][1:]
    writes = [continued(pipeline, asked["short"], asked["decode"]).perf_metrics.get_tpot().mean for _ in times][1:]
    with open("/proc/self/status", encoding="ascii") as file:
        memory = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    prefill, decode = 1e3 * len(asked["long"]) / np.array(reads), 1e3 / np.array(writes)  # from milliseconds
    np.savez(answer, tokens=tokens, prefill=prefill, decode=decode, memory=memory)


if __name__ == "__main__":
    main()

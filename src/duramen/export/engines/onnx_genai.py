"""Runs a folder of ONNX Runtime GenAI: ``python onnx_genai.py MODEL QUESTION.json ANSWER.npz``."""

import json
import sys
import time

import numpy as np
import onnxruntime_genai as genai


def continued(model: genai.Model, ids: list[int], new: int) -> tuple[list[int], np.ndarray, float, float]:
    """Greedy tokens after a prompt, the logits of the first of them, and the seconds of the prompt and of all further tokens."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
    generator = genai.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(np.array([ids], dtype=np.int32))
    logits = np.asarray(generator.get_logits(), dtype=np.float32)[0, -1]
    read = time.perf_counter()
    tokens = []
    for _ in range(new):
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, logits, read - start, time.perf_counter() - read


def main() -> None:
    """Answers the question."""
    folder, question, answer = sys.argv[1:]
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    model = genai.Model(folder)
    found = [continued(model, ids, asked["new"]) for ids in asked["prompts"]]
    prefill = [len(asked["long"]) / continued(model, asked["long"], 1)[2] for _ in range(asked["repeats"] + 1)][1:]
    decode = [asked["decode"] / continued(model, asked["short"], asked["decode"])[3] for _ in range(asked["repeats"] + 1)][1:]
    with open("/proc/self/status", encoding="ascii") as file:
        memory = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    tokens, logits = np.array([each[0] for each in found]), np.stack([each[1] for each in found])
    np.savez(answer, tokens=tokens, logits=logits, prefill=prefill, decode=decode, memory=memory)


if __name__ == "__main__":
    main()

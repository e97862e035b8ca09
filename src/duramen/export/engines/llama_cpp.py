"""Runs a GGUF file in llama.cpp, its cache in float32: ``python llama_cpp.py MODEL QUESTION.json ANSWER.npz``."""

import json
import sys
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import xllamacpp


def main() -> None:
    """Answers the question."""
    model, question, answer = sys.argv[1:]
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = model, 1024, 1, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)

    def continued(ids: list[int], new: int) -> dict[str, Any]:
        wanted = {
            "prompt": ids,
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = Request(
            f"{server.listening_address}/completion", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as said:
            found: dict[str, Any] = json.load(said)
        return found

    tokens = [continued(ids, asked["new"])["tokens"] for ids in asked["prompts"]]
    prefill = [continued(asked["long"], 1)["timings"]["prompt_per_second"] for _ in range(asked["repeats"] + 1)][1:]
    decode = [
        continued(asked["short"], asked["decode"])["timings"]["predicted_per_second"] for _ in range(asked["repeats"] + 1)
    ][1:]
    with open("/proc/self/status", encoding="ascii") as file:
        memory = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    np.savez(answer, tokens=tokens, prefill=prefill, decode=decode, memory=memory)


if __name__ == "__main__":
    main()

"""Recipes that are drawn: one to three steps of any methods, in any order, with settings of their own."""

from pathlib import Path

import torch

import duramen
import tiny
from duramen.order import check_order
from duramen.problem import Problem
from duramen.recipe import load_recipe


def prepared(place: Path):
    """A folder of every tiny family by its name, and a text."""
    text = place / "text.txt"
    text.write_text(tiny.prose(0, 4000))
    text.with_name("other.txt").write_text(tiny.prose(1, 400))
    return {name: tiny.save(name, place / name) for name in tiny.CONFIGS}, str(text)


def draw_recipe(draw, family, text):
    """A recipe whose steps are each allowed, four times in five in an order that is."""
    kinds = [pruned, pruned, shrunk, shrunk, rounded, rounded, recovered, measured, exported]
    kinds += [shortened] if family in tiny.MAMBA else []
    in_order = draw.random() < 0.8
    while True:
        steps = [draw.choice(kinds[:7])(draw, text)] + [draw.choice(kinds)(draw, text) for _ in range(draw.randint(0, 2))]
        for number, step in enumerate(steps):
            step["id"] = f"{step['method']}-{number}"
        calibration = {"text": [text], "sequences": draw.choice([16, 24]), "length": draw.choice([24, 32])}
        recipe = {"calibration": calibration, "seed": draw.randrange(100), "dtype": "float32", "steps": steps}
        if not in_order or fits(recipe, family):
            return recipe


def fits(recipe, family):
    """Whether no step undoes another, and each has something to do."""
    methods = [step["method"] for step in recipe["steps"]]
    lost = next((number for number, method in enumerate(methods) if method in LOSSY), len(methods))
    coded = next((number for number, method in enumerate(methods) if method in ("rtn", "gptq")), len(methods))
    if ("refit" in methods and methods.index("refit") < lost) or ("qat" in methods and methods.index("qat") < coded):
        return False
    if "rotate" in methods and family not in ROTATED:
        return False
    try:
        check_order(load_recipe(recipe).resolved())
    except Problem:
        return False
    return True


LOSSY = ("magnitude", "wanda", "sparsegpt", "multiweight", "flap", "wanda_sp", "fusion", "llm_pruner", "search")
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3")


def some(draw, **settings):
    """Some of the settings."""
    return {key: value for key, value in settings.items() if draw.random() < 0.5}


def chosen(draw):
    """Which layers."""
    return draw.choice([{}, {}, {}, {"only": ["*.1.*"]}, {"skip": ["*.0.*"]}])


def pruned(draw, text):
    """Weights leave."""
    target = draw.choice([{"sparsity": draw.choice([0.3, 0.5, 0.8])}, {"pattern": draw.choice(["2:4", "4:8", "1:4"])}])
    more = {
        "magnitude": {}, "wanda": {}, "sparsegpt": some(draw, damping=draw.choice([0.01, "held-out"])),
        "multiweight": some(draw, effort=draw.choice(["fast", "good"]), damping=0.01, bias=draw.choice([True, False]), allocation=draw.choice(["uniform", "owl", "curve"])),
    }  # fmt: skip
    method = draw.choice(list(more))
    return {"method": method} | target | more[method] | chosen(draw)


def shrunk(draw, text):
    """Units leave."""
    method = draw.choice(["flap", "wanda_sp", "fusion", "llm_pruner", "depth", "search", "search_masks"])
    if method == "depth":
        return {"method": method, "count": 1, "parts": draw.choice(["block", "attention", "mlp"])}
    repair = some(draw, repair=draw.choice(["bias", "reform", "affine", "none"]), homogenise=draw.random() < 0.5)
    if method.startswith("search"):
        small = {"generations": 1, "offspring": 4, "round_to": 1, "levels": 4}
        if method == "search_masks":
            small = {"epochs": 1, "population": 6, "mutants": 3, "crossovers": 2, "parents": 2, "fitness_tokens": 64}
        return (
            {"method": method, "target": {draw.choice(["parameters", "block_parameters", "macs"]): draw.choice([0.7, 0.9])}}
            | small
            | repair
        )
    taylor = {"gradient_sequences": 4, "gradient_length": 16} if method in ("fusion", "llm_pruner") else {}
    families = some(draw, families=draw.choice([["ffn_channel"], ["kv_group"], ["ffn_channel", "kv_group"]]))
    return {"method": method, "ratio": draw.choice([0.1, 0.2, 0.4]), "round_to": 1, "minimum": 2} | taylor | families | repair


def rounded(draw, text):
    """Numbers become coarser, or are made ready for it."""
    method = draw.choice(["rtn", "gptq", "smooth", "rotate"])
    if method in ("smooth", "rotate"):
        return {"method": method}
    formats = ["W8 row", "W4 g16", "W4 g8 affine", "W4A8 g16", "W8A8KV8 row", "W4A4 row", "W3 row"]
    return {"method": method, "format": draw.choice(formats)} | chosen(draw)


def recovered(draw, text):
    """What is left learns."""
    method = draw.choice(["refit", "rora", "qat"])
    if method == "refit":
        return {"method": method}
    small = {"steps": 2, "batch": 2, "at_once": 2}
    if method == "qat":
        return {"method": method} | small | some(draw, format="W4A8 g16")
    return {"method": method, "rank": 2} | small | some(draw, dora=True, mode=draw.choice(["auto", "side", "masked", "spp"]))


def measured(draw, text):
    """Figures are taken in between."""
    return {
        "method": "evaluate",
        "text": [str(Path(text).with_name("other.txt"))],
        "windows": 2,
        "length": 24,
        "latency": False,
        "new_tokens": 2,
    }


def exported(draw, text):
    """Written for another program."""
    return {"method": "export", "form": draw.choice(["gguf", "compressed"])}


def shortened(draw, text):
    """Tokens leave on the way."""
    return {
        "method": "token_reduction",
        "choose": False,
        "sites": [0],
        "kind": draw.choice(["utrc", "prune"]),
        "length": 64,
        "sequences": 4,
    }


def carried_out(recipe, folder, out):
    """Runs a recipe: ``opened again``, ``refused``, or ``lost`` if what was finished before a refusal is not there when it runs again."""
    try:
        duramen.run(recipe, str(folder), out)
    except Problem as problem:
        kept = {file: file.stat().st_mtime_ns for file in out.rglob("block-*.json")} if out.is_dir() else {}
        try:
            duramen.run(recipe, str(folder), out)
        except Problem as again:
            same = str(again) == str(problem) and all(file.stat().st_mtime_ns == when for file, when in kept.items())
            return "refused" if same else "lost"
        return "lost"
    state = duramen.inspect(str(out))
    if state["damaged"] or any((state[key] or {}).get("broken") for key in ("masks", "codes")):
        raise AssertionError(f"what is kept does not hold: {state['damaged']}, {state['masks']}, {state['codes']}")
    network = duramen.load(out)
    tokens = torch.arange(8)[None] + 97
    said = network.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = network(input_ids=tokens).logits
    if said.shape[1] not in range(9, 13) or not torch.isfinite(logits).all():
        raise AssertionError(f"{tuple(said.shape)} tokens were generated, or logits are not finite")
    return "opened again"

"""What people read of a release: the data card, samples, how to open the model, how to cite it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from duramen.opening import runs_plainly
from duramen.release.evidence import Gathered


def data_card(gathered: Gathered, name: str) -> str:
    """``DATA_CARD.md``: sources with their terms, what every filter took, the split, and tokens; with the front matter that the hub reads."""
    curated = next((each["found"] for each in gathered.results.get("stages", []) if each["method"] == "curate"), None)
    assert curated is not None
    licence = gathered.components["Datasets"].licence or ""
    rows = [
        f"| {each['filter']} | {each['in']:,} | {each['out']:,} | {_reasons(each['reasons'])} |" for each in curated["filters"]
    ]
    sources = [
        f"| {source} | {curated['licences'][source]} | {counts['documents']:,} | {counts['bytes']:,} |"
        for source, counts in curated["sources"].items()
    ]
    tokenized = next((each["found"] for each in gathered.results["stages"] if each["method"] == "tokenize"), None)
    parts = [
        f"---\n{yaml.safe_dump({'pretty_name': f'{name}, training data', 'license': 'other', 'license_name': licence}, sort_keys=False, width=1000)}---",
        f"# The data of {name}", f"Terms: {licence}, which is that of all sources together.", "## Sources",
        "\n".join(["| source | licence | documents left | bytes left |", "|---|---|---|---|", *sources]),
        "## Treatment", "\n".join(["| filter | documents in | out | why others went |", "|---|---|---|---|", *rows]),
        f"{curated['documents']['train']:,} documents are learned and {curated['documents']['held_out']:,} set apart, told by the hash of their text. "
        "What every filter dropped is in `stages/*/dropped`.",
    ]  # fmt: skip
    if tokenized:
        counts = {split: sum(found.values()) for split, found in tokenized["tokens"].items()}
        parts.append(
            f"In tokens of the model's own tokenizer ({tokenized['vocabulary']:,}): {counts['train']:,} to learn and {counts['held_out']:,} set apart; "
            f"{tokenized['bytes_per_token']:.2f} bytes a token."
        )
    parts += ["## Limits", "Texts are as their sources have them; nothing about people was looked for or taken out."]
    return "\n\n".join(parts) + "\n"


def _reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


def samples(gathered: Gathered) -> str:
    """``samples.md``: what the model says to the prompts of its evaluation."""
    parts = ["# Samples", "Greedy; they show style, not quality."]
    for evaluation in gathered.results.get("evaluations", []):
        for prompt, said in evaluation.get("generations", {}).items():
            for when, text in said.items():
                parts += [f"## {prompt.strip()}", f"{when}:", "> " + text.strip().replace("\n", "\n> ")]
    return "\n\n".join(parts) + "\n"


def inference_code(folder: Path, gathered: Gathered) -> str:
    """``inference.py``: opens the folder above it, in plain transformers where that is the model that was measured, and runs it."""
    if gathered.of_images:
        return IMAGES
    trusted = any(name.startswith("modeling_") for name in gathered.components["Model architecture"].files)
    plain = runs_plainly(folder)
    return TEXTS.format(
        imports="from transformers import AutoModelForCausalLM, AutoTokenizer" if plain else "from duramen import load\nfrom transformers import AutoTokenizer",
        opening=f"{'AutoModelForCausalLM.from_pretrained' if plain else 'load'}(folder{', trust_remote_code=True' if trusted else ''})",
    )  # fmt: skip


TEXTS = '''"""Opens the model of the folder above and generates: python release/inference.py "a prompt"."""

import sys
from pathlib import Path

{imports}

folder = Path(__file__).parents[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {opening}
inputs = tokenizer(" ".join(sys.argv[1:]) or "The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=False)[0], skip_special_tokens=True))
'''
IMAGES = '''"""Opens the model of the folder above and names what it sees: python release/inference.py PICTURE."""

import sys
from pathlib import Path

from duramen.vision.images import decode, seen_by
from duramen.vision.opening import load_classifier

model = load_classifier(Path(__file__).parents[1])
pixels = decode(Path(sys.argv[1]), model.config.image_size, model.config.num_channels)[None]
answer = int(model(pixel_values=seen_by(model, pixels)).logits.argmax())
print(model.config.id2label[answer])
'''


def citation(name: str, producer: str, licence: str) -> str:
    """``CITATION.cff``, version 1.2.0."""
    found: dict[str, Any] = {
        "cff-version": "1.2.0", "message": "If you use this model, please cite it as below.", "title": name, "type": "software",
        "authors": [{"name": producer}],
    }  # fmt: skip
    return yaml.safe_dump(
        found | ({"license": licence} if " " not in licence and not licence.startswith("LicenseRef") else {}), sort_keys=False
    )

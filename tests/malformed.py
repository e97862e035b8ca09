"""Files that are not what they should be: cut, overwritten, with other values in them; and everything in Duramen that reads files."""

import json
import shutil
import struct
from pathlib import Path

import yaml

import duramen
import tiny
from duramen.assets import _converted
from duramen.calibrate.tokens import read_documents
from duramen.export.gguf import export_gguf
from duramen.families.checkpoint import Checkpoint
from duramen.problem import Problem
from duramen.recipe import load_recipe, shipped_folder
from duramen.recover.peft_io import read_peft
from duramen.release.evidence import Wish
from duramen.release.release import release, verify
from duramen.rundir import hash_folder
from duramen.search.subnet import read as read_search
from duramen.shrink.plan import Plan
from duramen.stages import check_stage
from duramen.train.checkpoint import damaged

ODD = (
    None, True, -1, 0, 1, 3.5, 2**31, -(2**63), 10**20, 1e308, float("nan"), "", "x", "../../outside", "/etc/passwd", "2:4", "\x00", "é" * 50,
    [], [[]], [None], {}, {"": {}}, {"format": 1},
)  # fmt: skip
"""Values that nobody expects."""


def odd_bytes(draw, content):
    """A file that was cut off, or in which some bytes are others."""
    kind = draw.randrange(4)
    if kind == 0 or not content:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(64)))
    if kind == 1:
        return content[: draw.randrange(len(content))]
    content = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(min(len(content), 2000))] = draw.randrange(256)
    return bytes(content) + (b"\x00" * draw.randrange(100) if kind == 3 else b"")


def odd_value(draw, value, depth=0):
    """A tree of lists and dictionaries with one place that holds something else, or is not there, or twice."""
    if isinstance(value, dict | list) and value and (depth < 1 or draw.random() < 0.8):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, changed = draw.choice(keys), value.copy()
        fate = draw.random()
        if fate < 0.1:
            del changed[key]
        elif fate < 0.15 and isinstance(value, list):
            changed.append(value[key])
        elif fate < 0.2 and isinstance(value, dict):
            changed[draw.choice(["", "x", "__metadata__", "format", "../x"])] = value[key]
        else:
            changed[key] = odd_value(draw, value[key], depth + 1)
        return changed
    return draw.choice(ODD)


def odd_json(draw, content):
    """The same of a JSON file, or bytes that are none."""
    if draw.random() < 0.2:
        return odd_bytes(draw, content)
    return json.dumps(odd_value(draw, json.loads(content))).encode()


def odd_yaml(draw, content):
    """The same of YAML."""
    if draw.random() < 0.3:
        return odd_bytes(draw, content)
    return yaml.safe_dump(odd_value(draw, yaml.safe_load(content)), allow_unicode=True).encode()


def odd_safetensors(draw, content):
    """A safetensors file with another header, whose length may be right."""
    if draw.random() < 0.3:
        return odd_bytes(draw, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(odd_value(draw, json.loads(content[8 : 8 + length]))).encode()
    said = len(header) if draw.random() < 0.8 else draw.choice([0, 2**40, 2**63, len(header) + 1])
    return struct.pack("<Q", said) + header + content[8 + length :]


def odd_lines(draw, content):
    """JSON lines of which one is odd."""
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[:at], odd_json(draw, lines[at]), *lines[at + 1 :]])


class Readers:
    """Folders with every kind of file, and by name: which file is made odd, how, and what reads it then."""

    def __init__(self, place: Path) -> None:
        self.model, self.out, self.place = tiny.save("llama", place / "model"), place / "out", place
        text = place / "text.txt"
        text.write_text(tiny.prose(0, 3000))
        calibration = {"text": [str(text)], "sequences": 16, "length": 32}
        cut = [{"method": "flap", "ratio": 0.2, "round_to": 1, "minimum": 2}, {"method": "rtn", "format": "W8 row"}]
        duramen.run({"calibration": calibration, "steps": cut}, str(self.model), self.out)
        duramen.run(
            {"calibration": calibration, "steps": [{"method": "magnitude", "pattern": "2:4"}]},
            str(self.model),
            place / "sparse",
        )
        tuned = [{"method": "rora", "steps": 1, "batch": 2, "rank": 2, "mode": "side", "adapter": "portable"}]
        duramen.run({"calibration": calibration, "steps": tuned}, str(self.model), place / "tuned")
        searched = [
            {
                "method": "search",
                "target": {"block_parameters": 0.7},
                "generations": 1,
                "offspring": 4,
                "round_to": 1,
                "nested": True,
            }
        ]
        duramen.run({"calibration": calibration, "steps": searched}, str(self.model), place / "found")
        release(self.out, Wish(base_licence="MIT"))
        stage = place / "stages" / "00-curate"
        stage.mkdir(parents=True)
        (stage / "data.jsonl").write_text("{}")
        (stage / "manifest.json").write_text(json.dumps({"id": "curate", "method": "curate", "outputs": hash_folder(stage)}))
        (place / "rows.jsonl").write_text("\n".join(json.dumps({"text": tiny.prose(n, 40)}) for n in range(4)))
        shutil.copy(shipped_folder() / "quickstart.yaml", place / "recipe.yaml")
        gguf = place / "model.gguf"
        export_gguf(self.model, gguf, kind="f32")
        out, found = self.out, place / "found"
        self.all = {
            "recipe": (place / "recipe.yaml", odd_yaml, load_recipe),
            "config": (self.model / "config.json", odd_json, lambda _: duramen.inspect(str(self.model))),
            "weights": (self.model / "model.safetensors", odd_safetensors, lambda _: duramen.inspect(str(self.model))),
            "index": (out / "model.safetensors.index.json", odd_json, lambda _: duramen.inspect(str(out))),
            "formats": (out / "formats.json", odd_json, lambda _: duramen.inspect(str(out))),
            "codes": (out / "codes.safetensors", odd_safetensors, lambda _: duramen.inspect(str(out))),
            "masks": (place / "sparse" / "masks.safetensors", odd_safetensors, lambda _: duramen.inspect(str(place / "sparse"))),
            "plan": (out / "pruning_plan.json", odd_json, Plan.load),
            "search": (found / "search.json", odd_json, read_search),
            "nested": (found / "nested.safetensors", odd_safetensors, read_search),
            "adapter": (place / "tuned" / "adapter" / "adapter_config.json", odd_json, lambda file: read_peft(file.parent)),
            "results": (out / "results.json", odd_json, lambda _: duramen.report(out)),
            "manifest": (out / "manifest.json", odd_json, lambda _: verify(out)),
            "release": (out / "release" / "verdict.json", odd_json, lambda _: verify(out)),
            "released results": (out / "results.json", odd_json, lambda _: release(out, Wish(base_licence="MIT"))),
            "fingerprint": (out / ".duramen" / "fingerprint.json", odd_json, lambda _: duramen.run({"calibration": calibration, "steps": cut}, str(self.model), out)),
            "stage": (stage / "manifest.json", odd_json, lambda _: check_stage(stage)),
            "checkpoint": (stage / "manifest.json", odd_json, lambda _: damaged(stage)),
            "gguf": (gguf, odd_bytes, lambda _: Checkpoint(_converted(gguf, "odd"))),
            "rows": (place / "rows.jsonl", odd_lines, lambda file: read_documents(str(file))),
        }  # fmt: skip

    def read(self, name, draw):
        """Makes one file odd, reads it, and puts it back: ``read`` or ``refused``; anything else that is raised is a fault."""
        file, change, reader = self.all[name]
        whole = file.read_bytes()
        before = set(self.place.parent.rglob("*"))
        try:
            file.write_bytes(change(draw, whole))
            reader(file)
        except Problem:
            return "refused"
        finally:
            file.write_bytes(whole)
            assert before == set(self.place.parent.rglob("*"))
        return "read"

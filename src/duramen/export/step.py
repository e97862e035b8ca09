"""Export: the finished model in a format that another program executes, run there and held against what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import model_validator

from duramen.export.compressed import export_compressed
from duramen.export.gguf import Type as GgufType
from duramen.export.gguf import export_gguf
from duramen.export.onnx import Type as OnnxType
from duramen.export.onnx import export_onnx
from duramen.problem import Problem
from duramen.registry import Settings as MethodSettings
from duramen.registry import method

Form = Literal["gguf", "onnx", "compressed"]
ENGINES = {
    "gguf": "llama.cpp and OpenVINO",
    "onnx": "ONNX Runtime",
    "compressed": "vLLM and transformers, by compressed-tensors",
}
"""What executes each format."""
TYPES: dict[str, tuple[str, ...]] = {"gguf": get_args(GgufType), "onnx": get_args(OnnxType)[1:], "compressed": ()}
"""What each format lets one choose."""


class Settings(MethodSettings):
    """Settings of an export."""

    form: Form
    """`gguf` for llama.cpp and OpenVINO, `onnx` for ONNX Runtime GenAI, `compressed` for vLLM and transformers by compressed-tensors."""
    type: str = "auto"
    """GGUF: type of the matrices without codes, `f32`, `f16` (auto), `bf16` or `q8_0`. ONNX: what coded layers multiply with, `float` or `int8`; auto is `int8` where inputs are rounded."""

    @model_validator(mode="after")
    def _type_is_known(self) -> Settings:
        if self.type != "auto" and self.type not in TYPES[self.form]:
            raise Problem(
                f"{self.form} has no type {self.type!r}.",
                why=f"its types are {', '.join(TYPES[self.form])}." if TYPES[self.form] else "there is nothing to choose.",
                fix="`auto`, or leave it out.",
            )
        return self


@method("export", title="Export", paper="documented in export/", kind="export", settings=Settings)
def apply(folder: Path, out: Path, **settings: object) -> dict[str, Any]:
    """Writes a model folder in another format, and checks what it wrote.

    Args:
        folder: A Hugging Face folder.
        out: The file (GGUF) or folder to write.
        **settings: See ``Settings``.

    Returns:
        ``form``, its ``engine``, ``type``, ``bytes``, and what the format has to say of it.

    Raises:
        Problem: On a type that the format does not have, or if the model cannot be expressed in it, or comes out as another one.
    """
    chosen = Settings.model_validate(settings)
    found: dict[str, Any]
    if chosen.form == "gguf":
        kind = "f16" if chosen.type == "auto" else chosen.type
        found = {"type": kind} | export_gguf(folder, out, kind=kind)  # type: ignore[arg-type]
    elif chosen.form == "onnx":
        found = export_onnx(folder, out, kind=chosen.type)  # type: ignore[arg-type]
    else:
        found = {"type": "codes"} | export_compressed(folder, out)
    return {"form": chosen.form, "engine": ENGINES[chosen.form]} | found

"""What the read-only commands gather and print: rich tables for people; the gathered dictionaries are the ``--json`` output."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import types
import typing
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from duramen.registry import get_method, method_modules

Printable = str | Table


def _table(title: str, *columns: str, rows: Iterable[tuple[Any, ...]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def stage_tables(found: dict[str, Any]) -> list[Printable]:
    """Stages of training, and of a new model the memory of every process."""
    names = [each["id"] for each in found["stages"]] + found["then"]
    parts: list[Printable] = [f"{found['recipe']}: {', '.join(names)}"]
    for each in (stage for stage in found["stages"] if "bytes" in stage):
        parts.append(
            f"{each['id']}: {each['parameters'] / 1e9:.3f} billion parameters, {each['tokens'] / 1e9:,.3f} billion tokens, "
            f"{each['flops_per_token'] / 1e9:.3g} GFLOP a token, {each['flops']:.2e} FLOP"
        )
        rows = [(ranks, *(f"{size / 2**30:.2f}" for size in sizes.values())) for ranks, sizes in each["bytes"].items()]
        head = ("processes", *(name.replace("_", " ") for name in next(iter(each["bytes"].values()))))
        parts.append(_table(f"{each['id']}: predicted GiB of every process", *head, rows=rows))
    return parts


def release_tables(found: dict[str, Any]) -> list[Printable]:
    """Output of ``duramen release``."""
    badges = ", ".join(f"class {'I' * int(level)}: {badge}" for level, badge in found["badges"].items())
    others = ", ".join(f"{name}: {each['label']}" for name, each in found["profiles"].items() if name != found["profile"])
    rows = [
        (
            each["name"],
            "I" * each["class"],
            found["statuses"].get(each["name"], "not listed"),
            each["licence"] or "",
            ", ".join(each["files"][:2]),
        )
        for each in found["components"]
    ]
    parts: list[Printable] = [f"{found['name']}: {found['label']} ({badges}); {others}"]
    parts.append(_table("components", "component", "class", "state", "licence", "files", rows=rows))
    if found["next"]:
        parts += [f"for class {'I' * found['next']}:", *(f"- {line}" for line in found["missing"][str(found["next"])])]
    return parts + [f"warning: {line}" for line in found["warnings"]]


def plan_tables(found: dict[str, Any]) -> list[Printable]:
    """Output of ``duramen plan``."""
    parts: list[Printable] = [f"{found['recipe']} on {found['model']}: family {found['family']}, {found['blocks']} blocks"]
    for step in found["steps"]:
        if "roles" in step:
            rows = [
                (item["role"], item["layers"], "x".join(map(str, item["shape"])), f"{item['removed']:,}", f"{item['removed'] / item['parameters']:.2%}")
                for item in step["roles"]
            ]  # fmt: skip
            parts.append(
                _table(f"step {step['id']} ({step['method']})", "role", "layers", "shape", "removed", "share", rows=rows)
            )
            parts.append(
                "left alone: "
                + (", ".join(step["skipped"]) or "no layer of the blocks")
                + "; embeddings, head and norms always"
            )
        if "units" in step:
            kinds = [(item["kind"], f"{item['units']:,}", item["stay"], f"{item['parameters']:,}") for item in step["units"]]
            title = f"step {step['id']} ({step['method']})"
            parts.append(_table(title, "kind", "units in a block", "stay", "parameters of one unit", rows=kinds))
        if "note" in step:
            parts.append(f"step {step['id']}: {step['note']}")
        parts.append(f"step {step['id']}: predicted {step['seconds'] / 60:.1f} min, {step['memory_bytes'] / 2**30:.1f} GiB")
    parts.append(f"in all: predicted {found['seconds'] / 60:.1f} min, peak {found['memory_bytes'] / 2**30:.1f} GiB")
    before, after = (found["macs_per_token"][when] / 1e6 for when in ("before", "after"))
    note = "before and after (zeros are stored and multiplied)" if before == after else f"before, {after:,.1f} million after"
    parts.append(f"multiply-adds per token: {before:,.1f} million {note}")
    parts.append(f"loads in: {found['loads_in']}")
    return parts


def inspect_tables(found: dict[str, Any], *, layers: bool = False, groups: bool = False) -> list[Printable]:
    """Output of ``duramen inspect``: one row per role and shape, or per layer; and the coupled groups of every block."""
    formats = ", ".join(f"{kind} {count / 1e6:,.1f} M" for kind, count in found["formats"].items())
    rows = [
        (
            item["layer"] if layers else item["role"], 1 if layers else item["layers"], "x".join(map(str, item["shape"])),
            f"{item['zeros']:,}", f"{item['share']:.2%}", item["pattern"] or "-",
        )
        for item in found["layers" if layers else "roles"]
    ]  # fmt: skip
    parts: list[Printable] = [
        f"{found['model']}: {found['model_type']} (family {found['family']}), {found['blocks']} blocks, {found['parameters'] / 1e6:,.1f} M parameters",
        f"stored as {formats}; {found['bytes'] / 2**20:,.0f} MiB on disk",
        _table("layers", "layer" if layers else "role", "layers", "shape", "zeros", "share", "N:M", rows=rows),
        f"outside the blocks: {', '.join(found['outside'])}",
    ]  # fmt: skip
    if groups:
        members = [
            (item["block"], item["kind"], f"{item['units']:,}", f"{item['parameters']:,}", ", ".join(item["members"]))
            for item in found["groups"]
        ]
        head = ("block", "kind", "units", "parameters of one", "tensor, axis and entries of one")
        parts.append(_table("coupled groups", *head, rows=members) if members else "no coupled groups are known of this family")
    if found["masks"]:
        masks = found["masks"]
        kept = f"BROKEN in {', '.join(masks['broken'])}" if masks["broken"] else "every removed weight is zero"
        parts.append(f"masks: {masks['removed']:,} of {masks['size']:,} removed; {kept}")
    if found["codes"]:
        kept = (
            f"BROKEN in {', '.join(found['codes']['broken'])}"
            if found["codes"]["broken"]
            else "every weight is what its code says"
        )
        counts = ", ".join(f"{count} modules {text}" for text, count in found["codes"]["modules"].items())
        parts.append(f"rounded: {counts}; {kept}")
    if found["damaged"]:
        parts.append(f"DAMAGED, not finite: {', '.join(found['damaged'])}")
    return parts


def evaluation_tables(found: dict[str, Any]) -> list[Printable]:
    """Output of ``duramen evaluate`` and ``duramen compare``."""
    from duramen.report.page import measured_rows

    rows = [(row["what"], row["before"], row["after"], row["change"], row["basis"]) for row in measured_rows(found)]
    parts: list[Printable] = [_table("measured, with 95 % intervals", "what", "before", "after", "change", "on", rows=rows)]
    for name, latency in found["latency"].items():
        prefill, decode = latency["prefill_seconds"], latency["decode_tokens_per_second"]
        parts.append(
            f"{name}: prefill {prefill['median']:.3g} s ({prefill['low']:.3g} to {prefill['high']:.3g}), "
            f"decode {decode['median']:.3g} tokens/s ({decode['low']:.3g} to {decode['high']:.3g})"
        )
    return parts


def export_tables(found: dict[str, Any]) -> list[Printable]:
    """What was written, and how it was checked."""
    parts: list[Printable] = [
        f"{found['file']}: {found['form']}, {found['bytes']:,} bytes, {found['coded']} layers with their codes, the rest {found['type']}"
    ]
    if found["form"] == "gguf":
        parts.append(
            f"architecture {found['architecture']}, {found['tensors']} tensors; read back, entries differ by at most {found['largest_error']:.1e} of their tensor's largest"
        )
    if found["form"] == "compressed":
        opened = found["largest_difference"]
        checked = (
            f"its logits differ by at most {opened:.2g} (largest {found['largest_logit']:.3g})"
            if opened is not None
            else "not opened (`python -m pip install compressed-tensors`)"
        )
        return [*parts, f"opened by plain transformers: {checked}"]
    if not found["ran"]:
        parts.append(
            "no engine was run (`python -m pip install xllamacpp openvino-genai`, and memory for two copies of the model)"
        )
    return [*parts, *(line for engine, ran in found["ran"].items() for line in _ran(engine, ran))]


def _ran(engine: str, ran: dict[str, Any]) -> list[Printable]:
    """What an engine said, and how fast."""
    if "failed" in ran:
        return [f"{engine} did not run it: {ran['failed']}"]
    words = f"run in {engine}: {ran['agreed']} of {ran['prompts']} prompts were continued as transformers does"
    if ran["apart"]:
        gaps = sorted(each["gap"] for each in ran["apart"])
        words += f"; where the others part, transformers holds its own token likelier by {gaps[len(gaps) // 2]:.2g} in logits (median; at most {gaps[-1]:.2g})"
    if ran["largest_difference"] is not None:
        words += f"; logits differ by at most {ran['largest_difference']:.2g} (largest {ran['largest_logit']:.3g})"
    speed = {key: ran[f"{key}_tokens_per_second"] for key in ("prefill", "decode")}
    timed = ", ".join(
        f"{key} {each['median']:,.0f} tokens a second ({each['low']:,.0f} to {each['high']:,.0f})"
        for key, each in speed.items()
    )
    return [words, f"{timed}; {ran['peak_memory_bytes'] / 2**20:,.0f} MiB of memory"]


def list_methods() -> list[dict[str, Any]]:
    """Every method with its kind, paper and first line."""
    found = [get_method(name) for name in sorted(method_modules())]
    return [
        {"name": item.name, "kind": item.kind, "title": item.title, "paper": item.paper, "summary": item.summary}
        for item in found
    ]


def explain_method(name: str) -> dict[str, Any]:
    """One method with its settings: name, type, default, meaning."""
    entry = get_method(name)
    settings = [
        {
            "name": key,
            "type": type_words(field.annotation),
            "default": "required" if field.is_required() else field.get_default(call_default_factory=True),
            "meaning": field.description or "",
        }
        for key, field in entry.settings.model_fields.items()
    ]
    head = {"name": entry.name, "kind": entry.kind, "title": entry.title, "paper": entry.paper}
    return head | {"summary": entry.summary, "settings": settings}


def type_words(annotation: Any) -> str:
    """A settings field's type in words: ``float | "held-out"``."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(f'"{part}"' for part in parts)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " | ".join(type_words(part) for part in parts)
    if typing.get_origin(annotation) is typing.Annotated:
        return type_words(parts[0])
    if typing.get_origin(annotation) is tuple:
        return f"list of {type_words(parts[0])}"
    return "null" if annotation is type(None) else str(annotation.__name__)


def method_tables(found: Any) -> list[Printable]:
    """Output of ``duramen methods``."""
    if isinstance(found, list):
        rows = [(item["name"], item["kind"], item["summary"], item["paper"]) for item in found]
        return [_table("methods", "name", "kind", "what it does", "source", rows=rows)]
    rows = [(item["name"], item["type"], item["default"], item["meaning"]) for item in found["settings"]]
    return [
        f"{found['name']}: {found['summary']} ({found['paper']})",
        _table("settings", "key", "type", "default", "meaning", rows=rows),
    ]


def list_assets() -> list[dict[str, Any]]:
    """Every embedded asset: whether it is here, its licence, its package."""
    from duramen.assets import ASSETS, DEBIAN

    found: list[dict[str, Any]] = [
        {
            "name": item.name, "kind": item.kind, "installed": item.locate() is not None, "licence": item.licence,
            "package": item.requirement, "sha256": item.sha256,
        }
        for item in ASSETS.values()
    ]  # fmt: skip
    return found + [
        {
            "name": each.name, "kind": each.kind, "installed": each.locate() is not None, "licence": each.licence,
            "package": f"Debian: {each.package}", "sha256": "",
        }
        for each in DEBIAN.values()
    ]  # fmt: skip


def asset_tables(found: list[dict[str, Any]]) -> list[Printable]:
    """Output of ``duramen assets``."""
    rows = [
        (item["name"], item["kind"], "yes" if item["installed"] else "no", item["licence"], item["package"]) for item in found
    ]
    return [_table("embedded assets", "name", "kind", "installed", "licence", "package", rows=rows)]


def check_environment() -> dict[str, Any]:
    """Versions, machine, disk and assets, with what is wrong."""
    import torch

    from duramen.assets import cache_folder
    from duramen.hardware.machine import describe, gigaflops

    names = ("duramen", "torch", "transformers", "safetensors", "accelerate", "gguf", "xllamacpp", "pyarrow")
    versions = {name: _version(name) for name in names}
    folder = cache_folder()
    place = next(item for item in (folder, *folder.parents) if item.is_dir())
    free = shutil.disk_usage(place).free
    problems = [f"{name} is not installed" for name in names[:5] if versions[name] is None]
    problems += ["less than 2 GiB of disk are free in the cache folder"] if free < 2 * 2**30 else []
    return {
        "python": platform.python_version(), "versions": versions, "machine": describe(),
        "float32_gigaflops": round(gigaflops(torch.float32), 1), "cache": str(folder), "cache_free_bytes": free,
        "assets": {item["name"]: item["installed"] for item in list_assets()}, "problems": problems, "ok": not problems,
    }  # fmt: skip


def doctor_tables(found: dict[str, Any]) -> list[Printable]:
    """Output of ``duramen doctor``."""
    missing = [name for name, here in found["assets"].items() if not here]
    rows = [("python", found["python"]), *((name, version or "not installed") for name, version in found["versions"].items())]
    rows += [(key, value) for key, value in found["machine"].items()]
    rows += [
        ("float32 speed", f"{found['float32_gigaflops']} GFLOP/s"),
        ("cache", f"{found['cache']}, {found['cache_free_bytes'] / 2**30:.0f} GiB free"),
    ]
    rows += [("assets not installed", ", ".join(missing) or "none")]
    return [_table("environment", "what", "found", rows=rows), *(found["problems"] or ["All is well."])]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

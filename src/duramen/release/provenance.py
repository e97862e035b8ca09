"""What machines read of a release: a bill of what it was made with (CycloneDX 1.6), its data (Croissant 1.0), what it was measured on, and the hash of every file.

Nothing in them depends on when or where they are written, so the same folder gives the same bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duramen.assets import ASSETS, DEBIAN
from duramen.recipe import DRAWN
from duramen.release.evidence import FOLDER, USUAL, Gathered, measured_on
from duramen.rundir import hash_file, hash_folder

SUMS = "SHA256SUMS"


def bill(gathered: Gathered, name: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """A CycloneDX bill: the model with its hashes, the packages that its manifests name, and the model that it was made from.

    Args:
        gathered: What the folder proves.
        name: Of the model.
        weights: Hashes of its files.
    """
    versions: dict[str, str] = dict(gathered.results.get("versions", {}))
    for stage in gathered.stages:
        versions |= stage["versions"]
    parts = [_package(package, version) for package, version in sorted(versions.items())]
    if gathered.base:
        base, licence = gathered.base
        parts.append(
            {"type": "machine-learning-model", "bom-ref": f"base:{base}", "name": base}
            | ({"licenses": [_licence(licence)]} if licence else {})
        )
    model = {
        "type": "machine-learning-model", "bom-ref": "model", "name": name,
        "components": [{"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": [{"alg": "SHA-256", "content": digest}]} for file, digest in sorted(weights.items())],
    }  # fmt: skip
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([name, sorted(weights.items()), sorted(versions.items())]))
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{number}", "version": 1, "metadata": {"component": model},
        "components": parts, "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
    }  # fmt: skip


def _package(name: str, version: str) -> dict[str, Any]:
    place = f"pkg:pypi/{name}@{version}"
    try:
        said: Any = importlib.metadata.metadata(name).json.get("license_expression")
    except importlib.metadata.PackageNotFoundError:
        said = None
    found = {"type": "library", "bom-ref": place, "name": name, "version": version, "purl": place}
    return found | ({"licenses": [_licence(said)]} if said else {})


def _licence(text: str) -> dict[str, Any]:
    if " " in text:
        return {"expression": text}
    return {"license": {"name": text} if text.startswith("LicenseRef") or "(" in text else {"id": text}}


CROISSANT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/", "cr": "http://mlcommons.org/croissant/", "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "examples": {"@id": "cr:examples", "@type": "@json"},
} | {
    name: f"cr:{name}"
    for name in (
        "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key",
        "md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
    )
}  # fmt: skip
"""The vocabulary of Croissant 1.0, which every description repeats."""


def croissant(gathered: Gathered, name: str, hashes: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Croissant's description of the data sets: every file with its hash, and the fields of a document.

    Args:
        gathered: What the folder proves.
        name: Of the model.
        hashes: Of the files of the data, by their paths in the model's folder.
        sizes: Their bytes.
    """
    evidence = gathered.components["Datasets"]
    files = [
        {
            "@type": "cr:FileObject", "@id": file, "name": file, "contentUrl": f"../{file}", "encodingFormat": "application/jsonlines",
            "sha256": hashes[file], "contentSize": f"{sizes[file]} B",
        }
        for file in evidence.files
    ]  # fmt: skip

    def field(file: str, name: str, column: str, inside: dict[str, Any]) -> dict[str, Any]:
        source = {"fileObject": {"@id": file}, "extract": {"column": column}} | inside
        return {"@type": "cr:Field", "@id": f"{file}#{name}", "name": name, "dataType": "sc:Text", "source": source}

    def fields(file: str) -> list[dict[str, Any]]:
        within = {"transform": {"jsonPath": "$.source"}}
        return [field(file, "id", "id", {}), field(file, "text", "text", {}), field(file, "source", "metadata", within)]

    sets = [
        {"@type": "cr:RecordSet", "@id": f"{file}#documents", "name": f"{file}#documents", "field": fields(file)}
        for file in evidence.files
    ]
    return {
        "@context": CROISSANT, "@type": "sc:Dataset", "name": f"{name}-data", "description": f"The documents that {name} learned and was held out on.",
        "conformsTo": "http://mlcommons.org/croissant/1.0", "license": evidence.licence, "url": ".", "version": "1.0.0", "distribution": files, "recordSet": sets,
    }  # fmt: skip


def evaluation_data(gathered: Gathered) -> dict[str, Any]:
    """What the figures were taken on: of every text and task its package, file, hash and terms."""
    found: dict[str, Any] = {}
    for name in measured_on(gathered.results):
        asset = ASSETS.get(name)
        if asset is not None:
            file = asset.locate()
            found[name] = {
                "package": asset.requirement,
                "file": asset.file,
                "licence": asset.licence,
                "sha256": hash_file(file) if file else None,
            }
        elif name in DEBIAN:
            found[name] = {"package": DEBIAN[name].package, "licence": DEBIAN[name].licence}
        elif name == DRAWN:
            found[name] = {"licence": USUAL["code"], "made": "drawn by Duramen from a seed"}
        else:
            place = Path(name)
            found[name] = {"file": place.name, "sha256": hash_file(place) if place.is_file() else None}
    return found


def check_sums(folder: Path) -> str:
    """``SHA256SUMS`` of all visible files of a folder but itself, as ``sha256sum`` reads it."""
    own = f"{FOLDER}/{SUMS}"
    return "".join(f"{digest}  {name}\n" for name, digest in hash_folder(folder).items() if name != own)

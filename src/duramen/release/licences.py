"""Licences by their SPDX ids: which are open, which fit code, data or documents, and what a misspelt one may mean.

Open is what the OSI approves or the FSF calls free, one of the open-data licences of the framework, or OpenMDW. ``spdx.csv`` is SPDX's list 3.29 with those flags.
"""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from duramen.problem import Problem, need
from duramen.release.components import Kind

OPEN_DATA = {
    "CC0-1.0", *(f"CC-BY-{each}" for each in (["1.0", "2.0", "2.5", "2.5-AU", "3.0", "3.0-AT", "3.0-AU", "3.0-DE", "3.0-IGO", "3.0-NL", "3.0-US", "4.0"])),
    *(f"CC-BY-SA-{each}" for each in (["1.0", "2.0", "2.0-UK", "2.1-JP", "2.5", "3.0", "3.0-AT", "4.0"])), "CDLA-Permissive-1.0", "CDLA-Permissive-2.0",
    "CDLA-Sharing-1.0", "ODC-PDDL-1.0", "ODC-By-1.0", "ODbL-1.0", "GFDL-1.3", "OGL-Canada-2.0", "OGL-UK-2.0", "OGL-UK-3.0",
}  # fmt: skip
"""As the evaluator has them; ODC-PDDL-1.0 is no SPDX id."""
NEWER = {
    "ALGLIB-Documentation",
    "BSD-3-Clause-Open-MPI",
    "BSD-ask-to-endorse",
    "CDDL-1.1",
    "CNRI-Python-GPL-Compatible",
    "OSC-1.0",
    "Python-2.0.1",
    "W3C-20150513",
    "WordNet",
    "curl",
}
"""Open ids that the evaluator's copy of SPDX's list lacks."""
FITTING: dict[Kind, set[str]] = {
    "code": {
        "0BSD",
        "AFL-1.1",
        "AFL-1.2",
        "AFL-2.0",
        "AFL-2.1",
        "AFL-3.0",
        "Apache-1.0",
        "Apache-1.1",
        "Apache-2.0",
        "ECL-1.0",
        "ECL-2.0",
        "ISC",
        "MIT",
        "MIT-0",
        "MulanPSL-1.0",
        "MulanPSL-2.0",
        "NCSA",
        "UPL-1.0",
        "OpenMDW-1.0",
    },
    "data": {"C-UDA-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "PDDL-1.0", "OpenMDW-1.0"},
    "document": {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-PDDC", "CC0-1.0", "FreeBSD-DOC", "OpenMDW-1.0"},
}
"""As the evaluator has them; CC0-1.0 and CC-PDDC are meant for data too, and its import keeps the last mention."""
MENDED: dict[Kind, set[str]] = {
    "code": FITTING["code"]
    | {
        "BSD-2-Clause",
        "BSD-3-Clause",
        "MPL-2.0",
        "GPL-2.0-only",
        "GPL-2.0-or-later",
        "GPL-3.0-only",
        "GPL-3.0-or-later",
        "LGPL-3.0-only",
        "OpenMDW-1.1",
    },
    "data": (FITTING["data"] - {"C-UDA-1.0"})
    | {"CC0-1.0", "CC-PDDC", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-SA-3.0", "ODC-By-1.0", "ODbL-1.0", "OpenMDW-1.1"},
    "document": FITTING["document"] | {"OpenMDW-1.1"},
}
MENDED_OPEN = {"PDDL-1.0", "CC-PDDC", "FreeBSD-DOC", "MulanPSL-1.0", "OpenMDW-1.0", "OpenMDW-1.1"}
CLOSING = ("commons clause", "good, not evil")
"""What closes an open text that it stands in."""
UNLICENSED = "unlicensed"
NONE = ("", UNLICENSED)
CUSTOM = re.compile(r"^(LicenseRef|DocumentRef)-[\w.:-]+$")


@dataclass(frozen=True)
class Licence:
    """One of SPDX's list.

    Attributes:
        id: Its short name.
        name: Its long one.
        free: Whether the OSI or the FSF says so.
        deprecated: Whether another id stands for it now.
    """

    id: str
    name: str
    free: bool
    deprecated: bool


@cache
def spdx() -> dict[str, Licence]:
    """SPDX's list by id."""
    with (Path(__file__).parent / "spdx.csv").open(encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        return {
            row["id"]: Licence(row["id"], row["name"], "1" in (row["osi"], row["fsf"]), row["deprecated"] == "1")
            for row in rows
        }


def open_to_the_evaluator(licence: str) -> bool:
    """Whether the public evaluator holds an id for open."""
    known = spdx().get(licence)
    return licence in OPEN_DATA or licence == "OpenMDW-1.0" or (known is not None and known.free and licence not in NEWER)


def is_open(expression: str) -> bool:
    """Whether a licence, or an expression of several, is open: of those joined by OR one must be, of those joined by AND all.

    Raises:
        Problem: If it is no expression of SPDX ids.
    """
    return _holds(
        parse(expression), lambda licence: licence in OPEN_DATA | MENDED_OPEN or (licence in spdx() and spdx()[licence].free)
    )


def fits(expression: str, kind: Kind) -> bool:
    """Whether a licence, or an expression of several, is meant for code, data or documents."""
    return _holds(parse(expression), lambda licence: licence in MENDED[kind])


def _holds(tree: Any, test: Any) -> bool:
    """A test on the leaves of an expression, joined as they are."""
    if not hasattr(tree, "operator"):
        return bool(test(str(getattr(tree, "key", tree)).split(" WITH ")[0].removesuffix("+")))
    join = any if tree.operator.strip() == "OR" else all
    return join(_holds(each, test) for each in tree.args)


def parse(expression: str) -> Any:
    """The tree of an SPDX expression.

    Raises:
        Problem: If it is none, or an id in it is unknown; what may be meant is said.
    """
    need("Reading licences", "license_expression", install='"duramen[release]"')
    from license_expression import ExpressionError, ExpressionParseError, Licensing

    try:
        tree = Licensing().parse(expression, validate=False)
    except (ExpressionError, ExpressionParseError) as error:
        raise _unknown(expression, f"it cannot be read: {error}") from error
    exceptions = re.findall(r"\bWITH\s+([\w.+-]+)", expression)
    ids = [str(key) for key in Licensing().license_keys(tree)]
    for each in set(ids) - set(exceptions):
        if each.removesuffix("+") not in spdx() and each not in OPEN_DATA | MENDED_OPEN and not CUSTOM.match(each):
            raise _unknown(each, "SPDX's list does not have it")
    return tree


def _unknown(text: str, why: str) -> Problem:
    near = suggest(text)
    return Problem(
        f"`{text}` is no SPDX licence.",
        why=f"{why}.",
        fix=f"did you mean `{near}`?" if near else "an id of spdx.org/licenses, or `LicenseRef-NAME`.",
    )


def suggest(text: str) -> str:
    """The id that a licence in other words may mean; empty if none is near."""
    plain = _plain(text)
    names = {_plain(each.name): each.id for each in spdx().values() if not each.deprecated}
    ids = {_plain(each): each for each in spdx() if not spdx()[each].deprecated}
    for known in (USUAL, ids, names):
        if plain in known:
            return known[plain]
    near = difflib.get_close_matches(plain, [*ids, *names], n=1, cutoff=0.75)
    return (ids | names)[near[0]] if near else ""


def _plain(text: str) -> str:
    """A name without case, marks and the words that all have."""
    words = re.sub(r"[^a-z0-9.]+", " ", text.lower()).split()
    return " ".join(
        re.sub(r"^v(?=\d)", "", word)
        for word in words
        if word not in ("the", "license", "licence", "version", "international", "public")
    )


USUAL = {
    "apache": "Apache-2.0", "apache 2": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache2": "Apache-2.0", "apache2.0": "Apache-2.0", "bsd": "BSD-3-Clause",
    "bsd 3": "BSD-3-Clause", "bsd 2": "BSD-2-Clause", "new bsd": "BSD-3-Clause", "mit": "MIT", "cc by": "CC-BY-4.0", "cc by 4": "CC-BY-4.0",
    "cc by sa": "CC-BY-SA-4.0", "cc0": "CC0-1.0", "cc 0": "CC0-1.0", "domain": "CC0-1.0", "gpl": "GPL-3.0-only", "gpl 2": "GPL-2.0-only",
    "gpl 3": "GPL-3.0-only", "gplv2": "GPL-2.0-only", "gplv3": "GPL-3.0-only", "odc by": "ODC-By-1.0", "odbl": "ODbL-1.0", "pddl": "PDDL-1.0",
    "openmdw": "OpenMDW-1.0", "psf": "PSF-2.0", "python software foundation": "PSF-2.0", "isc": "ISC", "mpl": "MPL-2.0", "unlicense": "Unlicense",
}  # fmt: skip
"""What people write, and what they mean."""


TAG = re.compile(r"SPDX-License-Identifier:\s*([\w.+() -]+)")
_MIT, _BSD, _ISC = (
    "permission is hereby granted, free of charge",
    "redistribution and use in source and binary forms",
    "permission to use, copy, modify, and",
)
PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Apache-2.0": (("apache license", "version 2.0, january 2004"), ()),
    "MIT": (
        (_MIT, "the above copyright notice and this permission notice"),
        ("permission is hereby granted, free of charge, to any person or organization",),
    ),
    "BSL-1.0": (("boost software license - version 1.0",), ()),
    "BSD-3-Clause": ((_BSD, "endorse or promote"), ("all advertising materials",)),
    "BSD-2-Clause": ((_BSD,), ("endorse or promote", "may not be used")),
    "ISC": ((_ISC, "provided that the above copyright notice"), ()),
    "0BSD": ((_ISC,), ("provided that the above copyright notice",)),
    "GPL-2.0-only": (("gnu general public license version 2, june 1991",), ()),
    "GPL-3.0-only": (
        ("gnu general public license version 3, 29 june 2007",),
        ("gnu affero", "gnu lesser general public license version 3"),
    ),
    "LGPL-2.1-only": (("gnu lesser general public license version 2.1, february 1999",), ()),
    "LGPL-3.0-only": (("gnu lesser general public license version 3, 29 june 2007",), ()),
    "AGPL-3.0-only": (("gnu affero general public license version 3",), ()),
    "MPL-2.0": (("mozilla public license version 2.0",), ()),
    "PSF-2.0": (("python software foundation license version 2",), ()),
    "Zlib": (("altered source versions must be plainly marked",), ()),
    "Unlicense": (("this is free and unencumbered software released into the public domain",), ()),
    "CC0-1.0": (("cc0 1.0 universal",), ()),
    "CC-BY-4.0": (("attribution 4.0 international",), ("noncommercial", "sharealike", "noderivatives")),
    "CC-BY-SA-4.0": (("attribution-sharealike 4.0 international",), ("noncommercial",)),
    "CC-BY-NC-4.0": (("attribution-noncommercial 4.0 international",), ()),
}
"""What a licence's text has, and what it does not have."""


def detect(text: str) -> list[str]:
    """The licences whose text, or SPDX tag, stands in a file; several where it holds several."""
    tagged = [each.strip() for each in TAG.findall(text)]
    words = re.sub(r"[\s*#>]+", " ", text.lower()).replace("\u201c", '"').replace("\u201d", '"')
    return list(
        dict.fromkeys(
            [
                *tagged,
                *(
                    name
                    for name, (has, lacks) in PHRASES.items()
                    if all(each in words for each in has) and not any(each in words for each in (*lacks, *CLOSING))
                ),
            ]
        )
    )

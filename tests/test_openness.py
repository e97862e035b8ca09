"""The openness class by the framework's rules: the public evaluator's results, where the profiles differ, invariants, and bad input."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duramen.problem import Problem
from duramen.release.components import BY_NAME, COMPONENTS, PAPER, REPORT, WEIGHTS, required
from duramen.release.evidence import Wish, gather, plain
from duramen.release.licences import (
    FITTING,
    NEWER,
    OPEN_DATA,
    PHRASES,
    detect,
    fits,
    is_open,
    open_to_the_evaluator,
    parse,
    spdx,
    suggest,
)
from duramen.release.openness import PROFILES, advise, evaluate

THREE, TWO, ONE = (required(level) for level in (3, 2, 1))


def release(names, *, distribution="MIT", own=None, **kinds):
    licence = {
        key: {"name": name, "path": None} for key, name in {"distribution": distribution, **kinds}.items() if name is not None
    }
    own = own or {}
    return {
        "name": "model", "producer": "somebody", "license": licence,
        "components": [{"name": name, "description": "", **({"license": own[name]} if name in own else {})} for name in names],
    }  # fmt: skip


ALL = [*THREE, *TWO, *ONE]
GOLDEN = {
    "all that is required": (release(ALL), 1, (100, 100, 100)),
    "all there is": (release(list(BY_NAME)), 1, (100, 100, 100)),
    "class III only": (release(THREE), 3, (100, 60, 0)),
    "III and II": (release(THREE + TWO), 2, (100, 100, 71.43)),
    "all but the report": (release([name for name in ALL if name != REPORT]), 1, (100, 100, 100)),
    "III with a paper for the report": (release([name for name in THREE if name != REPORT] + [PAPER]), 3, (100, 60, 0)),
    "III and II with a paper": (release([name for name in THREE + TWO if name != REPORT] + [PAPER]), 2, (100, 100, 76.92)),
    "neither report nor paper": (release([name for name in ALL if name not in (REPORT, PAPER)]), 0, (83.33, 0, 0)),
    "all but the paper": (release([name for name in ALL if name != PAPER]), 2, (100, 100, 92.86)),
    "report closed, paper open": (release(ALL, own={REPORT: "LicenseRef-closed"}), 1, (100, 100, 100)),
    "report missing, paper unlicensed": (
        release([name for name in ALL if name != REPORT], own={PAPER: "unlicensed"}),
        0,
        (83.33, 0, 0),
    ),
    "datasets unlicensed": (release(ALL, own={"Datasets": ""}), 2, (100, 100, 92.86)),
    "datasets PDDL-1.0": (release(ALL, own={"Datasets": "PDDL-1.0"}), 2, (100, 100, 92.86)),
    "datasets CC0-1.0": (release(ALL, own={"Datasets": "CC0-1.0"}), 1, (100, 100, 100)),
    "datasets ODC-By-1.0": (release(ALL, own={"Datasets": "ODC-By-1.0"}), 1, (100, 100, 100)),
    "no data card": (release([name for name in ALL if name != "Data card"]), 0, (83.33, 0, 0)),
    "no evaluation code": (release([name for name in ALL if name != "Evaluation code"]), 3, (100, 90, 0)),
    "a licence for code alone": (release(ALL, distribution=None, code="Apache-2.0"), 0, (16.67, 0, 0)),
    "closed data": (release(ALL, distribution="Apache-2.0", data="Llama-3"), 0, (83.33, 0, 0)),
    "misspelt": (release(ALL, distribution="Apache 2.0"), 0, (0, 0, 0)),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_public_evaluator_s_results(case):
    given_release, level, progress = GOLDEN[case]
    found = evaluate(given_release, "mot")
    assert found.level == level
    assert [round(found.progress[each], 2) for each in (3, 2, 1)] == list(progress)


def test_spdx_s_list_has_the_flags_that_the_rules_were_read_with():
    free = [licence for licence in spdx().values() if licence.free]
    assert (len(spdx()), len(free)) == (740, 209)
    assert sum(open_to_the_evaluator(licence.id) for licence in free) == 199
    assert {licence.id for licence in free} >= NEWER
    assert len(OPEN_DATA) == 31


def test_where_the_mended_rules_differ():
    assert evaluate(release(ALL, own={"Datasets": "PDDL-1.0"}), "fixed").level == 1
    assert evaluate(release(ALL, own={REPORT: "LicenseRef-closed"}), "fixed").level == 0, "a closed report is not forgiven"
    assert evaluate(release([name for name in ALL if name != REPORT]), "fixed").level == 1, "a missing one is"
    assert evaluate(release(ALL, own={"Training code": "MIT OR LicenseRef-sold"}), "fixed").level == 1
    assert evaluate(release(ALL, own={"Training code": "MIT AND LicenseRef-sold"}), "fixed").level == 3
    for licence in ("CC-PDDC", "FreeBSD-DOC", "MulanPSL-1.0"):
        assert not open_to_the_evaluator(licence)
        assert is_open(licence)
    assert not is_open("C-UDA-1.0"), "it restricts the use"
    assert "C-UDA-1.0" in FITTING["data"]
    assert any("meant for data" in warning for warning in evaluate(release(ALL, own={"Datasets": "CC0-1.0"}), "mot").warnings)
    assert not any("Datasets" in warning for warning in evaluate(release(ALL, own={"Datasets": "CC0-1.0"}), "fixed").warnings)
    assert fits("BSD-3-Clause", "code")
    null = release(ALL, own={"Datasets": None})
    assert evaluate(null, "mot").level == 1, "a null licence slips through"
    with pytest.raises(Problem, match="licence of `Datasets` is null"):
        evaluate(null, "fixed")
    odd = release([*THREE[1:], "Model Weights"])
    assert evaluate(odd, "mot").statuses["Model architecture"] == "included", "an unknown name becomes the first component"
    with pytest.raises(Problem, match="no component") as caught:
        evaluate(odd, "fixed")
    assert "Model" in caught.value.fix
    with pytest.raises(Problem, match="listed twice"):
        evaluate(release([*THREE, THREE[0]]), "fixed")


def test_the_text_of_the_framework():
    right = {
        component.name: {"code": "Apache-2.0", "data": "CDLA-Permissive-2.0", "document": "CC-BY-4.0"}[component.kind]
        for component in COMPONENTS
    }
    assert evaluate(release(ALL, own=right), "paper").level == 1
    assert (
        evaluate(
            release(ALL, own=right | dict.fromkeys(("Datasets", PAPER, REPORT, "Model card"), "unlicensed")), "paper"
        ).level
        == 1
    )
    assert evaluate(release(ALL, own=right | {"Training code": "CC-BY-4.0"}), "paper").level == 3, "licences must fit"
    assert evaluate(release(ALL, own=right | {"Datasets": "Apache-2.0"}), "paper").level == 1, "of data sets any may"
    conditional = evaluate(release(ALL, own=right | {"Model parameters (Final)": "MIT"}), "paper")
    assert conditional.level == 1
    assert any("conditional" in warning for warning in conditional.warnings)
    assert evaluate(release([name for name in ALL if name != REPORT], own=right), "paper").level == 0, "no paper for a report"


@pytest.mark.parametrize("profile", PROFILES)
@given(names=st.sets(st.sampled_from(list(BY_NAME))), extra=st.sampled_from(list(BY_NAME)), order=st.randoms())
def test_more_is_never_less_and_order_is_nothing(profile, names, extra, order):
    right = {
        component.name: {"code": "Apache-2.0", "data": "CDLA-Permissive-2.0", "document": "CC-BY-4.0"}[component.kind]
        for component in COMPONENTS
    }
    before = evaluate(release(sorted(names), own=right), profile)
    shuffled = sorted(names | {extra})
    order.shuffle(shuffled)
    after = evaluate(release(shuffled, own=right), profile)
    assert (after.level or 4) <= (before.level or 4)
    assert evaluate(release(sorted(shuffled), own=right), profile) == after


@pytest.mark.parametrize("target", [3, 2, 1])
def test_what_is_advised_is_enough_and_no_more(target):
    for missing in itertools.chain(itertools.combinations(ALL, 1), itertools.combinations(ALL, 2)):
        names = [name for name in ALL if name not in missing]
        told = [line.split(":")[0] for line in advise(release(names), target)]
        assert (evaluate(release(names + told)).level or 4) <= target
        for one in told:
            assert not 1 <= evaluate(release([name for name in names + told if name != one])).level <= target, (missing, one)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Apache 2.0", "Apache-2.0"), ("MIT license", "MIT"), ("BSD-3", "BSD-3-Clause"), ("apache license, version 2.0", "Apache-2.0"), ("CC BY 4.0", "CC-BY-4.0"),
        ("GPLv3", "GPL-3.0-only"), ("Creative Commons Attribution Share Alike 4.0 International", "CC-BY-SA-4.0"), ("cc0 1.0", "CC0-1.0"), ("what we say", ""),
    ],
)  # fmt: skip
def test_misspelt_licences_are_understood(text, meant):
    assert suggest(text) == meant


@pytest.mark.parametrize(
    ("text", "words"), [("Apache 2.0", "did you mean `Apache-2.0`"), ("MIT AND", "SPDX"), ("Llama-3", "LicenseRef")]
)
def test_unknown_licences_are_named(text, words):
    with pytest.raises(Problem) as caught:
        parse(text)
    assert words in f"{caught.value.what} {caught.value.fix}"


def test_licences_of_installed_packages_are_told_by_their_texts():
    """Of every installed package that states one known licence, its own text says the same."""
    from importlib.metadata import distributions

    told = {}
    for package in distributions():
        stated = package.metadata.get("License-Expression")
        files = [
            file
            for file in package.files or []
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) and "vendor" not in str(file)
        ]
        if stated in PHRASES and len(files) == 1:
            found = detect(package.locate_file(files[0]).read_text(errors="replace"))
            told[package.metadata["Name"]] = stated in found
    assert len(told) > 40
    wrong = [name for name, right in told.items() if not right]
    assert len(wrong) <= 0.03 * len(told), wrong


def test_exceptions_and_closing_words():
    assert is_open("Apache-2.0 WITH LLVM-exception")
    mit = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software " + " ".join(
        PHRASES["MIT"][0]
    )
    assert detect(mit) == ["MIT"]
    assert detect(mit + " Commons Clause License Condition") == []
    assert plain("MIT (non-commercial)").startswith("LicenseRef-")


def test_a_tuned_model_keeps_the_licence_of_its_base(tmp_path):
    """And does not prove what only its base could; what it learned of its own is no open data set."""
    base, folder = tmp_path / "base", tmp_path / "out"
    for place in (base, folder / "stages" / "00-curate", folder / "stages" / "01-sft"):
        place.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "stages" / "00-curate" / "manifest.json").write_text('{"method": "curate", "settings": {}}')
    (folder / "stages" / "00-curate" / "record.json").write_text('{"licences": {"a": "CC0-1.0"}}')
    for model, data in ((str(base), "mine.jsonl"), ("", "mine.jsonl"), ("", "exercises")):
        settings = {"model": model, "data": data, "steps": 2}
        (folder / "stages" / "01-sft" / "manifest.json").write_text(json.dumps({"method": "sft", "settings": settings}))
        found = gather(folder, Wish())
        assert found.base == ((str(base), "CC-BY-NC-4.0") if model else None)
        assert found.components[WEIGHTS].licence == ("CC-BY-NC-4.0" if model else None)
        datasets = found.components.get("Datasets")
        assert (datasets and datasets.licence) == (None if model else "unlicensed" if data == "mine.jsonl" else "CC0-1.0")

"""The openness class of a release: which components are there under which licence, and what the next class still needs.

Three profiles. ``mot`` is what the public evaluator computes, its faults included: an unknown name becomes the first component, a null licence inherits, PDDL-1.0 is closed, a closed
report is forgiven for an open paper. ``fixed`` is the same with the faults mended. ``paper`` takes the framework's text (by the evaluator's first version, of June 2024): licences must fit
their kind, some documents may have none, and no paper stands in for a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from duramen.problem import Problem
from duramen.registry import suggestion
from duramen.release.components import BY_NAME, COMPONENTS, LABELS, PAPER, REPORT, WEIGHTS, Component, required
from duramen.release.licences import FITTING, NONE, UNLICENSED, fits, is_open, open_to_the_evaluator, spdx, suggest

Profile = Literal["mot", "fixed", "paper"]
PROFILES: tuple[Profile, ...] = ("mot", "fixed", "paper")
Status = Literal["included", "missing", "unlicensed", "invalid"]
ANY_KIND = ("Datasets", "Sample model outputs")
WITHOUT = ("Datasets", PAPER, REPORT, "Model card", "Data card", "Evaluation results")
"""What the text of the framework accepts without a licence."""


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        profile: By which rules.
        level: 1, 2 or 3, the smaller the more open; 0 for none.
        progress: Percent of what a class needs, by class.
        statuses: Of every component that some class needs, and of optional ones that are listed.
        licences: Of every listed component, its own or inherited; None for none.
        warnings: What counts, but should be otherwise.
    """

    profile: Profile
    level: int
    progress: dict[int, float]
    statuses: dict[str, Status]
    licences: dict[str, str | None]
    warnings: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The class in words."""
        return LABELS[self.level]

    def badge(self, level: int) -> str:
        """``Qualified``, ``In progress (N%)`` or ``Not met``."""
        percent = self.progress[level]
        return "Qualified" if percent == 100 else f"In progress ({percent:.0f}%)" if percent else "Not met"


def evaluate(release: Mapping[str, Any], profile: Profile = "fixed") -> Verdict:
    """The class of a release.

    Args:
        release: The framework's ``release`` object: ``license`` by ``distribution``, ``code``, ``data`` and ``document``; ``components`` with ``name`` and perhaps ``license``.
        profile: By which rules.

    Raises:
        Problem: In all profiles but ``mot``: if a component is unknown, listed twice, or its licence null or unknown.
    """
    listed = _listed(release, profile)
    licences = {name: _licence(each, BY_NAME[name], release, profile) for name, each in listed.items()}
    warnings: list[str] = []
    statuses: dict[str, Status] = {}
    for component in COMPONENTS:
        if component.name in listed:
            statuses[component.name] = _status(component, licences[component.name], profile, warnings)
        elif component.required:
            statuses[component.name] = "missing"
    progress = {level: _progress(level, statuses, listed, profile) for level in (3, 2, 1)}
    level = next((each for each in (1, 2, 3) if progress[each] == 100), 0)
    return Verdict(profile, level, progress, statuses, licences, warnings)


def _listed(release: Mapping[str, Any], profile: Profile) -> dict[str, Mapping[str, Any]]:
    """The components of a release by their names.

    Raises:
        Problem: If a name is unknown or stands twice; the evaluator takes the first component for an unknown one, and the last of two.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for each in release.get("components") or []:
        name = str(each.get("name", ""))
        if profile == "mot":
            found[name if name in BY_NAME else COMPONENTS[0].name] = each
            continue
        if name not in BY_NAME:
            raise Problem(
                f"`{name}` is no component of the framework.", why="names must match to the letter.",
                fix=suggestion(name, BY_NAME) or f"one of {', '.join(BY_NAME)}.",
            )  # fmt: skip
        if name in found:
            raise Problem(
                f"`{name}` is listed twice.", why="its licence and its place must be one.", fix="take one of them out."
            )
        found[name] = each
    return found


def _licence(listed: Mapping[str, Any], component: Component, release: Mapping[str, Any], profile: Profile) -> str | None:
    """The licence of a component: its own, else the release's for its kind, else the distribution's; None for none.

    Raises:
        Problem: If it is null, which the evaluator takes for absent.
    """
    if "license" in listed and not (profile == "mot" and listed["license"] is None):
        own = listed["license"]
        if own is None:
            raise Problem(
                f"The licence of `{component.name}` is null.", why="it says neither that there is one nor that there is none.",
                fix=f'an SPDX id, or `license: {UNLICENSED}`, or no key, which inherits.',
            )  # fmt: skip
        return None if str(own).strip().lower() in NONE else str(own)
    whole = release.get("license") or {}
    for key in (component.kind, "distribution"):
        name = (whole.get(key) or {}).get("name")
        if name:
            return None if str(name).strip().lower() in NONE else str(name)
    return None


def _status(component: Component, licence: str | None, profile: Profile, warnings: list[str]) -> Status:
    """Whether a listed component counts; says what should be otherwise.

    Raises:
        Problem: If the licence is unknown, where the profile refuses that.
    """
    if licence is None:
        if profile == "paper" and component.name in WITHOUT:
            return "included"
        return "unlicensed"
    if profile == "mot":
        if not open_to_the_evaluator(licence):
            return "invalid"
        fitting = licence in FITTING[component.kind]
    else:
        if not is_open(licence):
            return "invalid"
        fitting = fits(licence, component.kind)
    if licence in spdx() and spdx()[licence].deprecated:
        warnings.append(f"{component.name}: {licence} is deprecated.")
    if profile == "paper" and not fitting and component.name not in ANY_KIND:
        if component.name != WEIGHTS or not fits(licence, "code"):
            return "invalid"
        warnings.append(f"{component.name}: {licence} is a licence of code; conditional.")
    elif not fitting:
        warnings.append(
            f"{component.name}: {licence} is open, and not meant for {'a ' if component.kind == 'document' else ''}{component.kind}."
        )
    return "included"


def _waived(statuses: Mapping[str, Status], listed: Mapping[str, Any], profile: Profile) -> bool:
    """Whether the paper stands in for the report: it is listed, and the report is not there (or, to the evaluator, not open)."""
    if profile == "paper" or PAPER not in listed:
        return False
    return statuses[REPORT] != "included" if profile == "mot" else statuses[REPORT] == "missing"


def _progress(level: int, statuses: Mapping[str, Status], listed: Mapping[str, Any], profile: Profile) -> float:
    """Percent of what a class needs that is there; 0 before the less open ones are complete."""
    waived = _waived(statuses, listed, profile)
    names: set[str] = set()
    total = 0
    for step in range(3, level - 1, -1):
        names |= set(required(step))
        total += len(required(step))
        wanted = (names - {REPORT}) | {PAPER} if waived else names
        included = sum(statuses[name] == "included" for name in wanted)
        if step == level:
            if level == 1 and waived and statuses[PAPER] == "included":
                total -= 1
            return min(100.0, 100 * included / total)
        if included < total:
            return 0.0
    raise AssertionError(level)


def advise(release: Mapping[str, Any], target: int, profile: Profile = "fixed") -> list[str]:
    """The fewest things that a release needs to reach a class; empty if it has.

    Args:
        release: As for ``evaluate``.
        target: 1, 2 or 3.
        profile: By which rules.
    """
    found = evaluate(release, profile)
    listed = {str(each.get("name")) for each in release.get("components") or []}
    needed = [name for level in range(3, target - 1, -1) for name in required(level)]
    short = [name for name in needed if found.statuses[name] != "included"]
    if REPORT in short and profile != "paper" and (target == 1 or PAPER in listed) and found.statuses[REPORT] == "missing":
        short.remove(REPORT)  # the paper, which is needed or there, stands in for it
        if PAPER not in short and found.statuses[PAPER] != "included":
            short.append(PAPER)
    return [_fix(name, found) for name in short]


def _fix(name: str, found: Verdict) -> str:
    status, component = found.statuses[name], BY_NAME[name]
    if status == "missing":
        return f"{name}: add it ({component.holds})."
    if status == "unlicensed":
        return f"{name}: give it a licence, for instance {_usual(component)}."
    licence = found.licences[name] or ""
    near = suggest(licence) if licence not in spdx() else ""
    return f"{name}: `{licence}` is not open; {f'did you mean {near}?' if near else f'for instance {_usual(component)}.'}"


def _usual(component: Component) -> str:
    return {"code": "Apache-2.0", "data": "CDLA-Permissive-2.0", "document": "CC-BY-4.0"}[component.kind]

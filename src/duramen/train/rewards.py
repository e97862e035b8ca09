"""Rewards that a rule decides: plain functions of an answer and what is expected of it."""

from __future__ import annotations

import re
from collections.abc import Callable

from duramen.problem import need

Reward = Callable[[str, str], float]


def exact(answer: str, expected: str) -> float:
    """1 for the expected text, without blank ends."""
    return float(answer.strip() == expected.strip())


def near(answer: str, expected: str) -> float:
    """1 for the expected text, else at most a half: the share of it that the answer begins with."""
    answer, expected = answer.strip(), expected.strip()
    same = next(
        (place for place, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), min(len(answer), len(expected))
    )
    return 1.0 if answer == expected else 0.5 * same / max(len(expected), len(answer), 1)


def number(answer: str, expected: str) -> float:
    """1 if the last number of the answer is the expected one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return float(bool(found) and float(found[-1].replace(",", "")) == float(expected.replace(",", "")))


def pattern(answer: str, expected: str) -> float:
    """1 if the whole answer matches the expected regular expression."""
    return float(re.fullmatch(expected, answer.strip(), re.DOTALL) is not None)


def mathematics(answer: str, expected: str) -> float:
    """1 if math-verify holds the two for the same expression."""
    need("The reward `mathematics`", "math_verify", install="math-verify")
    from math_verify import parse, verify

    return float(verify(parse(expected), parse(answer)))


REWARDS: dict[str, Reward] = {each.__name__: each for each in (exact, near, number, pattern, mathematics)}

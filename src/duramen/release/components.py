"""The Model Openness Framework (arXiv 2403.13784; version 1.0 of 2024-12-15) as data: what a release consists of, and what each class needs.

Class III (Open Model) needs six components, class II (Open Tooling Model) four more, class I (Open Science Model) four more again; the others count for nothing. Names are those of
the public evaluator, and must match to the letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["code", "data", "document"]
FRAMEWORK = {"name": "Model Openness Framework", "version": "1.0", "date": "2024-12-15"}
LABELS = {
    1: "Class I - Open Science Model", 2: "Class II - Open Tooling Model", 3: "Class III - Open Model", 0: "Unclassified",
}  # fmt: skip
REPORT, PAPER, WEIGHTS = "Technical report", "Research paper", "Model parameters (Final)"


@dataclass(frozen=True)
class Component:
    """One part of a release.

    Attributes:
        number: In the evaluator's data.
        name: To the letter.
        kind: Which licences fit.
        level: Least open class that it belongs to: 3, 2 or 1.
        required: Whether that class needs it.
        holds: What it must hold, in our words.
    """

    number: int
    name: str
    kind: Kind
    level: int
    required: bool
    holds: str


COMPONENTS = (
    Component(9, "Model architecture", "code", 3, True, "readable code of the model, and its configuration"),
    Component(16, "Data preprocessing code", "code", 1, True, "what cleans, deduplicates and tokenizes the data"),
    Component(7, "Training code", "code", 2, True, "all stages of training, so that they run"),
    Component(8, "Inference code", "code", 2, True, "what loads the model and generates"),
    Component(18, "Evaluation code", "code", 2, True, "what gives the reported figures"),
    Component(22, "Supporting libraries and tools", "code", 2, False, "what it is built on"),
    Component(10, WEIGHTS, "data", 3, True, "the weights"),
    Component(24, "Model parameters (Intermediate)", "data", 1, True, "weights of milestones on the way"),
    Component(15, "Datasets", "data", 1, True, "what was learned, chosen by and measured on"),
    Component(19, "Evaluation data", "data", 2, True, "the data behind the reported figures"),
    Component(17, "Model metadata", "data", 1, False, "configuration, logs and states of the run"),
    Component(20, "Sample model outputs", "document", 3, False, "what the model says"),
    Component(13, "Model card", "document", 3, True, "figures, use and limits"),
    Component(14, "Data card", "document", 3, True, "sources, properties and treatment of the data"),
    Component(11, REPORT, "document", 3, True, "what the model can do and how to use it"),
    Component(21, PAPER, "document", 1, True, "how it was made and what it can do"),
    Component(12, "Evaluation results", "document", 3, True, "the figures"),
)
BY_NAME = {component.name: component for component in COMPONENTS}


def required(level: int) -> list[str]:
    """Names that a class needs beyond the less open ones."""
    return [component.name for component in COMPONENTS if component.required and component.level == level]

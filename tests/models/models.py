"""Small models of every kind, with torch alone: importing a family enters its models into PROBLEMS."""

from tests.models import (
    adaptation,
    dense,
    generative,
    graphs,
    representation,
    scientific,
    semantics,
    sequence,
    tabular,
    vision,
)
from tests.models.registry import PROBLEMS

FAMILIES = (
    dense, tabular, vision, sequence, graphs, scientific, generative, representation, adaptation, semantics,
)  # fmt: skip

__all__ = ["FAMILIES", "PROBLEMS"]

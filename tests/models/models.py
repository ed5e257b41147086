"""Small models of every kind, with torch alone: importing a family enters its models into PROBLEMS."""

from tests.models import dense, generative, graphs, representation, scientific, semantics, sequence, vision
from tests.models.registry import PROBLEMS

FAMILIES = (dense, vision, sequence, graphs, scientific, generative, representation, semantics)

__all__ = ["FAMILIES", "PROBLEMS"]

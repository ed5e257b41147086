"""Operators that other libraries define and that no backward of theirs says enough about.

None of the libraries need be installed: an operator is registered once it exists, before a model is captured.
"""

from __future__ import annotations

import torch

from fomoh_fx.rules.bilinear import grouped_mm
from fomoh_fx.rules.regions import RULES as REGIONS
from fomoh_fx.rules.registry import KINDS, Composite, Rule, overloads, register

_RULES: dict[str, tuple[Rule | Composite, str]] = {
    **REGIONS,
    "transformers::grouped_mm_fallback": (grouped_mm, "bilinear"),  # its backward has no derivative
}
_waiting = set(_RULES)


def register_present() -> None:
    """Register the operators whose library was imported since the last call."""
    for name in sorted(_waiting):
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            register([op for op in overloads(packet) if op not in KINDS], *_RULES[name])  # but for a user's own rule
            _waiting.discard(name)

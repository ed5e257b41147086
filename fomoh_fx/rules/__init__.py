"""The differentiation rules, one file per kind; importing this package fills the registry."""

from fomoh_fx.rules import random as _random  # noqa: F401  registers
from fomoh_fx.rules.bilinear import bilinear
from fomoh_fx.rules.elementwise import elementwise, gated
from fomoh_fx.rules.fallback import from_jvp
from fomoh_fx.rules.linear import constant, linear
from fomoh_fx.rules.registry import Composite, register_rule, supported_ops

__all__ = ["Composite", "bilinear", "constant", "elementwise", "from_jvp", "gated", "linear", "register_rule", "supported_ops"]

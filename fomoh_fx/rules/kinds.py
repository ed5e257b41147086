"""The kinds of rules, for ``fomoh_fx.register_rule``."""

from fomoh_fx.rules.bilinear import bilinear
from fomoh_fx.rules.elementwise import elementwise, gated
from fomoh_fx.rules.fallback import from_jvp
from fomoh_fx.rules.linear import constant, linear
from fomoh_fx.rules.registry import Composite

__all__ = ["Composite", "bilinear", "constant", "elementwise", "from_jvp", "gated", "linear"]

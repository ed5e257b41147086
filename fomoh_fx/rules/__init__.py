"""The differentiation rules, one file per kind; importing this package fills the registry."""

from fomoh_fx.rules import activations as _activations  # noqa: F401  registers
from fomoh_fx.rules import attention as _attention  # noqa: F401  registers
from fomoh_fx.rules import complex as _complex  # noqa: F401  registers
from fomoh_fx.rules import control_flow as _control_flow  # noqa: F401  registers
from fomoh_fx.rules import embedding_bag as _embedding_bag  # noqa: F401  registers
from fomoh_fx.rules import indexing as _indexing  # noqa: F401  registers
from fomoh_fx.rules import joint as _joint  # noqa: F401  registers
from fomoh_fx.rules import linalg as _linalg  # noqa: F401  registers
from fomoh_fx.rules import norm as _norm  # noqa: F401  registers
from fomoh_fx.rules import random as _random  # noqa: F401  registers
from fomoh_fx.rules import recurrent as _recurrent  # noqa: F401  registers
from fomoh_fx.rules import reduction as _reduction  # noqa: F401  registers
from fomoh_fx.rules import resampling as _resampling  # noqa: F401  registers
from fomoh_fx.rules import scan as _scan  # noqa: F401  registers
from fomoh_fx.rules import scatter_reduce as _scatter_reduce  # noqa: F401  registers
from fomoh_fx.rules import selection as _selection  # noqa: F401  registers
from fomoh_fx.rules import softmax as _softmax  # noqa: F401  registers
from fomoh_fx.rules.bilinear import bilinear
from fomoh_fx.rules.elementwise import elementwise, gated
from fomoh_fx.rules.fallback import from_jvp
from fomoh_fx.rules.linear import constant, linear
from fomoh_fx.rules.registry import Composite, register_rule, supported_ops

__all__ = ["Composite", "bilinear", "constant", "elementwise", "from_jvp", "gated", "linear", "register_rule", "supported_ops"]

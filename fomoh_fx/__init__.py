"""Second-order forward-mode automatic differentiation for PyTorch, by source transformation."""

from fomoh_fx import optim
from fomoh_fx.differential import grad, hessian, hessian_diagonal, hvp, laplacian, quadratic_form
from fomoh_fx.errors import ArgumentError, CaptureError, FomohError, SpecialisationError, UnsupportedOpError
from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.low_rank import LowRank
from fomoh_fx.rules import library as _library  # noqa: F401  fills the registry
from fomoh_fx.rules.registry import register_rule, supported_ops
from fomoh_fx.transform import HyperDualModule, compile, transform

__all__ = [
    "ArgumentError", "CaptureError", "FomohError", "HyperDual", "HyperDualModule", "LowRank", "SpecialisationError",
    "UnsupportedOpError", "compile", "grad", "hessian", "hessian_diagonal", "hvp", "laplacian", "optim",
    "quadratic_form", "register_rule", "supported_ops", "transform",
]  # fmt: skip

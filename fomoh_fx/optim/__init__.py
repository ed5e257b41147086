"""Optimizers that train with forward passes only; see :class:`ForwardOptimizer` for what they share."""

from fomoh_fx.optim.adaptive import LevenbergMarquardt
from fomoh_fx.optim.base import ForwardOptimizer
from fomoh_fx.optim.fgd import FGD
from fomoh_fx.optim.fomoh import FoMoH
from fomoh_fx.optim.fomoh_bp import FoMoHBP
from fomoh_fx.optim.fomoh_kd import FoMoHKD
from fomoh_fx.optim.newton import Newton
from fomoh_fx.optim.record import StepRecord
from fomoh_fx.optim.trust_region import TrustRegion

__all__ = [
    "FGD",
    "FoMoH",
    "FoMoHBP",
    "FoMoHKD",
    "ForwardOptimizer",
    "LevenbergMarquardt",
    "Newton",
    "StepRecord",
    "TrustRegion",
]

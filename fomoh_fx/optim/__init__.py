"""Optimizers that train with forward passes only; see :class:`ForwardOptimizer` for what they share."""

from fomoh_fx.optim.base import ForwardOptimizer
from fomoh_fx.optim.fgd import FGD
from fomoh_fx.optim.fomoh import FoMoH
from fomoh_fx.optim.fomoh_kd import FoMoHKD

__all__ = ["FGD", "FoMoH", "FoMoHKD", "ForwardOptimizer"]

"""Losses whose derivatives at special points are not those of PyTorch's decompositions, and cross entropy whole.

A decomposed smooth_l1_loss goes through |x - t|, whose second derivative at 0 is lost; a decomposed
binary_cross_entropy clamps logarithms where reverse mode clamps a denominator; a decomposed multilabel_margin_loss also
counts what comes after the last label. Reductions are PyTorch's numbers. Other losses are decomposed by PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, primal_of
from fomoh_fx.rules.derivation import Formula
from fomoh_fx.rules.elementwise import expand
from fomoh_fx.rules.precision import wide
from fomoh_fx.rules.reduction import each, from_right
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten
NONE, MEAN, SUM = range(3)


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == NONE else loss.mean() if reduction == MEAN else loss.sum()


# Negative log-likelihood: what is ignored is selected away, so that nothing undefined leaks from it.


def _nll(
    logs: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """-logs at the target's class, times the class's weight, and the total weight, for classes in dimension 1 or 0."""
    dim = min(logs.ndim - 1, 1)
    kept = target != ignore_index
    index = aten.where.ScalarOther(kept, target, 0)
    loss = -logs.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    total = kept.sum().to(logs.dtype)
    if weight is not None:
        weights = aten.where.ScalarOther(kept, weight.index_select(0, index.reshape(-1)).reshape(index.shape), 0.0)
        loss, total = loss * weights, weights.sum()
    loss = aten.where.ScalarOther(kept, loss, 0.0)
    if reduction == NONE:
        return loss, torch.zeros_like(total)
    return loss.sum() / total if reduction == MEAN else loss.sum(), total


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """-sum_k p_k weight_k log_softmax(x)_k, p the target's class or probabilities mixed with equal ones."""
    dim = min(x.ndim - 1, 1)
    logs = torch.log_softmax(x, dim)
    if target.is_floating_point():
        return _cross_entropy_of_probabilities(logs, target, weight, reduction, label_smoothing, dim)
    loss, total = _nll(logs, target, weight, reduction, ignore_index)
    if label_smoothing == 0:
        return loss
    equal = -_weighted(logs, weight, dim).sum(dim)
    equal = aten.where.ScalarOther(target != ignore_index, equal, 0.0)
    if reduction != NONE:
        equal = equal.sum() / total if reduction == MEAN else equal.sum()
    return loss * (1 - label_smoothing) + equal * (label_smoothing / x.shape[dim])


def _cross_entropy_of_probabilities(
    logs: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float, dim: int
) -> Tensor:
    classes = logs.shape[dim]
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / classes
    loss = -_weighted(logs * target, weight, dim).sum(dim)
    return _reduced(loss, reduction)


def _weighted(x: Tensor, weight: Tensor | None, dim: int) -> Tensor:
    return x if weight is None else x * weight.reshape(-1, *[1] * (x.ndim - 1 - dim))


def _multilabel_margin(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """sum max(0, 1 - x_t + x_c) / C over the labels t before the first -1 and the classes c that are none of them."""
    if x.ndim == 0:
        x, target = x.reshape(1), target.reshape(1)
    classes = torch.arange(x.shape[-1], device=x.device)
    valid = (target < 0).cumsum(-1) == 0
    index = aten.where.ScalarOther(valid, target, 0)
    is_target = ((index.unsqueeze(-1) == classes) & valid.unsqueeze(-1)).any(-2)
    margin = 1 - x.gather(-1, index).unsqueeze(-1) + x.unsqueeze(-2)
    counted = valid.unsqueeze(-1) & is_target.logical_not().unsqueeze(-2) & (margin > 0)
    loss = aten.where.ScalarOther(counted, margin, 0.0).sum((-2, -1)) / x.shape[-1]
    return _reduced(loss, reduction), is_target.to(x.dtype)


def _multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    return _multilabel_margin(x, target, reduction)[0]


# Losses of a difference, quadratic near zero.


def _smooth_l1(x: Tensor, target: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    """d^2 / (2 beta) for |d| < beta, otherwise |d| - beta / 2, with d = x - target."""
    d = wide(x) - wide(target)
    loss = torch.where(d.abs() < beta, d * d * 0.5 / beta, d.abs() - 0.5 * beta)
    return _reduced(loss, reduction).to(torch.result_type(x, target))


def _huber(x: Tensor, target: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """d^2 / 2 for |d| < delta, otherwise delta (|d| - delta / 2), with d = x - target."""
    d = wide(x) - wide(target)
    loss = torch.where(d.abs() < delta, d * d * 0.5, (d.abs() - 0.5 * delta) * delta)
    return _reduced(loss, reduction).to(torch.result_type(x, target))


# Binary cross entropy: -(w log x + (1 - w) log(1 - x)), the logarithms at least -100, the denominator at least 1e-12.

_SPREAD = "Piecewise((x*(1 - x), x*(1 - x) > 1e-12), (1e-12, True))"
_LOG = "Piecewise((log(x), log(x) > -100), (-100, True))"
_LOG_OTHER = "Piecewise((log1p(-x), log1p(-x) > -100), (-100, True))"
BINARY_CROSS_ENTROPY = Formula(
    "",
    (f"(x - w)/{_SPREAD}", f"{_LOG_OTHER} - {_LOG}"),
    (f"(x**2 - 2*x*w + w)/{_SPREAD}**2", f"-1/{_SPREAD}", "0"),
)


def _binary_cross_entropy(
    op: Any, components: Components, x: Any, target: Any, weight: Any = None, reduction: int = MEAN
) -> HyperDual:
    if isinstance(weight, HyperDual):
        raise UnsupportedOpError("no derivative in its argument 'weight' is known")
    y = op(*primal_of((x, target)), weight, NONE)
    loss = expand(BINARY_CROSS_ENTROPY, op, components, y, [x, target])
    if weight is not None:
        loss = HyperDual(y, *each(lambda p: p * weight, loss))
    if reduction == NONE or y.ndim == 0:
        return loss
    over = from_right(y)
    parts = each(lambda p: p.mean(over) if reduction == MEAN else p.sum(over), loss)
    return HyperDual(_reduced(y, reduction), *parts)


register(aten.cross_entropy_loss.default, Composite(_cross_entropy))
register([aten.nll_loss_forward.default, aten.nll_loss2d_forward.default], Composite(_nll))
register(aten.multilabel_margin_loss_forward.default, Composite(_multilabel_margin))
register(aten.multilabel_margin_loss.default, Composite(_multilabel_margin_loss))
register(aten.smooth_l1_loss.default, Composite(_smooth_l1))
register(aten.huber_loss.default, Composite(_huber))
register(aten.binary_cross_entropy.default, _binary_cross_entropy, "elementwise")

"""Functions whose implementation in PyTorch branches on what their result does not need: data, or ``requires_grad``.

A frontend cannot trace them, or assumes too much; while a model is captured, the same mathematics runs in their place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.capture.equality import equal
from fomoh_fx.capture.packed import of_packed


def _covariance(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """sum_n w_n (x_n - mean)(x_n - mean)^H / (sum w - correction); without weights every w is one."""
    x = input if input.ndim == 2 else input.reshape(1, input.numel())
    weight = _product(fweights, aweights)
    if weight is None:
        x = x - x.mean(1, keepdim=True)
        return (x @ x.mH / max(x.shape[1] - correction, 0)).squeeze()
    total = weight.sum()
    x = x - ((x * weight).sum(1) / total).unsqueeze(1)
    lost = correction if aweights is None or correction == 0 else correction * (weight * aweights).sum() / total
    return (x @ (x * weight).mH / (total - lost).clamp_min(0)).squeeze()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a * b


def _correlation(input: Tensor) -> Tensor:
    """The covariance over the standard deviations, between -1 and 1 in each part."""
    covariance = _covariance(input)
    if covariance.ndim == 0:
        return covariance / covariance
    variance = covariance.diagonal()
    deviation = (variance.real if variance.is_complex() else variance).sqrt()
    c = covariance / deviation.unsqueeze(1) / deviation.unsqueeze(0)
    return torch.complex(c.real.clip(-1, 1), c.imag.clip(-1, 1)) if c.is_complex() else c.clip(-1, 1)


def _combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """Every choice of r elements, in order."""
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    chosen = [index for choice in choose(range(input.shape[0]), r) for index in choice]
    return input[torch.tensor(chosen, dtype=torch.int64, device=input.device)].reshape(len(chosen) // max(r, 1), r)


def _masked_select(input: Tensor, mask: Tensor) -> Tensor:
    """An index: of that a frontend knows the size where the mask is known, and bounds it by the broadcast input's."""
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask]


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """The chunked form computes a gradient beforehand, for those inputs that require one."""
    return torch.nn.functional.linear_cross_entropy(*args, **kwargs)


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """log(var) / 2 + (input - target)^2 / (2 var), without the check that no variance is negative.

    As in PyTorch the variance is clamped in its value only: its derivative goes on.
    """
    if not isinstance(var, Tensor):
        var = var * torch.ones_like(input)
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif input.ndim != var.ndim or sum(b for a, b in zip(input.shape, var.shape, strict=True) if a != b) != 1:
            raise ValueError("var is of incorrect size")
    var = torch.ops.fomoh_fx.with_value.default(var, var.clamp(min=eps))
    loss = 0.5 * (var.log() + (input - target) ** 2 / var) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return _reduced(loss, reduction)


def _reduced(loss: Tensor, reduction: str | int) -> Tensor:
    if reduction in ("mean", 1):
        return loss.mean()
    return loss.sum() if reduction in ("sum", 2) else loss


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Minus the logarithm of the probability of all alignments, by the forward recursion over time.

    With the labels l between blanks and a_0 = p_0 on the first two states: a_t(s) = p_t(l_s) (a_{t-1}(s) + a_{t-1}(s-1)
    + a_{t-1}(s-2) where l_s is no blank and not l_{s-2}), in logarithms. Lengths are masks, so they stay data.
    """
    batched = log_probs.ndim == 3
    x = log_probs if batched else log_probs.unsqueeze(1)
    steps, count, _ = x.shape
    times, lengths = (
        torch.as_tensor(n, dtype=torch.int64, device=x.device).reshape(-1) for n in (input_lengths, target_lengths)
    )
    if targets.ndim == 2 or not batched:
        labels = targets.reshape(count, targets.shape[-1]).to(torch.int64)
    else:  # one after the other: each has at most all of them
        at = (lengths.cumsum(0) - lengths).unsqueeze(1) + torch.arange(targets.shape[0], device=x.device)
        labels = targets.to(torch.int64)[at.clamp(max=max(targets.shape[0] - 1, 0))]
    blanks = torch.full_like(labels, blank)
    states = torch.cat([torch.stack([blanks, labels], 2).flatten(1), blanks[:, :1]], 1) if labels.shape[1] else (
        torch.full((count, 1), blank, device=x.device)
    )  # fmt: skip
    place = torch.arange(states.shape[1], device=x.device)
    used = place <= 2 * lengths.unsqueeze(1)
    skips = torch.nn.functional.pad((states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2]), (2, 0))
    impossible = -1e30  # finite, so that no derivative of it is undefined
    emitted = x.gather(2, states.where(used, blank).expand(steps, -1, -1))
    a = emitted[0].where((place < 2) & used, impossible)
    for t in range(1, steps):
        before = torch.nn.functional.pad(a, (2, 0), value=impossible)
        reached = torch.logaddexp(before[:, 2:], before[:, 1:-1])
        reached = torch.logaddexp(reached, before[:, :-2].where(skips, impossible)) + emitted[t]
        a = reached.where((t < times).unsqueeze(1) & used, a)
    last = a.where((place >= 2 * lengths.unsqueeze(1) - 1) & used, impossible).logsumexp(1)
    infinite = last < impossible / 2
    loss = (-last).where(~infinite, 0.0 if zero_infinity else math.inf)
    if reduction in ("mean", 1):
        return (loss / lengths.clamp(min=1)).mean()
    loss = _reduced(loss, reduction)
    return loss if batched or loss.ndim == 0 else loss.squeeze(0)


def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """The solution A^+ B; residuals and singular values as each driver gives them for a matrix of full rank."""
    driver = driver or ("gels" if A.is_cuda else "gelsy")
    vector = B.ndim == 1 or B.shape == A.shape[:-1]
    right = B.unsqueeze(-1) if vector else B
    solution = torch.linalg.pinv(A, rtol=rcond) @ right
    nothing = A.real.new_zeros(0) if A.is_complex() else A.new_zeros(0)
    error = right - A @ solution
    squares = (error * error.conj()).real if A.is_complex() else error.square()
    residuals = squares.sum(-2) if A.shape[-2] > A.shape[-1] and driver != "gelsy" else nothing
    rank = torch.linalg.matrix_rank(A) if driver != "gels" else nothing.to(torch.int64)
    values = torch.linalg.svdvals(A).detach() if driver in ("gelsd", "gelss") else nothing
    solution = solution.squeeze(-1) if vector else solution
    return torch.return_types.linalg_lstsq((solution, residuals, rank, values))  # type: ignore[attr-defined]


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """With probability one nothing is drawn: the product with zero."""
    if p != 1 or not training:
        return torch.nn.functional.dropout(input, p, training, inplace)
    return input.mul_(0) if inplace else input.mul(0)


def _make_dual(tensor: Tensor, tangent: Tensor, level: int) -> Tensor:
    """As of a copy: the tangent of a view is laid out in a tangent of what it is a view of."""
    return torch._VF._make_dual(tensor.clone() if tensor._is_view() else tensor, tangent, level)


_BODIES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.cov: _covariance,
    torch.Tensor.cov: _covariance,
    torch.corrcoef: _correlation,
    torch.Tensor.corrcoef: _correlation,
    torch.combinations: _combinations,
    torch.masked_select: _masked_select,
    torch.Tensor.masked_select: _masked_select,
    torch.nn.functional.gaussian_nll_loss: _gaussian_nll_loss,
    torch.nn.functional.ctc_loss: _ctc_loss,
    torch.ctc_loss: _ctc_loss,
    torch.nn.functional.dropout: dropout,
    torch.equal: equal,
    torch.Tensor.equal: equal,
    torch.linalg.lstsq: _lstsq,
    torch._VF._make_dual: _make_dual,
}
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # since torch 2.13
    _BODIES[torch.nn.functional.linear_cross_entropy] = _linear_cross_entropy


def traceable(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function, or its body for floating-point tensors where PyTorch's own cannot be traced."""
    function = of_packed(function, args)
    floating = args and isinstance(args[0], Tensor) and (args[0].is_floating_point() or args[0].is_complex())
    return _BODIES.get(function, function) if floating else function

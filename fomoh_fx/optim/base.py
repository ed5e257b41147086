"""What all optimizers share: a step along K directions, its parameter groups, its state, and how it survives a NaN.

    theta <- theta + lr sum_i kappa_i v_i

A subclass says which second-order components it needs and how the coefficients kappa follow from the slopes
g_i = v_i . grad f and the curvatures v_i^T H v_j.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fomoh_fx import lower
from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual, SecondOrder
from fomoh_fx.optim.directions import Batch, RandomDirections, Stacks
from fomoh_fx.optim.skipped import SkippedSteps
from fomoh_fx.seeds import selected_parameters
from fomoh_fx.transform import Curvature, HyperDualModule


class ForwardOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that needs forward passes only.

    Args:
        hd: what :func:`fomoh_fx.transform` or :func:`fomoh_fx.compile` returned. Where its ``second_order`` is not
            the one that this optimizer needs, the optimizer makes one that has it, from the same model and loss.
        directions: where the steps look.
        params: parameters, or groups of them with options of their own, as for every optimizer of ``torch.optim``;
            None for all that ``hd.wrt`` selects. Parameters in no group are left alone, and so are frozen ones
            (``requires_grad`` False).
        lr: each group's own scales that group's part of the step.
        weight_decay: decoupled, theta <- (1 - lr weight_decay) theta.
        curvature: the one that is needed; None for that of ``hd``.
    """

    second_order: ClassVar[SecondOrder]
    judges: bool = False  #: whether a step is looked at again after it was made, and may be taken back

    def __init__(
        self,
        hd: HyperDualModule,
        directions: RandomDirections,
        *,
        params: Iterable[Any] | None = None,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        curvature: Curvature | None = None,
    ) -> None:
        self.hd = fitted(hd, self.second_order, curvature)
        self.directions = directions
        self._skipped = SkippedSteps()
        at_least_zero("lr", lr)
        at_least_zero("weight_decay", weight_decay)
        super().__init__(self._groups(params), {"lr": lr, "weight_decay": weight_decay})

    @abstractmethod
    def coefficients(self, value: HyperDual) -> Tensor:
        """kappa [K], from the loss with its components; non-finite where there is no step."""

    @torch.no_grad()
    def step(self, *args: Any, targets: Sequence[Any] | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            args, kwargs: the model's own arguments.
            targets: what the loss takes after the model's output.

        Returns:
            The loss before the step. Where it, a derivative or the step is not finite, the parameters stay as they
            are and the step is counted in :attr:`skipped`.
        """
        batch = Batch(args, kwargs, tuple(targets or ()))
        directions = self.directions.propose(self._trained(), batch)
        value = self.evaluate(directions, batch, targets)
        loss = scalar_of(value)
        kappa = self.coefficients(value)
        steps = {name: torch.tensordot(kappa.to(v), v, 1) for name, v in directions.items()}
        valid = _all_finite(
            [loss, value.tangent, kappa, *([] if value.cross is None else [value.cross]), *steps.values()]
        )
        before = [p.clone() for p in self._trained().values()] if self.judges else []
        moved = self._move(steps, valid)
        if self.judges:
            stays = self.accepts(batch, value, kappa)
            moved = self._taken_back(before, moved, stays)
        self.directions.observe(directions, moved)
        self._skipped.count(~valid)
        return loss

    def evaluate(self, directions: Stacks, batch: Batch, targets: Sequence[Any] | None) -> HyperDual:
        """The loss with its components along the directions."""
        return self.hd(*batch.args, tangents=directions, targets=targets, **batch.kwargs)

    def accepts(self, batch: Batch, value: HyperDual, kappa: Tensor) -> Tensor:
        """Whether the step that was just made stays, where the optimizer ``judges``: a 0-dim bool."""
        raise NotImplementedError

    def _taken_back(self, before: Sequence[Tensor], moved: Stacks, stays: Tensor) -> Stacks:
        """The parameters as they were unless the step stays; the change that is left."""
        for p, old in zip(self._trained().values(), before, strict=True):
            p.copy_(torch.where(stays.to(p.device), p, old))
        return {name: torch.where(stays.to(v.device), v, 0) for name, v in moved.items()}

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far; reading it waits for the device."""
        return self._skipped.total

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be the model's, and ``hd.wrt`` must select them."""
        group = {**param_group, "params": self._named(param_group["params"])}
        for option in ("lr", "weight_decay"):
            at_least_zero(option, group.get(option, 0.0))
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The groups, the directions' random state, and the number of skipped steps."""
        return {**super().state_dict(), "directions": self.directions.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken."""
        super().load_state_dict(dict(state_dict))
        self.directions.load_state_dict(state_dict["directions"])
        self._skipped.restore(state_dict["skipped"])

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters that move, by name."""
        trained = {name: p for _, name, p in self._members() if p.requires_grad}
        if not trained:
            raise ArgumentError("params: none of the parameters has requires_grad=True, so there is nothing to train")
        return trained

    def _members(self) -> Iterable[tuple[dict[str, Any], str, nn.Parameter]]:
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield group, name, p

    def _move(self, steps: Stacks, valid: Tensor) -> Stacks:
        """Apply the steps where they are valid; the change of every parameter, weight decay left out."""
        moved = {}
        for group, name, p in self._members():
            if name not in steps:
                continue
            here = valid.to(p.device)
            if group["weight_decay"]:
                p.mul_(torch.where(here, 1 - group["lr"] * group["weight_decay"], 1).to(p))
            moved[name] = torch.where(here, steps[name], 0) * group["lr"]
            p.add_(moved[name])
        return moved

    def _groups(self, params: Iterable[Any] | None) -> list[dict[str, Any]]:
        chosen = list(self._selected().values() if params is None else params)
        if chosen and isinstance(chosen[0], dict):
            return chosen
        return [{"params": chosen}]

    def _selected(self) -> dict[str, nn.Parameter]:
        chosen = selected_parameters(self.hd.module, self.hd.wrt)
        return {name: p for name, p in chosen.items() if p.is_floating_point() or p.is_complex()}

    def _named(self, params: Any) -> list[tuple[str, nn.Parameter]]:
        """The parameters with their names in the model."""
        names = {id(p): name for name, p in self._selected().items()}
        if isinstance(params, set):
            raise ArgumentError("params: a set has no order, so directions would not be reproducible; give a list")
        named: list[tuple[str, nn.Parameter]] = []
        entries: Iterable[Any] = [params] if isinstance(params, Tensor) else params
        for entry in entries:
            p = entry[1] if isinstance(entry, tuple) else entry
            if id(p) not in names:
                raise ArgumentError("params: there is one that is not among the model's parameters that hd.wrt selects")
            named.append((names[id(p)], p))
        return named


def fitted(hd: Any, second_order: SecondOrder, curvature: Curvature | None = None) -> HyperDualModule:
    """The module itself where it has these second-order components, otherwise one that has, lowered alike."""
    module = getattr(hd, "_orig_mod", hd)  # what torch.compile(hd) wraps
    if not isinstance(module, HyperDualModule):
        raise ArgumentError(f"hd: expected the result of fomoh_fx.transform, got {type(hd).__name__}")
    if module.wrt == "inputs":
        raise ArgumentError('hd: was transformed with wrt="inputs"; training needs derivatives in the parameters')
    curvature = curvature or module.curvature
    if module is hd and (module.second_order, module.curvature) == (second_order, curvature):
        return module
    made = HyperDualModule(module.model, module.loss, wrt=module.wrt, second_order=second_order, curvature=curvature)
    made.lowering = module.lowering if module is hd else lower.inductor
    return made


def scalar_of(value: HyperDual) -> Tensor:
    """The loss.

    Raises:
        ArgumentError: it is not one real number.
    """
    loss = value.primal
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        what = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"hd: the model returns {what}, which is no scalar loss; give transform a loss=")
    return loss


def at_least_zero(name: str, value: Any) -> None:
    """Raise an ArgumentError that begins with ``name`` unless the value is a finite number of at least zero."""
    if not isinstance(value, (int, float, Tensor)) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name}: expected a finite number of at least 0, got {value!r}")


def _all_finite(values: Sequence[Tensor]) -> Tensor:
    """Whether every element is finite: a 0-dim tensor on the first one's device."""
    return torch.stack([v.isfinite().all().to(values[0].device) for v in values]).all()

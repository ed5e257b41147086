"""What all optimizers share: a step along K directions, its parameter groups, its state, and how it survives a NaN.

    theta <- theta + lr sum_i kappa_i v_i

A subclass says which second-order components it needs and how the coefficients kappa follow from the slopes
g_i = v_i . grad f and the curvatures v_i^T H v_j.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fomoh_fx import lower
from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual, SecondOrder
from fomoh_fx.optim.directions import Batch, Directions
from fomoh_fx.optim.record import StepRecord
from fomoh_fx.optim.replay import Replay
from fomoh_fx.optim.samplers import Stacks
from fomoh_fx.optim.skipped import SkippedSteps
from fomoh_fx.optim.snapshot import State
from fomoh_fx.optim.update import Update
from fomoh_fx.seeds import selected_parameters
from fomoh_fx.transform import Curvature, HyperDualModule


class Options(TypedDict, total=False):
    """What every optimizer takes; :class:`ForwardOptimizer` says what it means."""

    params: Iterable[Any] | None
    weight_decay: float
    largest_rise: float | None
    diagnostics: bool


class ForwardOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that needs forward passes only.

    Args:
        hd: what :func:`fomoh_fx.transform` or :func:`fomoh_fx.compile` returned. Where its ``second_order`` is not
            the one that this optimizer needs, the optimizer makes one that has it, from the same model and loss.
        directions: where the steps look.
        lr: each group's own scales that group's part of the step.
        curvature: the one that is needed; None for that of ``hd``.
        params: parameters, or groups of them with options of their own, as for every optimizer of ``torch.optim``;
            None for all that ``hd.wrt`` selects. Parameters in no group are left alone, and so are frozen ones
            (``requires_grad`` False).
        weight_decay: decoupled, theta <- (1 - lr weight_decay) theta.
        largest_rise: a step after which the batch's loss is not finite, or has risen by more than this part of itself,
            is taken back and counted in :attr:`refused`, and the next one is a quarter as long; every step that stays
            doubles that factor, up to 1. This takes one more evaluation of the value (with the same dropout masks
            and the buffers of before) and a copy of the parameters. None: steps are not looked at again. Unless it
            is given it is 0.1 for all that use curvature, None for FGD.
        diagnostics: whether :attr:`last_step` tells about every step, the loss after it included (one more evaluation
            of the value).
    """

    second_order: ClassVar[SecondOrder]
    default_largest_rise: ClassVar[float | None] = 0.1
    last_step: StepRecord | None = None  #: the last step, with ``diagnostics=True``

    def __init__(
        self,
        hd: HyperDualModule,
        directions: Directions,
        lr: float | Tensor,
        curvature: Curvature | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.hd = fitted(hd, self.second_order, curvature)
        self.directions = directions
        self.largest_rise = options.get("largest_rise", self.default_largest_rise)
        self.diagnostics = options.get("diagnostics", False)
        self._update = Update(self.hd.lowering)
        self._skipped = SkippedSteps()
        self._refused = torch.zeros((), dtype=torch.int64)
        self._length = torch.ones((), dtype=torch.float64)
        weight_decay = options.get("weight_decay", 0.0)
        at_least_zero("lr", lr)
        at_least_zero("weight_decay", weight_decay)
        if self.largest_rise is not None:
            at_least_zero("largest_rise", self.largest_rise)
        super().__init__(self._groups(options.get("params")), {"lr": lr, "weight_decay": weight_decay})

    @abstractmethod
    def coefficients(self, value: HyperDual) -> Tensor:
        """kappa [K], from the loss with its components; non-finite where there is no step."""

    def learn(self, record: StepRecord) -> None:
        """Adapt to what the step did; called after every step. Here: a shorter step after one that was taken back."""
        if record.refused is not None:
            length = self._length.to(record.refused.device)
            self._length = torch.where(record.refused, length / 4, (2 * length).clamp(max=1))

    def damping(self) -> Tensor | None:
        """The damping of the step that was just solved for, where there is one."""
        return None

    @torch.no_grad()
    def step(self, *args: Any, targets: Sequence[Any] | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            args, kwargs: the model's own arguments.
            targets: what the loss takes after the model's output; without a loss an ordinary keyword of the model.

        Returns:
            The loss before the step, 0-dim. Where it, a derivative, or what the step would lead to is not finite, the
            parameters and the model's state stay as they are and the step is counted in :attr:`skipped`.
        """
        batch = self._batch(args, kwargs, targets)
        directions = self.directions.propose(self._trained(), batch)
        state = State(self.hd.module)
        looks_again = self.diagnostics or self.largest_rise is not None
        replay = Replay(self.hd, batch, state) if looks_again else None
        value = self.hd(*batch.args, tangents=directions, **batch.keywords)
        loss, kappa = scalar_of(value), self.coefficients(value)
        kappa = kappa * self._length  # of no dimensions, so it may lie on the CPU: nothing waits
        reference = loss if replay is None or replay.is_alike else replay.loss()
        before = [p.clone() for p in self._trained().values()] if self.largest_rise is not None else []
        needed = [loss, value.tangent, kappa, *([] if value.cross is None else [value.cross])]
        moved, valid = self._move(directions, kappa, needed)
        state.restore(unless=valid)
        record = self._record(value, kappa, valid)
        if replay is not None:
            record = replace(record, actual=replay.loss().double() - reference.double())
        if self.largest_rise is not None:
            record, moved = self._judge(record, before, moved)
        self.learn(record)
        self.directions.observe(directions, moved)
        self._skipped.count(~valid)
        if self.diagnostics:
            self.last_step = record
        return loss

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Batch:
        if targets is None or self.hd.loss is None:
            return Batch(args, kwargs if targets is None else {**kwargs, "targets": targets}, None)
        if not isinstance(targets, (tuple, list)):
            raise ArgumentError(f"targets: expected a tuple of the loss's arguments, got {type(targets).__name__}")
        return Batch(args, kwargs, tuple(targets))

    def _record(self, value: HyperDual, kappa: Tensor, valid: Tensor) -> StepRecord:
        curvature = None
        if value.cross is not None:
            curvature = value.hessian() if self.second_order == "plane" else value.cross
        part = (self.param_groups[0]["lr"] * kappa).to(torch.float64)
        return StepRecord(
            loss=value.primal.double(),
            slopes=value.tangent.double(),
            curvature=None if curvature is None else curvature.double(),
            part=part,
            damping=self.damping(),
            skipped=~valid,
        )

    def _judge(self, record: StepRecord, before: Sequence[Tensor], moved: Stacks) -> tuple[StepRecord, Stacks]:
        """Take the step back where the loss rose too far."""
        assert record.actual is not None and self.largest_rise is not None
        stays = record.actual <= self.largest_rise * record.loss.abs()  # False for NaN
        refused = ~stays & ~record.skipped
        self._refused = self._refused.to(refused.device) + refused
        for p, old in zip(self._trained().values(), before, strict=True):
            p.copy_(torch.where(stays.to(p.device), p, old))
        kept = {name: torch.where(stays.to(v.device), v, 0) for name, v in moved.items()}
        return replace(record, refused=refused), kept

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far; reading it waits for the device."""
        return self._skipped.total

    @property
    def refused(self) -> int:
        """How many steps were taken back so far; reading it waits for the device."""
        return int(self._refused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be the model's, and ``hd.wrt`` must select them."""
        group = {**param_group, "params": self._named(param_group["params"])}
        for option in ("lr", "weight_decay"):
            at_least_zero(option, group.get(option, 0.0))
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The groups, the directions' random state, the numbers of skipped and refused steps, and the steps' length."""
        counts = {"skipped": self.skipped, "refused": self.refused, "length": self._length}
        return {**super().state_dict(), "directions": self.directions.state_dict(), **counts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken."""
        super().load_state_dict(dict(state_dict))
        self.directions.load_state_dict(state_dict["directions"])
        self._skipped.restore(state_dict["skipped"])
        self._refused = torch.tensor(state_dict["refused"])
        self._length = torch.as_tensor(state_dict["length"])

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

    def _move(self, directions: Stacks, kappa: Tensor, needed: Sequence[Tensor]) -> tuple[Stacks, Tensor]:
        """Step if it leads to finite parameters and all that is needed is finite, a 0-dim bool.

        The change of every parameter leaves weight decay out.
        """
        members = [(group, name, p) for group, name, p in self._members() if name in directions]
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64) for group, _, _ in members]
        decays = {
            i: rates[i] * group["weight_decay"] for i, (group, _, _) in enumerate(members) if group["weight_decay"]
        }
        valid, *moved = self._update(
            [p for *_, p in members], [directions[name] for _, name, _ in members], kappa, rates, decays, needed
        )
        return {name: change for (_, name, _), change in zip(members, moved, strict=True)}, valid

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

"""What all optimizers share: a step along K directions, its parameter groups, its state, and how it survives a NaN.

    theta <- theta + lr sum_i kappa_i v_i

A subclass says which second-order components it needs and how the coefficients kappa follow from the slopes
g_i = v_i . grad f and the curvatures v_i^T H v_j.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx import lower
from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual, SecondOrder
from fomoh_fx.optim.checks import at_least_zero, is_bool
from fomoh_fx.optim.directions import Batch, Directions
from fomoh_fx.optim.groups import check_rates, groups_of, members, named, rename, trained
from fomoh_fx.optim.program import Program, is_own
from fomoh_fx.optim.record import StepRecord
from fomoh_fx.optim.replay import Replay
from fomoh_fx.optim.samplers import Proposed, Stacks
from fomoh_fx.optim.skipped import SkippedSteps
from fomoh_fx.optim.snapshot import State
from fomoh_fx.optim.update import settle, update
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.transform import Curvature, HyperDualModule

#: The least factor by which steps become shorter; from 0 there would be no way back.
SHORTEST = 2.0**-40

#: What torch's schedulers put into groups, beside the options that groups have.
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "swa_lr")


class Options(TypedDict, total=False):
    """What every optimizer takes; :class:`ForwardOptimizer` says what it means."""

    params: Iterable[Any] | None
    weight_decay: float
    largest_rise: float | None
    diagnostics: bool


@dataclass(frozen=True)
class Moved:
    """What a step did.

    Its kappa [K]; whether it was valid; the change of every parameter by name, without weight decay, where something
    follows it; the parameters before, where the step may be taken back or its weight decay comes after the loss is
    looked at.
    """

    kappa: Tensor
    valid: Tensor
    changes: Stacks
    before: Stacks


pytree.register_dataclass(Moved)


@contextmanager
def _plainly() -> Iterator[None]:
    """Without gradients, and out of inference mode: what a step remembers must serve other steps too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class ForwardOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that needs forward passes only.

    Directions that a sampler draws lie in the space of all parameters. Those on which the batch's loss does not depend
    (a head that is not in use, rows of an embedding that are not looked up) then move along them too, at random. Leave
    them out by ``wrt=`` of ``transform``, by ``params``, or by freezing them, or take ``FoMoHKD(hd,
    sampler="activity")``, which guesses that their gradient is zero.

    Args:
        hd: what :func:`fomoh_fx.transform` or :func:`fomoh_fx.compile` returned. Where its ``second_order`` is not
            the one that this optimizer needs, the optimizer makes one that has it, from the same model and loss.
        directions: where the steps look.
        lr: each group's own scales that group's part of the step.
        curvature: the one that is needed; None for that of ``hd``.
        params: parameters, or groups of them with options of their own, as for every optimizer of ``torch.optim``;
            None for all that ``hd.wrt`` selects. Parameters in no group are left alone, and so are frozen ones
            (``requires_grad`` False).
        weight_decay: decoupled, theta <- (1 - lr weight_decay) theta. It is no part of what a step is judged by:
            where the loss after a step is computed, that is before the decay, which the slopes and curvatures of the
            step do not predict. A step that is taken back has no decay either.
        largest_rise: a step after which the batch's loss is not finite, or has risen by more than this part of itself,
            is taken back and counted in :attr:`refused`, and the next one is a quarter as long; every step that stays
            doubles that factor, up to 1. This takes one more evaluation of the value (with the same dropout masks
            and the buffers of before) and a copy of the parameters. None: steps are not looked at again. Unless it
            is given it is 0.1 for all that use curvature, None for FGD.
        diagnostics: whether :attr:`last_step` tells about every step, the loss after it included (one more evaluation
            of the value, and with weight decay a copy of the parameters).

    Raises:
        ArgumentError: ``hd`` is no transformed module, has derivatives in the inputs, or was lowered in a way that
            cannot be repeated; ``lr``, ``weight_decay`` or ``largest_rise`` is no finite number of at least zero;
            ``params`` are not the model's, not selected by ``hd.wrt``, none, or without order; an option is unknown.
    """

    second_order: ClassVar[SecondOrder]
    remembers: ClassVar[Sequence[str]] = ("_length", "_refused")
    settings: ClassVar[Sequence[str]] = ("largest_rise", "diagnostics")
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
        if unknown := options.keys() - Options.__annotations__.keys():
            known = ", ".join(Options.__annotations__)
            raise ArgumentError(f"{min(unknown)}: no option of {type(self).__name__}; beside its own there are {known}")
        self.hd = fitted(hd, self.second_order, curvature)
        self.directions = directions
        directions.lower(self.hd.lowering)
        self.largest_rise = options.get("largest_rise", self.default_largest_rise)
        self.diagnostics = options.get("diagnostics", False)
        self._skipped = SkippedSteps()
        self._refused = torch.zeros((), dtype=torch.int64)
        self._length = torch.ones((), dtype=torch.float64)
        weight_decay = options.get("weight_decay", 0.0)
        at_least_zero("lr", lr)
        at_least_zero("weight_decay", weight_decay)
        is_bool("diagnostics", self.diagnostics)
        if self.largest_rise is not None:
            at_least_zero("largest_rise", self.largest_rise)
        super().__init__(groups_of(options.get("params"), self.hd), {"lr": lr, "weight_decay": weight_decay})
        parts = self._moved, self._finished, settle
        self._move, self._finish, self._settle = (Program(part, self.hd.lowering) for part in parts)

    @abstractmethod
    def coefficients(self, value: HyperDual) -> Tensor:
        """kappa [K], from the loss with its components; non-finite where there is no step."""

    def parts(self) -> list[Any]:
        """What decides about a step: the optimizer itself, and the objects and functions that it asks."""
        return [self, self.directions]

    def learn(self, record: StepRecord) -> None:
        """Adapt to what the step did; called after every step. Here: a shorter step after one that was taken back."""
        if record.refused is not None:
            length = self._length.to(record.refused.device)
            self._length = torch.where(record.refused, length / 4, 2 * length).clamp(SHORTEST, 1)

    def damping(self) -> Tensor | None:
        """The damping of the step that was just solved for, where there is one."""
        return None

    @_plainly()
    def step(self, *args: Any, targets: Sequence[Any] | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            args, kwargs: the model's own arguments.
            targets: what the loss takes after the model's output; without a loss an ordinary keyword of the model.

        Returns:
            The loss before the step, 0-dim. Where it, a derivative, or what the step would lead to is not finite, the
            parameters and the model's state stay as they are and the step is counted in :attr:`skipped`.

        Raises:
            ArgumentError: the model's result and the loss are no scalar, none of the parameters is trained, one of them
                is no longer the model's, or a group's ``lr`` or ``weight_decay`` is no finite number of at least zero.
        """
        batch = self._batch(*_normal((args, kwargs, targets)))
        rename(self.param_groups, dict(self.hd.module.named_parameters()))
        check_rates(self.param_groups)
        directions = self.directions.propose(trained(self.param_groups), batch)
        evaluate = self.hd.prepare(*batch.args, tangents=directions, **batch.keywords)
        state = State(self.hd, evaluate)
        looks_again = self.diagnostics or self.largest_rise is not None
        replay = Replay(self.hd, evaluate, state) if looks_again else None
        value = evaluate()
        value = HyperDual(scalar_of(value), value.tangent, value.cross, components=value.components)
        reference = value.primal if replay is None or replay.is_alike else replay.loss()
        moving = [(group, name, p) for group, name, p in members(self.param_groups) if name in directions]
        parameters, rates = {name: p for _, name, p in moving}, [_number(group["lr"]) for group, _, _ in moving]
        decays = {
            i: rates[i] * group["weight_decay"] for i, (group, _, _) in enumerate(moving) if group["weight_decay"]
        }
        keeps = self.largest_rise is not None or (looks_again and bool(decays))
        memories = [part for part in self.parts() if hasattr(part, "remembers")]
        kappa = None if is_own(*self.parts()) else self._coefficients(value)
        remembered = memories if kappa is None else []
        moved = self._move(remembered, value, kappa, parameters, directions, rates, decays, keeps)
        state.restore(unless=moved.valid)
        actual = None if replay is None else replay.loss().double() - reference.double()
        finish = self._finish if kappa is None else self._finish.eager
        record, stays = finish(
            memories, value, moved, _one_rate(rates), actual, directions if self._is_followed() else {}
        )
        if moved.before and (decays or stays.device.type != "cpu" or not stays):  # a CPU is asked without waiting
            self._settle([], stays, parameters, moved.before, moved.changes, decays)
        self._skipped.count(~moved.valid)
        if self.diagnostics:
            self.last_step = record
        return value.primal

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Batch:
        given = [*args, *kwargs.values()]
        if targets is None and len(given) == 1 and isinstance(given[0], FunctionType):
            raise ArgumentError(
                "step: takes the batch, step(x, targets=(y,)), and no closure: it evaluates the loss itself"
            )
        if targets is None or self.hd.loss is None:
            return Batch(args, kwargs if targets is None else {**kwargs, "targets": targets}, None)
        if not isinstance(targets, (tuple, list)):
            raise ArgumentError(f"targets: expected a tuple of the loss's arguments, got {type(targets).__name__}")
        return Batch(args, kwargs, tuple(targets))

    def _coefficients(self, value: HyperDual) -> Tensor:
        """kappa, as short as it has to be after steps that were taken back."""
        with without_autocast():
            kappa = self.coefficients(value)
        if self.largest_rise is None:
            return kappa
        return kappa * self._length  # of no dimensions, so it may lie on the CPU: nothing waits

    def _moved(
        self,
        value: HyperDual,
        kappa: Tensor | None,
        parameters: dict[str, Tensor],
        directions: Proposed,
        rates: Sequence[Tensor],
        decays: Mapping[int, Tensor],
        keeps: bool,
    ) -> Moved:
        """Solve for kappa, unless it is given, and step if that leads to finite parameters and all is finite.

        Where it ``keeps`` the parameters of before, the weight decay is left to :func:`~fomoh_fx.optim.update.settle`.
        """
        kappa = self._coefficients(value) if kappa is None else kappa
        before = {name: p.clone() for name, p in parameters.items()} if keeps else {}
        needed = [value.primal, value.tangent, kappa, *([] if value.cross is None else [value.cross])]
        stacks = [directions[name] for name in parameters]
        valid, *changes = update(list(parameters.values()), stacks, kappa, rates, decays, needed, not keeps)
        followed = self._is_followed() or (keeps and decays)
        return Moved(kappa, valid, dict(zip(parameters, changes, strict=True)) if followed else {}, before)

    def _is_followed(self) -> bool:
        """Whether anybody may look at what the step did to the parameters."""
        return self.directions.follows or not is_own(*self.parts())

    def _finished(
        self, value: HyperDual, moved: Moved, rate: Tensor, actual: Tensor | None, directions: Proposed
    ) -> tuple[StepRecord | None, Tensor]:
        """Whether the step stays, which it does not where the loss rose too far; and learn from it."""
        record = self._record(value, moved, rate, actual)
        changes, stays = moved.changes, moved.valid
        if self.largest_rise is not None:
            assert actual is not None
            refused = ~(actual <= self.largest_rise * record.loss.abs()) & moved.valid  # True for NaN
            stays = moved.valid & ~refused
            record = replace(record, refused=refused)
            self._refused = self._refused.to(refused.device) + refused
            changes = {name: torch.where(stays.to(v.device), v, 0) for name, v in changes.items()}
        self.learn(record)
        if self._is_followed():
            self.directions.observe(directions, changes)
        return record if self.diagnostics else None, stays

    def _record(self, value: HyperDual, moved: Moved, rate: Tensor, actual: Tensor | None) -> StepRecord:
        curvature = None
        if value.cross is not None:
            curvature = value.hessian() if self.second_order == "plane" else value.cross
        return StepRecord(
            loss=value.primal.double(),
            slopes=value.tangent.double(),
            curvature=None if curvature is None else curvature.double(),
            part=(rate * moved.kappa).to(torch.float64),
            damping=self.damping(),
            skipped=~moved.valid,
            rounding=torch.finfo(value.primal.dtype).eps * value.primal.abs().double(),
            actual=actual,
        )

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far; reading it waits for the device."""
        return self._skipped.total

    @property
    def refused(self) -> int:
        """How many steps were taken back so far; reading it waits for the device."""
        return int(self._refused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be the model's, and ``hd.wrt`` must select them.

        Raises:
            ArgumentError: it has other parameters, or options that groups do not have.
        """
        if unknown := param_group.keys() - {"params", "param_names", *self.defaults, *_OF_SCHEDULERS}:
            known = ", ".join(self.defaults)
            raise ArgumentError(f"params: a group has no option {', '.join(sorted(unknown))}; its own may be {known}")
        for option in ("lr", "weight_decay"):
            at_least_zero(option, param_group.get(option, 0.0))
        super().add_param_group({**param_group, "params": named(param_group["params"], self.hd)})

    def state_dict(self) -> dict[str, Any]:
        """The groups, and what is remembered from step to step (:meth:`entries`); hooks see all of it."""
        handle = self.register_state_dict_post_hook(lambda _, state: {**state, **self.entries()}, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            ArgumentError: after the hooks it is of another optimizer, of another kind of directions, of other
                parameters, or not whole. Nothing has changed then.
        """
        given: list[Mapping[str, Any]] = []

        def check(_: Any, state: Mapping[str, Any]) -> None:
            self._refuse_foreign(state)
            given.append(state)

        if not isinstance(state_dict, Mapping):
            self._refuse_foreign(state_dict)
        handle = self.register_load_state_dict_pre_hook(check)  # the last of them
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
        self.restore(given[0])

    def entries(self) -> dict[str, Any]:
        """The directions' state, the numbers of skipped and refused steps, and the steps' length."""
        counts = {"skipped": self.skipped, "refused": self.refused, "length": self._length}
        return {"optimizer": self._kind(), "directions": self.directions.state_dict(), **counts}

    def restore(self, entries: Mapping[str, Any]) -> None:
        """Go on from what :meth:`entries` returned."""
        self.directions.load_state_dict(entries["directions"])
        self._skipped.restore(entries["skipped"])
        self._refused = torch.tensor(entries["refused"])
        self._length = torch.as_tensor(entries["length"])

    def _kind(self) -> str:
        return f"{type(self).__name__} with {type(self.directions).__name__}"

    def _refuse_foreign(self, state: Any) -> None:
        known = isinstance(state, Mapping) and isinstance(state.get("optimizer"), str)
        if not known or state["optimizer"] != self._kind():
            what = state["optimizer"] if known else "no state of an optimizer of fomoh_fx"
            raise ArgumentError(f"state_dict: expected that of {self._kind()}, got {what}")
        if missing := self._missing(state):
            raise ArgumentError(f"state_dict: it is not whole, there is no {', '.join(missing)}")
        names = [group["param_names"] for group in self.param_groups]
        others = [group["param_names"] for group in state["param_groups"]]
        if names != others:
            raise ArgumentError(f"state_dict: its groups have the parameters {others}, and here there are {names}")

    def _missing(self, state: Mapping[str, Any]) -> list[str]:
        """The names of what a state of this optimizer has and this one has not."""
        own = {"state": {}, "param_groups": [], **self.entries()}
        missing = sorted(own.keys() - state.keys())
        for group in state.get("param_groups", ()):
            missing += sorted({"params", "param_names", *self.defaults} - group.keys())
        for name, value in own.items():
            if isinstance(value, Mapping) and name in state:
                missing += sorted(f"{name}.{key}" for key in value.keys() - dict(state[name] or {}).keys())
        return missing

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that a copy can step, with a copy of the model; hooks are left behind, as PyTorch does.

        So are methods that were wrapped, as a scheduler wraps ``step``: those of a copy would move the original.
        """

        def is_left(name: str) -> bool:
            return name.startswith("_optimizer_") or callable(getattr(type(self), name, None))

        return {name: value for name, value in self.__dict__.items() if not is_left(name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """PyTorch calls this for states that are loaded, too, and gives all groups an option of its own optimizers."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)


def fitted(hd: Any, second_order: SecondOrder, curvature: Curvature | None = None) -> HyperDualModule:
    """The module itself where it has these second-order components, otherwise one that has, lowered alike."""
    module = getattr(hd, "_orig_mod", hd)  # what torch.compile(hd) wraps
    if not isinstance(module, HyperDualModule):
        raise ArgumentError(f"hd: expected the result of fomoh_fx.transform, got {type(hd).__name__}")
    if module.wrt == "inputs":
        raise ArgumentError('hd: was transformed with wrt="inputs"; training needs derivatives in the parameters')
    curvature = curvature or module.curvature
    if module is hd and module.first_order and (module.second_order, module.curvature) == (second_order, curvature):
        return module
    lowering = module.lowering if module is hd else lower.asked_for(hd)
    if lowering is None:
        raise ArgumentError(
            "hd: cannot see by what torch.compile was to lower it; give fomoh_fx.compile(hd, backend=..)"
        )
    made = HyperDualModule(module.model, module.loss, wrt=module.wrt, second_order=second_order, curvature=curvature)
    made.lowering = lowering
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


def _normal(given: Any) -> Any:
    """With copies of tensors that were made in inference mode, which nothing outside of it may save."""
    if not any(isinstance(x, Tensor) and x.is_inference() for x in pytree.tree_leaves(given)):
        return given
    return pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, given)


def _number(rate: float | Tensor) -> Tensor:
    return torch.as_tensor(rate, dtype=torch.float64)


def _one_rate(rates: Sequence[Tensor]) -> Tensor:
    """The rate of all parameters, NaN where they have different ones."""
    first, *others = rates
    for rate in others:
        first = torch.where(rate == first, first, torch.nan)
    return first

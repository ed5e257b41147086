"""Directions from perturbed activities: a guess of the gradient, averaged over steps, and the step before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim.directions import Batch, RandomDirections
from fomoh_fx.optim.samplers import Stacks, dimension_of, norms, scaled, unit_scale
from fomoh_fx.perturbation import ActivityGradient, Fit

#: Directions that can be asked for, in this order.
MOST = 3


class ActivityDirections(RandomDirections):
    """What spans the plane of a step, each direction of norm sqrt(n) over all n parameters:

    1. the averaged guess in Adam's metric, -m / (sqrt(v) + eps) (Kingma, Ba 2015), m and v averages of the guesses and
       of their squares, v corrected for its start at zero;
    2. the step before;
    3. the newest guess in the same metric.

    An average over steps has less noise than one guess, and the plane's own slopes and curvatures decide how far to go.
    Guesses start from B dL/dz, with a matrix B for each point that is fitted from step to step by least squares; a
    step corrects a part 1 / (1 + noise) of what it finds, noise the variance of its fit relative to the error.

    Args:
        gradient: what guesses.
        count: how many of the directions, at most 3.
        seed: of the perturbations; None takes one from torch's default generator.
        betas: how much of m and of v stays from one step to the next.
        eps: added to sqrt(v).
    """

    def __init__(
        self,
        gradient: ActivityGradient,
        count: int = 2,
        seed: int | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(count, "rademacher", seed, previous_step=True)
        if count > MOST:
            raise ArgumentError(f'directions: sampler="activity" has at most {MOST}, got {count}')
        self.gradient, self.betas, self.eps = gradient, betas, eps
        self.feedback: dict[str, Tensor] = {}
        self.averages: Stacks = {}
        self.squares: Stacks = {}
        self.guesses = 0
        self.length = torch.zeros(())

    def propose(self, parameters: Mapping[str, Tensor], batch: Batch) -> Stacks:
        targets = batch.targets or ()
        guess = self.gradient(batch.args, batch.kwargs, targets, tuple(parameters), self._signs, self.feedback)
        self._average(parameters, guess.gradients)
        for name, fit in guess.fits.items():
            self.feedback[name] = _corrected(self.feedback.get(name), fit)
        fresh = self._adapted({name: -guess.gradients.get(name, torch.zeros_like(p)) for name, p in parameters.items()})
        before = self._previous or fresh
        averaged = self._adapted({name: -m for name, m in self.averages.items()})
        found = [averaged, {name: before.get(name, v) for name, v in fresh.items()}, fresh][: self.count]
        stacks = {name: torch.stack([direction[name] for direction in found]) for name in parameters}
        return scaled(stacks, unit_scale(stacks))

    def observe(self, directions: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> None:
        """As for random directions; ``length`` is the step's in units of the direction that it becomes."""
        super().observe(directions, moved)
        total = norms({name: change.unsqueeze(0) for name, change in moved.items()})[0]
        self.length = total / math.sqrt(dimension_of(moved))

    def state_dict(self) -> dict[str, Any]:
        """The random state, the averages, the matrices B and the step before."""
        own = {"feedback": self.feedback, "averages": self.averages, "squares": self.squares}
        copies = {name: dict(stacks) for name, stacks in own.items()}
        return {**super().state_dict(), **copies, "guesses": self.guesses, "length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.feedback, self.averages = dict(state["feedback"]), dict(state["averages"])
        self.squares, self.guesses = dict(state["squares"]), state["guesses"]
        self.length = state["length"]

    def _average(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """One more guess in the averages; one that is not finite counts as zero."""
        self.guesses += 1
        first, second = self.betas
        for name, p in parameters.items():
            g = gradients[name].nan_to_num(0, 0, 0) if name in gradients else torch.zeros_like(p)
            m, v = self.averages.get(name, torch.zeros_like(p)), self.squares.get(name, torch.zeros_like(p))
            self.averages[name] = torch.lerp(m, g, 1 - first)
            self.squares[name] = torch.lerp(v, g * g, 1 - second)

    def _adapted(self, direction: Stacks) -> Stacks:
        """The direction in Adam's metric."""
        start = 1 - self.betas[1] ** self.guesses
        return {name: v / ((self.squares[name] / start).sqrt() + self.eps) for name, v in direction.items()}

    def _signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        u = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return u.bernoulli_(0.5, generator=self.generator(like.device)).mul_(2).sub_(1)


def _corrected(matrix: Tensor | None, fit: Fit) -> Tensor:
    """B + gain R^T W Z (Z^T W Z)^-1, with a little of the identity where outputs' gradients depend on each other."""
    gram = fit.gram.double()
    ridge = 1e-3 * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution, _ = torch.linalg.solve_ex(gram + ridge * eye, fit.cross.double().T)
    change = (solution.T / (1 + fit.noise)).to(fit.cross)
    change = torch.where(change.isfinite().all(), change, 0)
    return change if matrix is None else matrix + change

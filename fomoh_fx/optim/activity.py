"""Directions from perturbed activities: a guess of the gradient, averaged over steps, and the step before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim.directions import Batch, RandomDirections
from fomoh_fx.optim.program import Program
from fomoh_fx.optim.samplers import Proposed, Stacks, dimension_of, norms, scaled, unit_scale
from fomoh_fx.perturbation import ActivityGradient, Fit, Guess

#: Directions that can be asked for, in this order.
MOST = 3
#: How much of F stays from one step to the next.
FAR = 0.98


class ActivityDirections(RandomDirections):
    """What spans the plane of a step, each direction of norm sqrt(n) over all n parameters:

    1. the averaged guess in Adam's metric, -m / (sqrt(v) + eps) (Kingma, Ba 2015), m and v averages of the guesses and
       of their squares, v corrected for its start at zero;
    2. the step before;
    3. the newest guess in the same metric.

    An average over steps has less noise than one guess, and the plane's own slopes and curvatures decide how far to go.
    Guesses start from B dL/dz, with a matrix B for each point that is fitted from step to step by ridge regression: the
    less a step tells about a column of B, the less it changes there.

    The far part of a gradient (:class:`~fomoh_fx.perturbation.Guess`) is averaged over more steps. Of that average, F,
    the part S / (S + N) is added to m: Wiener's filter for each parameter, S the slope that new guesses have along F on
    average, in which noise has no share, and N the variance that averaging has left.

    Args:
        gradient: what guesses.
        count: how many of the directions, at most 3.
        seed: of the perturbations; None takes one from torch's default generator.
        betas: how much of m and of v stays from one step to the next.
        eps: added to sqrt(v).
    """

    remembers: ClassVar[Sequence[str]] = (
        "_previous", "feedback", "averages", "squares", "far", "agreement", "guesses", "length",
    )  # fmt: skip
    settings: ClassVar[Sequence[str]] = ("previous_step", "count", "betas", "eps")

    def __init__(
        self,
        gradient: ActivityGradient,
        count: int = 2,
        seed: int | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(count, "rademacher", seed)
        self.previous_step = True
        if count > MOST:
            raise ArgumentError(f'directions: sampler="activity" has at most {MOST}, got {count}')
        self.gradient, self.betas, self.eps = gradient, betas, eps
        self.feedback: dict[str, Tensor] = {}
        self.averages: Stacks = {}
        self.squares: Stacks = {}
        self.far: Stacks = {}
        self.agreement: Stacks = {}
        self.guesses = torch.zeros((), dtype=torch.float64)
        self.length = torch.zeros(())
        self._follow = Program(self._followed, gradient.hd.lowering)

    def propose(self, parameters: Mapping[str, Tensor], batch: Batch) -> Stacks:
        targets = batch.targets or ()
        guess = self.gradient(batch.args, batch.kwargs, targets, tuple(parameters), self.streams.signs, self.feedback)
        self._begin(parameters, guess)
        return self._follow([self], parameters, guess)

    def _begin(self, parameters: Mapping[str, Tensor], guess: Guess) -> None:
        """Zeros where nothing is remembered yet; the rest follows parameters that got another dtype."""
        self.guesses = self.guesses.to(guess.loss.device, non_blocking=True)
        for name, p in parameters.items():
            self._previous[name] = _like(p, self._previous.get(name))
            for remembered in (self.averages, self.squares):
                remembered[name] = _like(_wide(p), remembered.get(name))
        for name, far in guess.far.items():
            self.far[name] = _like(far, self.far.get(name))
            self.agreement[name] = _like(_wide(far.new_empty(2)), self.agreement.get(name))
        for name, fit in guess.fits.items():
            self.feedback[name] = _like(fit.cross, self.feedback.get(name))

    def _followed(self, parameters: Mapping[str, Tensor], guess: Guess) -> Stacks:
        """The directions, after one more guess."""
        self._average(parameters, guess)
        for name, fit in guess.fits.items():
            self.feedback[name] = _corrected(self.feedback[name], fit)
        newest = {name: self._newest(guess, name, p).to(self.averages[name]) for name, p in parameters.items()}
        fresh = self._adapted({name: -g for name, g in newest.items()})
        before = {name: torch.where(self.guesses > 1, self._previous[name], v) for name, v in fresh.items()}
        averaged = self._adapted({n: -self.averages[n] - self._filtered(n, p) for n, p in parameters.items()})
        found = [averaged, before, fresh][: self.count]
        stacks = {name: torch.stack([direction[name] for direction in found]) for name in parameters}
        return {name: v.to(parameters[name].dtype) for name, v in scaled(stacks, unit_scale(stacks)).items()}

    def observe(self, directions: Proposed, moved: Mapping[str, Tensor]) -> None:
        """As for random directions; ``length`` is the step's in units of the direction that it becomes."""
        super().observe(directions, moved)
        total = norms({name: change.unsqueeze(0) for name, change in moved.items()})[0]
        self.length = total / math.sqrt(dimension_of(moved))

    def state_dict(self) -> dict[str, Any]:
        """The random state, the averages, the matrices B and the step before."""
        own = {"feedback": self.feedback, "averages": self.averages, "squares": self.squares}
        own |= {"far": self.far, "agreement": self.agreement}
        copies = {name: dict(stacks) for name, stacks in own.items()}
        return {**super().state_dict(), **copies, "guesses": self.guesses, "length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.feedback, self.averages = dict(state["feedback"]), dict(state["averages"])
        self.squares, self.guesses = dict(state["squares"]), torch.as_tensor(state["guesses"], dtype=torch.float64)
        self.far, self.agreement = dict(state["far"]), dict(state["agreement"])
        self.length = state["length"]

    def _average(self, parameters: Mapping[str, Tensor], guess: Guess) -> None:
        """One more guess in the averages; one that is not finite counts as zero."""
        self.guesses = self.guesses + 1
        first, second = self.betas
        for name, far in guess.far.items():
            self._average_far(name, far.nan_to_num(0, 0, 0))
        for name, p in parameters.items():
            near = guess.gradients[name].nan_to_num(0, 0, 0) if name in guess.gradients else torch.zeros_like(p)
            near, g = near.to(self.averages[name]), self._newest(guess, name, p).to(self.averages[name])
            g = g.nan_to_num(0, 0, 0)
            self.averages[name] = torch.lerp(self.averages[name], near, 1 - first)
            self.squares[name] = torch.lerp(self.squares[name], g * g, 1 - second)

    def _average_far(self, name: str, far: Tensor) -> None:
        """F, and two numbers: the slope of new guesses along the F of before, and their square."""
        before, told = self.far[name], self.agreement[name]
        known = (1 - FAR ** (self.guesses - 1)).clamp(min=1 - FAR).to(told)
        now = torch.stack([(far.to(told) * before).sum() / known, far.to(told).square().sum()])
        self.agreement[name] = torch.lerp(told, now, 1 - FAR)
        self.far[name] = torch.lerp(before, far, 1 - FAR)

    def _trusted(self, name: str) -> Tensor:
        """S / (S + N)."""
        slope, square = self.agreement[name]
        signal = slope.clamp(min=0)
        noise = (square - signal).clamp(min=0) * (1 - FAR) / (1 + FAR)
        return (signal / (signal + noise)).nan_to_num(0)

    def _newest(self, guess: Guess, name: str, p: Tensor) -> Tensor:
        """The newest guess, its far part filtered like the average."""
        g = guess.gradients.get(name, torch.zeros_like(p))
        return g + self._trusted(name).to(g) * guess.far[name] if name in guess.far else g

    def _filtered(self, name: str, like: Tensor) -> Tensor:
        """What is known of the far part."""
        if name not in self.far:
            return torch.zeros_like(like)
        return self._trusted(name).to(like) * self.far[name] / (1 - FAR**self.guesses).to(like)

    def _adapted(self, direction: Stacks) -> Stacks:
        """The direction in Adam's metric."""
        start = 1 - self.betas[1] ** self.guesses
        return {name: v / ((self.squares[name] / start.to(v)).sqrt() + self.eps) for name, v in direction.items()}


def _wide(x: Tensor) -> Tensor:
    """A tensor like it in at least float32: squares of small numbers vanish in half types."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _like(x: Tensor, remembered: Tensor | None) -> Tensor:
    """What is remembered, in the dtype and place of ``x``; zeros where nothing is."""
    return torch.zeros_like(x) if remembered is None else remembered.to(x)


def _corrected(matrix: Tensor, fit: Fit) -> Tensor:
    """B + R^T W Z (Z^T W Z + noise I)^-1, the mean of B given the residuals R = Z E^T + noise for an isotropic E."""
    gram = fit.gram.double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution, _ = torch.linalg.solve_ex(gram + fit.noise * eye, fit.cross.double().T)
    change = solution.T.to(fit.cross)
    change = torch.where(change.isfinite().all(), change, 0)
    return matrix + change

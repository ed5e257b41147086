"""Models that draw from Python's or NumPy's generators: refused where the result depends on the numbers."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError


class DropsLayers(nn.Module):
    def __init__(self, probability, draw):
        super().__init__()
        self.layers, self.probability, self.draw = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), probability, draw

    def forward(self, x):
        for layer in self.layers:
            if self.draw() >= self.probability:
                x = layer(x).tanh()
        return x


def out_of(model):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    tangents = {name: torch.ones(1, *p.shape) for name, p in model.named_parameters()}
    return fomoh_fx.transform(model)(x, tangents=tangents), model(x).detach()


DRAWS = {
    "random": lambda: random.random(),
    "uniform": lambda: random.uniform(0, 1),
    "numpy": lambda: np.random.rand(),
    "numpy-uniform": lambda: np.random.uniform(0, 1),
    "numpy-random": lambda: np.random.random(1).item(),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_what_depends_on_the_numbers_is_refused(draw):
    for probability in (0.001, 0.999):
        with pytest.raises(CaptureError, match=r"Draw with torch.*\n  at test_draws\.py:\d+, .*(random|np)\."):
            out_of(DropsLayers(probability, DRAWS[draw]))


@pytest.mark.parametrize("draw", DRAWS)
def test_what_does_not_depend_on_the_numbers_is_captured(draw):
    out, expected = out_of(DropsLayers(0.0, DRAWS[draw]))
    torch.testing.assert_close(out.primal, expected)


def test_noise_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.tensor(np.random.randn(3), dtype=x.dtype)

    with pytest.raises(CaptureError, match="Draw with torch"):
        out_of(Noisy(3, 3))


PYTHON_S_DRAW = random.random
OTHER_DRAWS = {
    "randint": lambda: random.randint(0, 1),
    "choice": lambda: random.choice([0, 1]),
    "numpy-randint": lambda: np.random.randint(0, 2),
    "by-another-name": lambda: PYTHON_S_DRAW(),
}


@pytest.mark.parametrize("draw", OTHER_DRAWS)
@pytest.mark.parametrize("seed", range(6))
def test_draws_that_cannot_be_set_are_refused_whatever_they_give(draw, seed):
    random.seed(seed)
    np.random.seed(seed)
    with pytest.raises(CaptureError, match="Draw with torch"):
        out_of(DropsLayers(0.5, OTHER_DRAWS[draw]))


GLOBAL = np.random.default_rng(0)


@pytest.mark.parametrize("place", ["attribute", "container", "global", "closure", "Random", "RandomState"])
def test_a_generator_object_is_refused(place):
    mine = random.Random(0)
    kinds = {"Random": random.Random(0), "RandomState": np.random.RandomState(0)}
    generator = kinds.get(place, np.random.default_rng(0))

    class Noisy(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.generator, self.all = None, []
            if place == "container":
                self.all.append(generator)
            elif place not in ("global", "closure"):
                self.generator = generator

        def forward(self, x):
            source = {"container": self.all and self.all[0], "global": GLOBAL, "closure": mine}.get(place)
            return super().forward(x) + (source or self.generator).random()

    with pytest.raises(CaptureError, match="draws from the random numbers of .*Draw with torch"):
        out_of(Noisy())


def counting():
    number = 1.0
    while True:
        yield number
        number += 1


ITERATORS = {
    "count": lambda: itertools.count(1),
    "cycle": lambda: itertools.cycle([1.0, 2.0]),
    "list": lambda: iter([1.0] * 9),
    "enumerate": lambda: map(float, map(sum, enumerate(range(1, 99)))),
    "generator": counting,
}


@pytest.mark.parametrize("name", ITERATORS)
@pytest.mark.parametrize("is_attribute", [True, False])
def test_an_iterator_that_goes_on_is_refused(name, is_attribute):
    mine = ITERATORS[name]()

    class Steps(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.steps = mine if is_attribute else None

        def forward(self, x):
            return super().forward(x) * next(self.steps or mine)

    with pytest.raises(CaptureError, match="takes the next value of .*(steps|mine) while it runs.*as an argument"):
        out_of(Steps())


def test_an_iterator_that_is_not_asked_is_no_matter():
    model = nn.Linear(3, 3)
    model.steps = [make() for make in ITERATORS.values()]
    out, expected = out_of(model)
    torch.testing.assert_close(out.primal, expected)


def test_a_generator_from_entropy_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + np.random.default_rng().random()

    with pytest.raises(CaptureError, match="makes a generator .*Draw with torch"):
        out_of(Noisy(3, 3))


def test_a_generator_that_is_not_drawn_from_is_no_matter():
    class Seeded(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.generator = np.random.default_rng(0)

        def forward(self, x):
            return super().forward(x) + np.random.default_rng(3).random()

    out, expected = out_of(Seeded())
    torch.testing.assert_close(out.primal, expected)


def test_seeds_of_torch_are_refused():
    """A graph draws on from where the generator is."""

    class Seeded(nn.Linear):
        def forward(self, x):
            torch.manual_seed(0)
            return super().forward(x) * torch.rand(3)

    class Forked(nn.Linear):
        def forward(self, x):
            with torch.random.fork_rng(devices=[]):
                return super().forward(x) * torch.rand(3)

    for kind, name in ((Seeded, "manual_seed"), (Forked, "random.fork_rng")):
        with pytest.raises(CaptureError, match=f"calls torch.{name} .*Call it before"):
            out_of(kind(3, 3))


def _in_a_closure():
    generator = np.random.default_rng(0)
    return lambda: float(generator.random())


@pytest.mark.parametrize("draw", [random.Random(0).random, np.random.default_rng(0).random, _in_a_closure()])
def test_a_method_or_a_function_that_draws_is_refused(draw):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.draw = draw

        def forward(self, x):
            return (x * self.draw()).sum()

    with pytest.raises(CaptureError, match=r"draws from the random numbers of Scaled\.draw"):
        fomoh_fx.transform(Scaled(), wrt="inputs")(torch.ones(3), tangents=(torch.ones(1, 3),))


def with_a_generator(x):
    return (x * torch.rand(3, generator=torch.Generator().manual_seed(3))).sum()


def with_a_method_of_tensors(x):
    return (x * torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(3))).sum()


def with_a_generator_beside_what_export_refuses(x):
    numbers = torch.rand(3, generator=torch.Generator().manual_seed(3))
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(y.sin().sum(), y)
    return (x * numbers * slope).sum()


@pytest.mark.parametrize(
    "model", [with_a_generator, with_a_method_of_tensors, with_a_generator_beside_what_export_refuses]
)
def test_a_generator_of_torch_is_refused(model):
    with pytest.raises(CaptureError, match=r"draws with a torch\.Generator of its own.*\n  at test_draws\.py:\d+, "):
        fomoh_fx.transform(model, wrt="inputs")(torch.ones(3), tangents=(torch.ones(1, 3),))


def test_a_capture_draws_nothing():
    """Beta samples of what the model writes out, which PyTorch computes while it traces."""

    def mixed(x):
        return x * torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample()

    hd, x = fomoh_fx.transform(mixed, wrt="inputs"), torch.ones(2)
    for _ in range(2):
        torch.manual_seed(0)
        expected = mixed(x), torch.rand(())
        torch.manual_seed(0)
        torch.testing.assert_close((hd(x, tangents=(torch.ones(1, 2),)).primal, torch.rand(())), expected)

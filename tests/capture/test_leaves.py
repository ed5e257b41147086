"""An input with a tangent is to the model what a leaf that requires a gradient is."""

import warnings

import pytest
import torch
from torch import nn

import fomoh_fx

X = torch.linspace(0.1, 1, 4, dtype=torch.float64)


def first_derivative(function, *others):
    return fomoh_fx.transform(function, wrt="inputs")(X, *others, tangents=(X[None], *(None for _ in others))).tangent


def asking(x, y):
    """Autograd's facts about what is given and what is computed."""
    given = x.is_leaf and x.grad_fn is None and x.requires_grad and y.is_leaf and not y.requires_grad
    z = x.square()
    computed = not z.is_leaf and z.grad_fn is not None and z.requires_grad and y.square().is_leaf
    return (z.sin() * y).sum() if given and computed else x.sum()


def changing(x, y):
    x.mul_(2)
    return (x.sin() * y).sum() if x.is_leaf else x.sum()


def test_a_model_asks_for_leaves():
    torch.testing.assert_close(first_derivative(asking, X), (2 * X * X * (X * X).cos() * X).sum()[None])


def test_a_leaf_may_be_changed_in_place():
    x = X.clone()
    out = fomoh_fx.transform(changing, wrt="inputs")(x, X, tangents=(X[None], None))
    torch.testing.assert_close(out.tangent, (2 * X * (2 * X).cos() * X).sum()[None])


def test_capture_warns_of_nothing():
    """PyTorch reads the gradient of what is no leaf, and hides its own warning of that, but not as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_derivative(lambda x, times: x.sin().sum() if int(times) > 1 else x.sum(), torch.tensor(2))


class Adversary(nn.Module):
    """A part that one of two losses takes as a constant."""

    def __init__(self, freeze, thaw):
        super().__init__()
        self.generator, self.critic = (nn.Linear(2, 2, bias=False).double() for _ in range(2))
        self.freeze, self.thaw = freeze, thaw

    def forward(self, x):
        self.freeze(self.critic)
        is_asked = self.critic.weight.requires_grad
        fooled = self.critic(self.generator(x)).pow(3).sum()
        self.thaw(self.critic)
        return (2.0 if is_asked else 1.0) * fooled + 10 * self.critic(self.generator(x).detach()).pow(2).sum()


def set_to(value):
    def put(module):
        module.weight.requires_grad = value

    return put


@pytest.mark.parametrize(
    ("freeze", "thaw"),
    [
        (lambda module: module.requires_grad_(False), lambda module: module.requires_grad_(True)),
        (set_to(False), set_to(True)),
        (lambda module: module.requires_grad_(False), lambda module: None),
    ],
    ids=["method", "attribute", "left so"],
)
def test_what_requires_no_gradient_for_a_while_is_a_constant_meanwhile(freeze, thaw):
    model = Adversary(freeze, thaw)
    x, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(1, 2, 2, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    for _ in range(2):
        out = hd(x, tangents={"critic.weight": v, "generator.weight": v})
        left = model.critic.weight.requires_grad
        model.requires_grad_(True)
        loss = model(x)
        assert model.critic.weight.requires_grad is left
        leaves = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        slope = sum((g * v[0]).sum() for g in gradients)
        second = torch.autograd.grad(slope, leaves)
        torch.testing.assert_close(out.tangent[0], slope.detach())
        torch.testing.assert_close(out.cross[0], sum((h * v[0]).sum() for h in second))


def test_a_view_of_what_requires_no_gradient_has_its_memory():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4, dtype=torch.float64))

        def forward(self, x):
            self.weight.requires_grad_(False)
            with torch.no_grad():
                self.weight.view(-1).add_(1)
                self.weight[0].mul_(2)
            y = (self.weight * x).sum()
            self.weight.requires_grad_(True)
            return y * self.weight.pow(2).sum()

    ours, theirs = Scaled(), Scaled()
    out = fomoh_fx.transform(ours)(X, tangents={"weight": torch.ones(1, 2, 4, dtype=torch.float64)})
    loss = theirs(X)
    (slope,) = torch.autograd.grad(loss, theirs.weight)
    torch.testing.assert_close(out.primal, loss.detach())
    torch.testing.assert_close(out.tangent[0], slope.sum())
    torch.testing.assert_close(ours.weight, theirs.weight)


def by_method(x):
    return x.requires_grad_()


def by_attribute(x):
    x.requires_grad = True
    return x


def where_it_is_a_leaf(x):
    return x.requires_grad_(True) if x.is_leaf else x


class Slopes(nn.Module):
    """A loss in the derivatives of a network in its input, as Hamiltonian and physics-informed networks have it."""

    def __init__(self, learn, is_frozen_after):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.learn, self.is_frozen_after = learn, is_frozen_after

    def forward(self, x):
        x = self.learn(x)
        (slopes,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        if self.is_frozen_after:
            x.requires_grad_(False)
        return (slopes.square().sum(-1) + self.net(x).squeeze(-1)).square().mean()


@pytest.mark.parametrize("is_frozen_after", [False, True])
@pytest.mark.parametrize("learn", [by_method, by_attribute, where_it_is_a_leaf])
def test_an_argument_of_which_the_model_wants_a_gradient(learn, is_frozen_after):
    model = Slopes(learn, is_frozen_after)
    tangents = {name: torch.randn(1, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    hd = fomoh_fx.transform(model)
    for seed in range(2):
        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        out = hd(x, tangents=tangents)
        leaves = dict(model.named_parameters())
        gradients = torch.autograd.grad(model(x.clone()), [*leaves.values()], create_graph=True)
        slope = sum((g * tangents[name][0]).sum() for g, name in zip(gradients, leaves, strict=True))
        second = torch.autograd.grad(slope, [*leaves.values()], allow_unused=True)
        products = ((h, tangents[name][0]) for h, name in zip(second, leaves, strict=True) if h is not None)
        torch.testing.assert_close(out.tangent[0], slope.detach())
        torch.testing.assert_close(out.cross[0], sum((h * v).sum() for h, v in products))

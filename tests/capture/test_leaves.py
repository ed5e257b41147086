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

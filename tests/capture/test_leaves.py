"""An input with a tangent is to the model what a leaf that requires a gradient is."""

import warnings

import torch

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

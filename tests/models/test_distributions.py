"""torch.distributions: draws by their parameters, densities, divergences. A draw that cannot be exact is refused."""

import pytest
import torch
from torch import distributions as D

import fomoh_fx
from fomoh_fx.errors import FomohError
from tests.oracle import relative_error, reverse_over_reverse, slopes

EYE = torch.eye(3, dtype=torch.float64)
WARM = torch.tensor(0.7, dtype=torch.float64)
SEED = 7


def tril(x):
    return torch.diag(x) + torch.outer(x, x.sin()).tril(-1)


def spread(x):
    return torch.outer(x, x) + EYE


DRAWS = {
    "Normal": lambda x: D.Normal(x, x.exp()),
    "Uniform": lambda x: D.Uniform(-x, x.exp()),
    "Exponential": lambda x: D.Exponential(x),
    "Weibull": lambda x: D.Weibull(x, x.exp()),
    "Kumaraswamy": lambda x: D.Kumaraswamy(x, x.exp()),
    "ContinuousBernoulli": lambda x: D.ContinuousBernoulli(logits=x),
    "RelaxedBernoulli": lambda x: D.RelaxedBernoulli(WARM, logits=x),
    "RelaxedOneHotCategorical": lambda x: D.RelaxedOneHotCategorical(WARM, logits=x),
    "OneHotCategoricalStraightThrough": lambda x: D.OneHotCategoricalStraightThrough(logits=x),
    "MultivariateNormal by its factor": lambda x: D.MultivariateNormal(x, scale_tril=tril(x)),
    "MultivariateNormal by its covariance": lambda x: D.MultivariateNormal(x, spread(x)),
    "LowRankMultivariateNormal": lambda x: D.LowRankMultivariateNormal(x, x[:, None], x.exp()),
    "TransformedDistribution": lambda x: D.TransformedDistribution(
        D.Normal(x, x.exp()), [D.SigmoidTransform(), D.AffineTransform(x, x * 2)]
    ),
}

STOPPED = {
    "Normal": lambda x: D.Normal(x, x.exp()),
    "Categorical": lambda x: D.Categorical(logits=x),
    "Bernoulli": lambda x: D.Bernoulli(logits=x),
    "Binomial": lambda x: D.Binomial(5, logits=x),
    "Gamma": lambda x: D.Gamma(x, x.exp()),
    "Dirichlet": lambda x: D.Dirichlet(x),
    "MixtureSameFamily": lambda x: D.MixtureSameFamily(D.Categorical(logits=x), D.Normal(x, x.exp())),
}

VALUES = {
    "Normal, KL": lambda x: D.kl_divergence(D.Normal(x, x.exp()), D.Normal(0 * x, 1 + 0 * x)),
    "Beta, KL": lambda x: D.kl_divergence(D.Beta(x, x.exp()), D.Beta(x * 2, x)),
    "Dirichlet, KL": lambda x: D.kl_divergence(D.Dirichlet(x), D.Dirichlet(x.exp())),
    "MultivariateNormal, KL": lambda x: D.kl_divergence(
        D.MultivariateNormal(x, scale_tril=tril(x)), D.MultivariateNormal(x * 0, spread(x))
    ),
    "Categorical, entropy": lambda x: D.Categorical(logits=x).entropy(),
    "Categorical, of a draw": lambda x: (lambda d: d.log_prob(d.sample()))(D.Categorical(logits=x)),
    "LowRankMultivariateNormal": lambda x: D.LowRankMultivariateNormal(x, x[:, None], x.exp()).log_prob(x * 2),
    "TransformedDistribution": lambda x: D.TransformedDistribution(
        D.Normal(x, x.exp()), [D.TanhTransform(cache_size=1)]
    ).log_prob(x / 3),
    "StudentT": lambda x: D.StudentT(x, x, x.exp()).log_prob(x * 2),
    "VonMises": lambda x: D.VonMises(x, x.exp()).log_prob(x * 2),
}

CASES = {
    **{f"{name}, rsample": lambda x, make=make: make(x).rsample().sin() for name, make in DRAWS.items()},
    **{f"{name}, sample": lambda x, make=make: make(x).sample() * x for name, make in STOPPED.items()},
    **VALUES,
}

#: PyTorch knows the first derivative of these draws, and no second.
FIRST_ONLY = {
    "Gamma": lambda x: D.Gamma(x, x.exp()),
    "Chi2": lambda x: D.Chi2(x),
    "StudentT": lambda x: D.StudentT(x + 1, x, x.exp()),
    "InverseGamma": lambda x: D.InverseGamma(x, x.exp()),
    "Beta": lambda x: D.Beta(x, x.exp()),
    "Dirichlet": lambda x: D.Dirichlet(x),
    "Dirichlets": lambda x: D.Dirichlet(torch.stack([x, x.exp()])),
}


@pytest.fixture
def x():
    return torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.fixture
def v():
    return [torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]


def transformed(f, x, v, second_order="plane"):
    """The sum's components, and the function that draws the same numbers."""

    def same(x):
        torch.manual_seed(SEED)
        return f(x).sum()

    hd = fomoh_fx.transform(lambda x: f(x).sum(), wrt="inputs", second_order=second_order)
    hd.trace(x, tangents=v)
    torch.manual_seed(SEED)
    return hd(x, tangents=v), same


@pytest.mark.parametrize("name", CASES)
def test_against_reverse_mode(name, x, v):
    out, same = transformed(CASES[name], x, v)
    y, tangents, crosses = reverse_over_reverse(same, (x,), v)
    for actual, expected in ((out.primal, y), (out.tangent, tangents), (out.hessian(), crosses)):
        assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("name", FIRST_ONLY)
def test_draws_with_a_first_derivative_only(name, x, v):
    def f(x):
        return FIRST_ONLY[name](x).rsample().sin()

    out, same = transformed(f, x, v, second_order=None)
    assert relative_error(out.tangent, slopes(same, (x,), v, "reverse")) < 1e-10
    message = r"(?s)(gamma|Dirichlet) sample is not known: use second_order=None.*test_distributions"
    with pytest.raises(FomohError, match=message):
        transformed(f, x, v)

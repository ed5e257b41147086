"""The garbage collector rests while a model is captured, and only then."""

import gc

import pytest
import torch

import fomoh_fx

X = torch.linspace(-1, 1, 3, dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collector(request):
    """Whether it is on before."""
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_it_rests_while_a_model_is_captured(collector):
    hd = fomoh_fx.transform(lambda x: x.sin() if gc.isenabled() else x.cos(), wrt="inputs")
    assert torch.equal(hd(X, tangents=(X[None],)).primal, X.cos())
    assert gc.isenabled() is collector


def test_a_refusal_starts_it_again(collector):
    with pytest.raises(fomoh_fx.CaptureError):
        fomoh_fx.transform(lambda x: x[x > 0].sum() if x.sum() > 0 else x.sum(), wrt="inputs")(X, tangents=(X[None],))
    assert gc.isenabled() is collector

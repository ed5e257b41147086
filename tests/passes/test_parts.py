"""Parts: splits become slices, with the same values."""

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fomoh_fx.passes.parts import take_apart
from fomoh_fx.passes.provenance import KEY, Provenance
from fomoh_fx.passes.verify import verify

X = torch.randn(6, 5)
CASES = {
    "split": lambda x: x.split(2, 1),
    "sizes": lambda x: x.split([1, 3, 2]),
    "chunk": lambda x: x.chunk(4),
    "negative axis": lambda x: x.split(3, -1),
    "unbind": lambda x: x.unbind(),
    "unbind along another axis": lambda x: x.unbind(-1),
    "one part twice": lambda x: [x.split(4)[1].sin(), x.split(4)[1].cos()],
    "nothing to take apart": lambda x: [x.sin()],
}


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    module = make_fx(lambda x: [part * 2 for part in CASES[name](x)], tracing_mode="fake")(X)
    for node in module.graph.nodes:
        node.meta[KEY] = Provenance(node.name, "primal")
    expected = module(X)
    taken = take_apart(module)
    taken.recompile()
    verify(taken, "parts")
    assert not taken.graph.find_nodes(op="call_function", target=operator.getitem)
    torch.testing.assert_close(taken(X), expected, rtol=0, atol=0)

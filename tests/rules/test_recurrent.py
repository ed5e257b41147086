"""Recurrent layers and cells: directions, layers, biases, projections, dropout."""

import copy

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.rules.registry import COMPOSITES
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layers(gates: int, states: int, *, bias=True, deep=1, both=False, projected=0, first=False) -> Sample:
    """A call with input size 3, hidden size 2, 2 steps and batch size 2."""
    hidden, directions = 2, 1 + both
    output = projected or hidden
    params, width = [], 3
    for _ in range(deep):
        for _ in range(directions):
            params += [r(gates * hidden, width), r(gates * hidden, output)]
            params += [r(gates * hidden), r(gates * hidden)] if bias else []
            params += [r(projected, hidden)] if projected else []
        width = directions * output
    sizes = (output, hidden)[:states]
    state = [r(deep * directions, 2, size) for size in sizes]
    options = (params, bias, deep, 0.0, True, both, first)
    return Sample((r(2, 2, 3), state if states == 2 else state[0], *options))


def samples(gates: int, states: int) -> list[Sample]:
    return [
        layers(gates, states),
        layers(gates, states, bias=False, first=True),
        layers(gates, states, deep=2, both=True),
    ]


def cell(gates: int, states: int, bias: bool = True) -> Sample:
    state = [r(2, 2) for _ in range(states)]
    params = [r(gates * 2, 3), r(gates * 2, 2), *([r(gates * 2), r(gates * 2)] if bias else [])]
    return Sample((r(2, 3), state if states == 2 else state[0], *params))


SAMPLES = {
    aten.lstm.input: [*samples(4, 2), layers(4, 2, deep=2, projected=1)],
    aten.gru.input: samples(3, 1),
    aten.rnn_tanh.input: samples(1, 1),
    aten.rnn_relu.input: samples(1, 1),
    aten.lstm_cell.default: [cell(4, 2), cell(4, 2, bias=False)],
    aten.gru_cell.default: [cell(3, 1), cell(3, 1, bias=False)],
    aten.rnn_tanh_cell.default: [cell(1, 1), cell(1, 1, bias=False)],
    aten.rnn_relu_cell.default: [cell(1, 1), cell(1, 1, bias=False)],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]
IDS = [f"{op}-{i}" for i, (op, _) in enumerate(CASES)]


@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_primal_equals_the_operator(op, sample):
    torch.testing.assert_close(COMPOSITES[op](*sample.args), op(*sample.args))


@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_rule(op, sample):
    check(op, sample, "plane", 2)


@pytest.mark.parametrize("second_order", ["diagonal", "trace"])
@pytest.mark.parametrize("op", [aten.lstm.input, aten.gru_cell.default])
def test_other_second_orders(op, second_order):
    check(op, SAMPLES[op][0], second_order)


LAYERS = {
    "lstm": (nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True), (2, 2, 3)),
    "gru": (nn.GRU(3, 2), (3, 2, 3)),
    "rnn, no batch": (nn.RNN(3, 2, nonlinearity="relu", batch_first=True), (2, 3)),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, train):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double().train(train)
    x, parameters = r(*shape), dict(layer.named_parameters())
    vs = {n: r(2, *p.shape) for n, p in parameters.items()}

    def loss(output):
        return output[0].square().sum()

    out = fomoh_fx.transform(layer, loss)(x, tangents=vs)

    def call(*values):
        return loss(torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,)))

    y, tangent, cross = reverse_over_reverse(call, list(parameters.values()), list(vs.values()))
    assert relative_error(out.primal, y) < 1e-9
    assert relative_error(out.tangent, tangent) < 1e-9
    assert relative_error(out.hessian(), cross) < 1e-9


def test_the_captured_graph_holds_the_layer_whole():
    layer = nn.LSTM(3, 2)
    hd = fomoh_fx.transform(layer, wrt="inputs")
    trace = hd.trace(torch.randn(4, 2, 3), tangents=(torch.randn(1, 4, 2, 3),))
    assert trace.stages["capture"].graph.find_nodes(op="call_function", target=aten.lstm.input)


def test_one_dropout_mask_serves_all_components():
    """The second layer passes on the first one's outputs after dropout: those that were dropped have no derivative."""
    layer = nn.RNN(1, 10, num_layers=2, dropout=0.5, nonlinearity="relu", bias=False).double()
    for name, parameter in layer.named_parameters():
        parameter.data = torch.eye(*parameter.shape).double() if name == "weight_ih_l1" else torch.ones_like(parameter)
        parameter.data *= name.startswith("weight_ih")
    x = torch.ones(1, 1, 1).double()
    out = fomoh_fx.transform(lambda x: layer(x)[0], wrt="inputs")(x, tangents=(torch.full((1, 1, 1, 1), 3.0).double(),))
    assert set(out.primal.flatten().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(out.tangent[0], out.primal * 3)

"""Recurrent layers and cells, unrolled over time: one product for the inputs of all steps, one for each step's state.

Weights are PyTorch's: for a layer and direction (w_ih, w_hh, b_ih, b_hh) and, for an LSTM with projections, w_hr, with
the gates one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Sequence[Tensor | None]], State]
linear = aten.linear.default


def _lstm_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c); h is projected where there is a w_hr."""
    _, w_hh, _, b_hh, *projection = weights
    h, c = state
    i, f, g, o = (gates + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (linear(h, projection[0]) if projection else h), c


def _gru_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """n = tanh(x_n + sigmoid(r) h_n), h = n + sigmoid(z) (h - n)."""
    (h,) = state
    x_r, x_z, x_n = gates.chunk(3, -1)
    h_r, h_z, h_n = linear(h, weights[1], weights[3]).chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (n + (x_z + h_z).sigmoid() * (h - n),)


def _tanh_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    return ((gates + linear(state[0], weights[1], weights[3])).tanh(),)


def _relu_step(gates: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    return ((gates + linear(state[0], weights[1], weights[3])).relu(),)


def _one_direction(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor | None], backwards: bool, kept: Tensor | None
) -> tuple[Tensor, State]:
    """The state h after every step [T, ..], and the last state."""
    gates = linear(x, weights[0], weights[2]).unbind(0)
    outputs = []
    for t in reversed(range(len(gates))) if backwards else range(len(gates)):
        new = step(gates[t], state, weights)
        if kept is not None:
            new = tuple(torch.where(kept[t].unsqueeze(-1), a, b) for a, b in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def layers(
    step: Step, x: Tensor, initial: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool = False, kept: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output of the last layer, and the last states of all layers and directions.

    ``kept`` [T, B] says at which steps a sequence is inside its length; at the others its state stays as it is.
    """
    if batch_first:
        x = x.transpose(0, 1)
    cells = (1 + bidirectional) * num_layers
    per_cell = len(params) // cells
    cell = iter(range(cells))
    last: list[State] = []
    for layer in range(num_layers):
        directions = []
        for backwards in (False, True)[: 1 + bidirectional]:
            at = next(cell)
            weights: list[Tensor | None] = list(params[at * per_cell : (at + 1) * per_cell])
            if not has_biases:
                weights[2:2] = [None, None]
            output, state = _one_direction(step, x, tuple(s[at] for s in initial), weights, backwards, kept)
            directions.append(output)
            last.append(state)
        x = torch.cat(directions, -1) if bidirectional else directions[0]
        if dropout > 0 and train and layer < num_layers - 1:
            x = aten.native_dropout.default(x, dropout, True)[0]
    if batch_first:
        x = x.transpose(0, 1)
    return x, *(torch.stack(states) for states in zip(*last, strict=True))


def _layered(step: Step) -> Composite:
    def body(x: Tensor, state: Tensor | Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
        return layers(step, x, [state] if isinstance(state, Tensor) else state, *options)

    return Composite(body)


def _cell(step: Step) -> Composite:
    def body(
        x: Tensor, state: Tensor | Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:  # fmt: skip
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        new = step(linear(x, w_ih, b_ih), states, (w_ih, w_hh, b_ih, b_hh))
        return new[0] if isinstance(state, Tensor) else new

    return Composite(body)


#: One step of each kind of layer.
STEPS: dict[str, Step] = {"lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _tanh_step, "rnn_relu": _relu_step}

for name, step in STEPS.items():
    register(getattr(aten, name).input, _layered(step))
    register(getattr(aten, f"{name}_cell").default, _cell(step))

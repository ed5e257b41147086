"""Higher-order operators: branches and loops stay what they are, and their bodies become hyper-dual.

A body is expanded once, by the same rules as the graph around it, whatever K and the number of iterations. What one
branch lacks and the other has, and what a loop carries from its second iteration on, is filled with zeros: the only
place where a structural zero is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import make_contiguous_strides_for
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, Undefined, primal_of
from fomoh_fx.passes.activity import analyse
from fomoh_fx.passes.expand import Expander, Scope
from fomoh_fx.passes.label import label, label_inputs
from fomoh_fx.passes.normalize import inputs_of, results_of
from fomoh_fx.passes.retrace import in_body, last_node
from fomoh_fx.rules.flex_attention import dense_attention
from fomoh_fx.rules.registry import Composite, register

higher_order = torch.ops.higher_order
Body = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """Which of several values have a tangent, and which a cross component."""

    tangents: tuple[bool, ...]
    crosses: tuple[bool, ...]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Pattern:
        parts = [v if isinstance(v, HyperDual) else HyperDual(v) for v in values]
        return cls(tuple(v.tangent is not None for v in parts), tuple(v.cross is not None for v in parts))

    def __or__(self, other: Pattern) -> Pattern:
        def either(a: tuple[bool, ...], b: tuple[bool, ...]) -> tuple[bool, ...]:
            return tuple(x or y for x, y in zip(a, b, strict=True))

        return Pattern(either(self.tangents, other.tangents), either(self.crosses, other.crosses))

    def __add__(self, other: Pattern) -> Pattern:
        return Pattern(self.tangents + other.tangents, self.crosses + other.crosses)

    def __getitem__(self, where: slice) -> Pattern:
        return Pattern(self.tangents[where], self.crosses[where])

    def __len__(self) -> int:
        return len(self.tangents)

    def completed(self, i: int, value: Any, components: Components) -> HyperDual:
        """The value number i with zeros for the components that it lacks, all in one layout."""
        value = value if isinstance(value, HyperDual) else HyperDual(value)

        def part(x: Tensor | None, count: int) -> Tensor:
            return _in_order(value.primal.new_zeros((count, *value.primal.shape)) if x is None else x)

        primal = _in_order(value.primal) if isinstance(value.primal, Tensor) else value.primal
        tangent = part(value.tangent, components.directions) if self.tangents[i] else None
        return HyperDual(primal, tangent, part(value.cross, components.count) if self.crosses[i] else None)

    def pack(self, values: Sequence[Any], components: Components) -> list[Any]:
        """The primals, then the tangents, then the crosses, completed."""
        return _flat([self.completed(i, value, components) for i, value in enumerate(values)])

    def unpack(self, flat: Sequence[Any]) -> list[Any]:
        """The values again; a plain one where there is no component."""
        primals, parts = flat[: len(self)], iter(flat[len(self) :])
        tangents = [next(parts) if t else None for t in self.tangents]
        crosses = [next(parts) if c else None for c in self.crosses]
        duals = [HyperDual(*three) for three in zip(primals, tangents, crosses, strict=True)]
        return [d if d.active else d.primal for d in duals]

    @property
    def width(self) -> int:
        """How many values :meth:`pack` makes."""
        return len(self) + sum(self.tangents) + sum(self.crosses)


def _in_order(x: Tensor) -> Tensor:
    """With the usual strides, also of axes of size one: they may not differ between branches or iterations."""
    if statically_known_true(sym_eq(tuple(x.stride()), make_contiguous_strides_for(x.shape))):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _flat(duals: Sequence[HyperDual]) -> list[Any]:
    parts = [*(d.tangent for d in duals), *(d.cross for d in duals)]
    return [*(d.primal for d in duals), *(x for x in parts if x is not None)]


class HyperDualBody:
    """The normalised body of a higher-order operator on hyper-dual values, for inputs of one pattern."""

    def __init__(self, body: fx.GraphModule, components: Components, given: Pattern) -> None:
        self.module, self.components, self.given = body, components, given
        varied = [t or c for t, c in zip(given.tangents, given.crosses, strict=True)]
        seeds = [n for n, is_varied in zip(inputs_of(body), varied, strict=True) if is_varied]
        asked = [r for r in results_of(body) if isinstance(r, fx.Node)]
        self.scope = Scope(analyse(body.graph, seeds, asked).active)

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        out = Expander(self.module, self.components, self.scope).run(*values)
        found = list(out) if isinstance(out, (list, tuple)) else [out]
        if any(isinstance(v, Undefined) for v in found):
            raise UnsupportedOpError("its body returns a value for which PyTorch defines no derivative")
        return found

    @property
    def results(self) -> Pattern:
        """The pattern of the outputs, from a run that computes no data."""
        with disable_proxy_modes_tracing():
            primals = [n.meta["val"] for n in inputs_of(self.module)]
            return Pattern.of(self(self.given.unpack(self.given.pack(primals, self.components))))

    def traced(self, given: Sequence[Pattern], wanted: Sequence[Pattern]) -> Body:
        """The body as a function of plain values: each group of inputs packed by itself, and each one of outputs."""

        def function(*flat: Any) -> tuple[Any, ...]:
            inputs = unpacked(flat, given)
            label_inputs(inputs_of(self.module), inputs)
            results = iter(zip(results_of(self.module), self(inputs), strict=True))
            seen = {_memory(x) for x in flat if isinstance(x, Tensor)}
            outputs: list[Any] = []
            for pattern in wanted:
                duals = []
                for i in range(len(pattern)):
                    (n, value), before = next(results), last_node()
                    duals.append(_owned(pattern.completed(i, value, self.components), seen))
                    if isinstance(n, fx.Node):
                        label(n, before, duals[-1])
                outputs += _flat(duals)
            return tuple(outputs)

        return in_body(function)


def _owned(value: HyperDual, seen: set[int]) -> HyperDual:
    """The value, copied where it shares memory with an input or another output, which the operators forbid."""

    def owned(x: Any) -> Any:
        if isinstance(x, Tensor):
            x = x.clone() if _memory(x) in seen else x
            seen.add(_memory(x))
        return x

    return HyperDual(owned(value.primal), owned(value.tangent), owned(value.cross))


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def unpacked(flat: Sequence[Any], patterns: Sequence[Pattern]) -> list[Any]:
    """The values of several groups, each packed by itself."""
    values: list[Any] = []
    for pattern in patterns:
        values += pattern.unpack(flat[: pattern.width])
        flat = flat[pattern.width :]
    return values


def _cond(
    op: Any, components: Components, pred: Any, true: fx.GraphModule, false: fx.GraphModule, operands: Any = ()
) -> Any:
    """Both branches return the components that either has."""
    given = Pattern.of(operands)
    bodies = [HyperDualBody(branch, components, given) for branch in (true, false)]
    wanted = reduce(Pattern.__or__, (body.results for body in bodies))
    branches = [body.traced([given], [wanted]) for body in bodies]
    return tuple(wanted.unpack(op(primal_of(pred), *branches, tuple(given.pack(operands, components)))))


def _carried(
    body: fx.GraphModule, components: Components, state: Pattern, *rest: Pattern
) -> tuple[HyperDualBody, Pattern]:
    """The body for the smallest pattern of carried values that one iteration maps to itself, and that pattern."""
    while True:
        dual = HyperDualBody(body, components, reduce(Pattern.__add__, rest, state))
        after = state | dual.results[: len(state)]
        if after == state:
            return dual, state
        state = after


def _while_loop(
    op: Any, components: Components, cond: fx.GraphModule, body: fx.GraphModule, carried: Any, additional: Any
) -> Any:
    """The loop also carries components; its condition sees primals only."""
    rest = Pattern.of(additional)
    dual, state = _carried(body, components, Pattern.of(carried), rest)
    condition = HyperDualBody(cond, components, state + rest).traced([state, rest], [Pattern((False,), (False,))])
    packed = (tuple(p.pack(v, components)) for p, v in ((state, carried), (rest, additional)))
    step = dual.traced([state, rest], [state])
    return tuple(state.unpack(op(lambda *flat: condition(*flat)[0], step, *packed)))


def _scan(op: Any, components: Components, combine: fx.GraphModule, init: Any, xs: Any, additional: Any = ()) -> Any:
    slices, rest = Pattern.of(xs), Pattern.of(additional)
    dual, state = _carried(combine, components, Pattern.of(init), slices, rest)
    outputs = dual.results[len(state) :]
    step = dual.traced([state, slices, rest], [state, outputs])
    flat = op(
        lambda *values: list(step(*values)),
        state.pack(init, components),
        _slices_first(slices, slices.pack(xs, components)),
        tuple(rest.pack(additional, components)),
    )
    carry, stacked = flat[: state.width], flat[state.width :]
    return (*state.unpack(carry), *outputs.unpack(_slices_first(outputs, stacked)))


def _map(op: Any, components: Components, body: fx.GraphModule, xs: Any, additional: Any = ()) -> Any:
    slices, rest = Pattern.of(xs), Pattern.of(additional)
    dual = HyperDualBody(body, components, slices + rest)
    outputs = dual.results
    mapped = _slices_first(slices, slices.pack(xs, components))
    flat = op(dual.traced([slices, rest], [outputs]), mapped, rest.pack(additional, components))
    return tuple(outputs.unpack(_slices_first(outputs, flat)))


def _slices_first(pattern: Pattern, packed: Sequence[Any]) -> list[Any]:
    """Exchange the first two axes of the components, so that a slice along the scanned axis is [K, ...]; and back."""
    return [*packed[: len(pattern)], *(part.transpose(0, 1).contiguous() for part in packed[len(pattern) :])]


# Composites: what runs its body once is its body.


def _associative_scan(combine: Body, xs: Any, additional: Any = ()) -> Any:
    """In logarithmically many steps, each of which combines every second element with its neighbour."""
    xs = list(xs)
    across = torch.vmap(combine, in_dims=(0,) * (2 * len(xs)) + (None,) * len(additional))

    def combined(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        return pytree.tree_leaves(across(*left, *right, *additional))

    def scan(values: list[Tensor]) -> list[Tensor]:
        count = values[0].shape[0]
        if count < 2:
            return values
        odd = scan(combined([v[0 : count - 1 : 2] for v in values], [v[1::2] for v in values]))
        if count == 2:
            return [torch.cat([v[:1], o]) for v, o in zip(values, odd, strict=True)]
        inner = combined([o[: (count - 1) // 2] for o in odd], [v[2::2] for v in values])
        even = [torch.cat([v[:1], e]) for v, e in zip(values, inner, strict=True)]
        return [_interleaved(e, o) for e, o in zip(even, odd, strict=True)]

    return tuple(scan(xs))


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    count = odd.shape[0]
    pairs = torch.stack([even[:count], odd], 1).flatten(0, 1)
    return pairs if even.shape[0] == count else torch.cat([pairs, even[count:]])


def _inlined(body: Body, *operands: Any) -> Any:
    return body(*operands)


def _with_grad_mode(enabled: bool, body: Body, *operands: Any) -> Any:
    """Under no_grad every result is a constant."""
    out = body(*operands)
    stop = torch.ops.fomoh_fx.stop_gradient.default
    return out if enabled else pytree.tree_map_only(Tensor, lambda t: stop(t) if t.is_floating_point() else t, out)


def _with_autocast(device: str, dtype: Any, enabled: bool, cache: Any, body: Body, *operands: Any) -> Any:
    with torch.autocast(device, dtype, enabled, cache):
        return body(*operands)


RULES: dict[Any, Any] = {
    higher_order.cond: _cond,
    higher_order.while_loop: _while_loop,
    higher_order.scan: _scan,
    higher_order.map_impl: _map,
}
COMPOSITES: dict[Any, Callable[..., Any]] = {
    higher_order.associative_scan: _associative_scan,
    higher_order.flex_attention: dense_attention,
    higher_order.invoke_subgraph: lambda body, identifier, *operands: body(*operands),
    higher_order.tag_activation_checkpoint: _inlined,
    higher_order.wrap: _inlined,
    higher_order.wrap_with_set_grad_enabled: _with_grad_mode,
    higher_order.wrap_with_autocast: _with_autocast,
}
for op, rule in RULES.items():
    register(op, rule, "control flow")
for op, inlined in COMPOSITES.items():
    register(op, Composite(inlined))

"""Expand: every node becomes its hyper-dual expansion, by its rule.

Contract: a normalised graph and its seeded inputs in; out comes a graph whose inputs are the primal inputs followed by
one stack of tangents ``[K, *shape]`` for each seed, and whose output is the flat tuple of primals, then tangents, then
cross components (the structural zeros left out; :class:`Layout` says which). A node whose arguments have no component
is copied as it is, so a structural zero is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from fomoh_fx.errors import FomohError, UnsupportedOpError
from fomoh_fx.functional_forms import CHANGING
from fomoh_fx.hyperdual import Components, HyperDual, Undefined, primal_of
from fomoh_fx.low_rank import LowRank
from fomoh_fx.passes import provenance
from fomoh_fx.passes.label import FACTORS, label, label_rest, label_whole, renamed
from fomoh_fx.passes.normalize import explained, failed, inputs_of
from fomoh_fx.passes.retrace import in_body, last_node, retrace
from fomoh_fx.rules.low_rank import multiplied_out
from fomoh_fx.rules.registry import FACTORED, RULES, Operator, Rule, rule_for

#: How a tangent is given: the rank of its factors (:class:`LowRank`), the axes along which it is alike and has one
#: element in place of all, or None where it is whole.
Form = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Layout:
    """Which outputs have which component: the flat output is the primals, then the tangents, then the crosses."""

    primals: int
    tangents: tuple[int, ...]
    crosses: tuple[int, ...]

    def unpack(self, flat: Sequence[Any]) -> list[HyperDual]:
        """One HyperDual for each output, None for structural zeros."""
        middle = self.primals + len(self.tangents)
        tangents = dict(zip(self.tangents, flat[self.primals : middle], strict=True))
        crosses = dict(zip(self.crosses, flat[middle:], strict=True))
        return [HyperDual(flat[i], tangents.get(i), crosses.get(i)) for i in range(self.primals)]


@dataclass(frozen=True)
class Scope:
    """What of a graph is expanded.

    ``active`` nodes carry components; the ``first_order`` ones among them (inside the model, for the generalised
    Gauss-Newton plane) carry tangents only.
    """

    active: Collection[fx.Node]
    first_order: Collection[fx.Node] = field(default_factory=frozenset)


class Expander(fx.Interpreter):
    """Interprets a graph on hyper-dual values, each node by its rule; inputs without components are plain tensors."""

    def __init__(self, module: fx.GraphModule, components: Components, scope: Scope, label: bool = True) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.components, self.scope, self.labelled = components, scope, label
        self.extra_traceback = False  # errors of ours say where in the user's own code
        self.tangents_only = replace(components, second_order=None)
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        before = last_node() if self.labelled else None
        result = super().run_node(n)
        if self.labelled:
            label(n, before, result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        n = self.current
        assert n is not None
        if not isinstance(target, Operator):  # getitem, and arithmetic on sizes
            return target(*args, **kwargs)
        carried = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, HyperDual))
        if n not in self.scope.active or not any(isinstance(x, (HyperDual, Undefined)) for x in carried):
            bodies = self._copied if target in RULES else lambda body: body
            args, kwargs = pytree.tree_map_only(fx.GraphModule, bodies, (primal_of(tuple(args)), primal_of(kwargs)))
            return target(*args, **kwargs)
        if any(isinstance(x, Undefined) for x in pytree.tree_leaves((args, kwargs))):
            reason = "an argument is an output of another operator for which PyTorch defines no derivative"
            raise UnsupportedOpError(explained(n, reason))
        components = self.tangents_only if n in self.scope.first_order else self.components
        try:
            rule, args, kwargs = _fitting(target, args, kwargs)
            result = rule(target, components, *args, **kwargs)
            if not rule.__module__.startswith("fomoh_fx.") and target not in CHANGING:  # our own may broadcast
                _check_result(result, n.meta["val"], components)
            return pytree.tree_map(
                lambda x: _settled(x, components), result, is_leaf=lambda x: isinstance(x, HyperDual)
            )
        except FomohError as error:
            raise type(error)(explained(n, str(error))) from error
        except Exception as error:
            raise UnsupportedOpError(failed(n, "its rule", error)) from error

    def _copied(self, body: fx.GraphModule) -> Callable[..., Any]:
        """A body without components, to be labelled when the operator runs it."""
        return in_body(Expander(body, self.components, Scope(frozenset()), self.labelled).run)


def _fitting(op: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Rule, Any, Any]:
    """The operator's rule and the arguments as it takes them: few know what to do with tangents of low rank."""
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, HyperDual))
    if not any(isinstance(x, HyperDual) and isinstance(x.tangent, LowRank) for x in leaves):
        return rule_for(op), args, kwargs
    if op in FACTORED:
        return FACTORED[op], args, kwargs
    return rule_for(op), *pytree.tree_map(multiplied_out, (args, kwargs), is_leaf=lambda x: isinstance(x, HyperDual))


def _check_result(result: Any, value: Any, components: Components) -> None:
    """What a user's rule returns: one HyperDual or tensor for each output, of its shape and after K or C of it."""
    found, outputs = ([x] if not isinstance(x, (list, tuple)) else [*x] for x in (result, value))
    if len(found) != len(outputs) or isinstance(result, (list, tuple)) != isinstance(value, (list, tuple)):
        raise UnsupportedOpError(
            f"its rule returns {type(result).__name__} where the operator has {len(outputs)} outputs"
        )
    for x, y in zip(found, outputs, strict=True):
        if not isinstance(y, Tensor):
            continue
        if not isinstance(x, (HyperDual, Tensor)):
            raise UnsupportedOpError(f"its rule returns {type(x).__name__} for an output, not a HyperDual or a tensor")
        parts = [x.primal, x.tangent, x.cross] if isinstance(x, HyperDual) else [x, None, None]
        for name, part, lead in zip(
            ("primal", "tangent", "cross"), parts, ((), (components.directions,), (components.count,)), strict=True
        ):
            shape = (*lead, *y.shape)
            if isinstance(part, Tensor) and not statically_known_true(sym_eq(tuple(part.shape), shape)):
                raise UnsupportedOpError(
                    f"its rule gives a {name} of shape {list(part.shape)}, and that of its output is {list(shape)}"
                )


def _settled(x: Any, components: Components) -> Any:
    """A rule's result in its final form: components in the primal's dtype and shape; a plain tensor without any."""
    if not isinstance(x, HyperDual):
        return x
    x = HyperDual(
        x.primal,
        _fitted(x.tangent, x.primal, components.directions),
        _fitted(x.cross, x.primal, components.count) if components.second_order else None,
    )
    return x if x.active else x.primal


def _fitted(part: Tensor | None, primal: Tensor, count: int) -> Tensor | None:
    if part is None:
        return None
    if part.dtype != primal.dtype:
        part = part.to(primal.dtype)
    shape = (count, *primal.shape)
    return part if statically_known_true(sym_eq(tuple(part.shape), shape)) else part.expand(shape)


def expand(
    module: fx.GraphModule, seeds: Mapping[fx.Node, Form], asked: Sequence[int], components: Components,
    scope: Scope, first_order: bool = True,
) -> tuple[fx.GraphModule, Layout]:  # fmt: skip
    """The hyper-dual expansion of the graph.

    Args:
        module: the normalised graph.
        seeds: the placeholders that have a tangent, in the order in which the tangents become inputs, and the form in
            which each is given.
        asked: the positions of the outputs whose components are asked for.
        components: which components to propagate.
        scope: the active nodes, and those of them that carry tangents only.
        first_order: whether the tangents are asked for.
    """
    placeholders = inputs_of(module)
    inputs = [n.meta["val"] for n in placeholders]
    like = [_tangent_like(n.meta["val"], components.directions, form) for n, form in seeds.items()]
    tangents, structure = pytree.tree_flatten(like)
    expander = Expander(module, components, scope)
    layout = Layout(0, (), ())

    def expansion(*values: Any) -> tuple[Any, ...]:
        nonlocal layout
        primals, given = values[: len(inputs)], pytree.tree_unflatten(values[len(inputs) :], structure)
        stacks = {
            n: v.expand(-1, *n.meta["val"].shape) if isinstance(form, tuple) else v
            for (n, form), v in zip(seeds.items(), given, strict=True)
        }
        label_whole([n for n, form in seeds.items() if isinstance(form, tuple)], stacks)
        seeded = [HyperDual(p, stacks[n]) if n in stacks else p for n, p in zip(placeholders, primals, strict=True)]
        outputs = list(expander.run(*seeded))
        if any(isinstance(outputs[i], Undefined) for i in asked):
            raise UnsupportedOpError("model: returns a value for which PyTorch defines no derivative")
        duals = [x if isinstance(x := multiplied_out(outputs[i]), HyperDual) else HyperDual(x) for i in asked]
        with_tangent = [
            (i, d.tangent) for i, d in zip(asked, duals, strict=True) if first_order and d.tangent is not None
        ]
        with_cross = [(i, d.cross) for i, d in zip(asked, duals, strict=True) if d.cross is not None]
        layout = Layout(len(outputs), tuple(i for i, _ in with_tangent), tuple(i for i, _ in with_cross))
        crosses = [c.squeeze(0) if components.second_order == "trace" else c for _, c in with_cross]
        return (*primal_of(outputs), *(t for _, t in with_tangent), *crosses)

    expanded = retrace(expansion, [*inputs, *tangents])
    labels = [(n.name, "primal", n) for n in placeholders]
    for n, form in seeds.items():
        labels += [
            (f"{n.name}_tangent{factor}", "tangent", n) for factor in (FACTORS if isinstance(form, int) else ("",))
        ]
    for (name, component, n), node in zip(labels, inputs_of(expanded), strict=True):
        node.name = node.target = name
        node.meta[provenance.KEY] = provenance.Provenance(n.name, component)
    label_rest(expanded)
    return renamed(expanded), layout


def _tangent_like(value: Tensor, directions: int, form: Form) -> Tensor | LowRank:
    def empty(*sizes: int | SymInt) -> Tensor:
        return torch.empty((directions, *sizes), dtype=value.dtype, device=value.device)

    with value.fake_mode:  # type: ignore[attr-defined]
        if isinstance(form, int):
            return LowRank(empty(value.shape[0], form), empty(form, *value.shape[1:]))
        return empty(*(1 if d in (form or ()) else size for d, size in enumerate(value.shape, 1)))

"""Normalize: every operator that a derivative passes through becomes one that has a rule.

Contract: a functional ATen graph in, a functional ATen graph out with the same inputs and outputs. Composites on an
active path are replaced by their bodies, operators without a rule by PyTorch's own decompositions where those exist.
Views become reshapes, for a body may return another memory layout than its operator; random numbers are drawn in the
captured layout, in which the model draws them, and what reads memory by strides reads it in that layout, as an
index. Identities (alias) and
assertions on shapes and dtypes are dropped. Inactive operators stay whole: nobody differentiates them. The body of
an active higher-order operator is normalised as if all of its inputs were active.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from fomoh_fx.decompositions import core_decompositions
from fomoh_fx.errors import FomohError, UnsupportedOpError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.activity import analyse, carries_derivative
from fomoh_fx.passes.data_sizes import ADVICE, has_sizes_from_data, is_decided_by_data
from fomoh_fx.passes.dataflow import draws
from fomoh_fx.passes.label import label_rest
from fomoh_fx.passes.retrace import in_body, is_composite_implicit, last_node, recorded_nodes, retrace
from fomoh_fx.rules.linear import BY_STRIDES, storage_index
from fomoh_fx.rules.registry import COMPOSITES, RULES, spelled
from fomoh_fx.sizes import known

aten = torch.ops.aten
IDENTITIES = {aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}
RESHAPES = {op: aten.reshape.default for op in (aten.view.default, aten._unsafe_view.default)}  # in any layout
STATIC_QUESTIONS = {aten.is_same_size.default, aten._has_same_storage_numel.default}  # forward mode inside a model asks
STATIC_ASSERTIONS = {aten._assert_tensor_metadata.default}  # the signature already says so; those on data stay


class _Decompositions(dict[Any, Callable[..., Any]]):
    """The composites of the registry, then PyTorch's core decompositions of what has no rule; off where inactive."""

    def __init__(self) -> None:
        own = {op: self._while_active(body) for op, body in COMPOSITES.items()}
        torchs = {op: self._while_active(f) for op, f in core_decompositions().items() if op not in RULES}
        super().__init__({**torchs, **own})
        self.active = False

    def _while_active(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: body(*args, **kwargs) if self.active else NotImplemented


class _Normalizer(fx.Interpreter):
    """Calls the operators of a graph again, the active ones by their bodies where they have no rule."""

    def __init__(self, module: fx.GraphModule, active: frozenset[fx.Node], table: _Decompositions) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.active, self.table = active, table
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        before, self.current = last_node(), n
        outside, self.table.active = self.table.active, n in self.active and n.target not in RULES
        try:
            result = super().run_node(n)
        except FomohError as error:
            raise type(error)(explained(n, str(error))) from error
        except Exception as error:
            raise UnsupportedOpError(failed(n, "its body", error)) from error
        finally:
            self.table.active = outside
        source = provenance.of(n).source
        for node in recorded_nodes(before):  # what a body that is inlined has recorded says more
            node.meta.setdefault(provenance.KEY, provenance.Provenance(node.name, "primal", source))
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        target = RESHAPES.get(target, target)
        if target in IDENTITIES:
            return args[0]
        if target in STATIC_ASSERTIONS:
            return None
        if target in STATIC_QUESTIONS:
            with disable_proxy_modes_tracing():
                return target(*args)
        if target is aten._efficientzerotensor.default:  # forward mode inside a model; Inductor cannot read it
            return aten.zeros.default(*args, **kwargs)
        if target in BY_STRIDES:
            return self._by_index(target, *args)
        if draws(target):
            args = self._in_captured_layout(args)
        if target in RULES or (self.table.active and target in self.table):
            args = pytree.tree_map_only(fx.GraphModule, self._in_body, args)
        if self.table.active and target in self.table:
            return self.table[target](*args, **kwargs)
        if self.table.active and is_composite_implicit(target):
            return target.decompose(*args, **kwargs)
        return target(*args, **kwargs)

    def _in_captured_layout(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with the first one laid out as at capture: PyTorch draws in the order of its memory."""
        captured = self.current.args[0] if self.current is not None and args else None
        if not isinstance(captured, fx.Node) or not isinstance(args[0], Tensor):
            return args
        x, stride = args[0], [known(s) for s in captured.meta["val"].stride()]
        if None in stride or [known(s) for s in x.stride()] == stride:  # sizes that only the data decide have no order
            return args
        order = sorted(range(x.ndim), key=lambda d: stride[d] or 0, reverse=True)
        stored = x.permute(order).clone(memory_format=torch.contiguous_format)
        return (stored.permute([order.index(d) for d in range(x.ndim)]), *args[1:])

    def _by_index(self, target: Any, x: Tensor, *args: Any) -> Any:
        """What the strides reach in the captured layout: where copies are left out, the value has another one."""
        assert self.current is not None
        argument = self.current.args[0]
        assert isinstance(argument, fx.Node)
        *source, size, stride, offset = args if isinstance(args[-1], (int, SymInt, NoneType)) else (*args, None)
        try:
            order, index = storage_index(x, size, stride, offset, argument.meta["val"])
        except UnsupportedOpError:
            if self.current in self.active or argument.op != "placeholder":
                raise
            return target(x, *args)
        flat = x.permute(order).reshape(-1)
        if not source:
            return aten.index.Tensor(flat, [index])
        new = aten.index_put.default(flat, [index], *source).reshape([x.shape[d] for d in order])
        return new.permute([order.index(d) for d in range(x.ndim)])

    def _in_body(self, body: fx.GraphModule) -> Callable[..., Any]:
        """A body of the current operator, to be normalised when the operator or its own body runs it."""
        active: frozenset[fx.Node] = frozenset()
        if self.current in self.active:
            seeds = [n for n in inputs_of(body) if carries_derivative(n)]
            active = analyse(body.graph, seeds, [r for r in results_of(body) if isinstance(r, fx.Node)]).active
        return in_body(_Normalizer(body, active, self.table).run)


def explained(node: fx.Node, reason: str) -> str:
    """The text of an error about a node: the operator, the reason, the user's line, what to do."""
    name = spelled(node.target)
    has_rule = not reason.startswith("no rule")
    advice = f"fomoh_fx.register_rule({name}, rule) gives it a rule"
    if has_rule and has_sizes_from_data(node):
        advice = ADVICE
    elif has_rule and len(dtypes := _floating_dtypes(node)) > 1:
        advice = f"its arguments are of {' and '.join(dtypes)}, which PyTorch itself may refuse: cast them to one (.to)"
    return f"operator {name}: {reason}{_where(node)}\n  {advice}"


def _floating_dtypes(node: fx.Node) -> list[str]:
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return sorted({str(x.dtype) for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()})


def failed(node: fx.Node, what: str, error: Exception) -> str:
    """The text of an error that is not ours: PyTorch's own where it fails, the data's part in plain words."""
    if is_decided_by_data(error):
        name = spelled(node.target)
        return f"operator {name}: {what} needs a size or a value that only the data decide{_where(node)}\n  {ADVICE}"
    return explained(node, f"{what} failed with {last_line(error)}")


def _where(node: fx.Node) -> str:
    source = provenance.of(node).source
    return f"\n  at {source}" if source else ""


def last_line(error: Exception) -> str:
    """The type and the message of an error that is not ours."""
    return traceback.format_exception_only(error)[-1].strip()


def normalize(module: fx.GraphModule, active: frozenset[fx.Node]) -> fx.GraphModule:
    """The graph in terms of operators with rules, wherever the ``active`` nodes are."""
    table = _Decompositions()
    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    normalizer = _Normalizer(module, active, table)
    normalized = retrace(lambda *values: normalizer.run(*values), inputs, table)
    for old, new in zip(inputs_of(module), inputs_of(normalized), strict=True):
        new.meta[provenance.KEY] = provenance.Provenance(old.name, "primal")
        new.name = new.target = old.name
    label_rest(normalized)
    normalized.recompile()
    return normalized


def inputs_of(module: fx.GraphModule) -> list[fx.Node]:
    """The placeholders, in order."""
    return module.graph.find_nodes(op="placeholder")


def results_of(module: fx.GraphModule) -> list[fx.Node]:
    """The returned nodes, in order."""
    results = module.graph.output_node().args[0]
    return list(results) if isinstance(results, (list, tuple)) else [results]  # type: ignore[arg-type,list-item]

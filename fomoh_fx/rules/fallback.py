"""Rules for operators without one: the first derivative from PyTorch, the second by differentiating its graph.

T(x, v) = phi'(x)[v] is traced to a graph, from PyTorch's forward-mode formula or, where there is none, by transposing
the reverse-mode one: T(x, v) = d/dg <v, phi'(x)^T g>. Its expansion by our own rules gives
phi''(x)[x_i, x_j] = d/dx T(x, x_i)[x_j]. PyTorch's nested forward mode is never used: it is silently wrong for several
operators. A custom autograd Function is served the same way, by its own backward. Where that is a surrogate, the
derivative of the gradient need not be symmetric: cross components are v_i^T (H + H^T)/2 v_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from fomoh_fx.custom_functions import CALLS, FUNCTIONS, apply_of_library, functions_called
from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.functional_forms import CHANGING
from fomoh_fx.hyperdual import Components, HyperDual, Undefined, add
from fomoh_fx.literals import known_literals
from fomoh_fx.passes.activity import analyse
from fomoh_fx.passes.dataflow import draws
from fomoh_fx.passes.eliminate import eliminate
from fomoh_fx.passes.expand import Layout, Scope, expand
from fomoh_fx.passes.normalize import inputs_of, normalize, results_of
from fomoh_fx.passes.retrace import node_of, retrace
from fomoh_fx.passes.simplify import simplify
from fomoh_fx.rules.linear import joined
from fomoh_fx.rules.random import SHAPES
from fomoh_fx.rules.registry import DEFAULT, Operator, Rule, overloads

Function = Callable[..., Any]


def from_jvp(push: Callable[..., Any], kind: str = "jvp", symmetric: bool = True) -> Rule:
    """The rule of an operator whose first derivative is given as a function.

    Args:
        symmetric: False where ``push`` may be no true derivative, so that the second one depends on the order of the
            directions: components then have its symmetric part.
        push: ``push(op, active, tangents, *args, **kwargs)`` returns phi'(x)[v] in the structure of the output, written
            in differentiable torch functions of the primals; ``active`` numbers the tensor leaves of ``args`` and
            ``kwargs`` that have a component and ``tangents`` are theirs. The second derivative is derived from it.
    """

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, HyperDual))
        plain = [leaf.primal if isinstance(leaf, HyperDual) else leaf for leaf in leaves]
        active = [i for i, leaf in enumerate(leaves) if isinstance(leaf, HyperDual)]
        values, options = pytree.tree_unflatten(plain, spec)
        y = op(*values, **options)

        def first(xs: Sequence[Tensor], vs: Sequence[Tensor], which: Sequence[int]) -> list[Tensor]:
            at = dict(zip(active, xs, strict=True))
            args, kwargs = pytree.tree_unflatten([at.get(i, p) for i, p in enumerate(plain)], spec)
            return pytree.tree_leaves(push(op, which, vs, *args, **kwargs))

        derivative = _Derivative(first, active, [plain[i] for i in active], symmetric)
        duals = [leaves[i] for i in active]
        tangent = derivative.first([d.tangent for d in duals])
        cross: Sequence[Tensor | None] | None = None
        if components.second_order is not None:
            cross = derivative.first([d.cross for d in duals])
            try:
                second = derivative.second([d.tangent for d in duals], components)
            except UnsupportedOpError as error:
                reason = str(error).splitlines()[0]
                raise UnsupportedOpError(f"its first derivative cannot be differentiated exactly ({reason})") from error
            cross = _sum(cross, second)
        return _without_derivative(op, y, joined(y, _spread(y, tangent), _spread(y, cross)), leaves, spec, active)

    rule.kind = kind  # type: ignore[attr-defined]
    return rule


def _without_derivative(
    op: Callable[..., Any], y: Any, result: Any, leaves: list[Any], spec: pytree.TreeSpec, active: Sequence[int]
) -> Any:
    """The result with its non-differentiable floating-point outputs marked, so that nobody differentiates them.

    PyTorch treats layer_norm's mean or a determinant's LU factors as constants; formulas that use them lose a term.
    """
    outputs = pytree.tree_leaves(y)
    if op in FUNCTIONS or sum(map(_is_differentiable, outputs)) < 2:  # a Function says itself what is constant
        return result
    fresh = list(leaves)
    with disable_proxy_modes_tracing(), torch.enable_grad():
        for i, leaf in enumerate(leaves):
            plain = leaf.primal if isinstance(leaf, HyperDual) else leaf
            if isinstance(plain, Tensor):
                plain = _fresh([plain])[0].requires_grad_(i in active)
            fresh[i] = plain
        args, kwargs = pytree.tree_unflatten(fresh, spec)
        connected = [isinstance(o, Tensor) and o.requires_grad for o in pytree.tree_leaves(op(*args, **kwargs))]
    parts, out_spec = pytree.tree_flatten(result, is_leaf=lambda x: isinstance(x, HyperDual))
    marked = [
        Undefined(primal) if _is_differentiable(primal) and not has else part
        for primal, has, part in zip(outputs, connected, parts, strict=True)
    ]
    return pytree.tree_unflatten(marked, out_spec)


def _spread(y: Any, parts: Sequence[Tensor | None] | None) -> list[Tensor | None] | None:
    """The parts of the floating-point outputs at their places among all outputs."""
    if parts is None:
        return None
    given = iter(parts)
    return [next(given) if _is_differentiable(leaf) else None for leaf in pytree.tree_leaves(y)]


def _sum(a: Sequence[Tensor | None] | None, b: Sequence[Tensor | None] | None) -> Sequence[Tensor | None] | None:
    if a is None or b is None:
        return a if b is None else b
    return [add(x, y) for x, y in zip(a, b, strict=True)]


class _Derivative:
    """T(x, v) and d/dx T(x, v)[u] as graphs of their own, applied to stacks."""

    def __init__(
        self, push: Callable[..., list[Tensor]], active: Sequence[int], xs: Sequence[Tensor], symmetric: bool
    ) -> None:
        self.push, self.active, self.xs, self.symmetric = push, active, xs, symmetric

    def _abstract(self) -> ExitStack:
        """Graphs are recorded apart from a trace under way, on fake tensors also where the rule runs on real ones."""
        stack = ExitStack()
        stack.enter_context(disable_proxy_modes_tracing())
        if detect_fake_mode(list(self.xs)) is None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return stack

    def first(self, parts: Sequence[Tensor | None]) -> list[Tensor] | None:
        """T(x, v_i) for stacks of v; None where no argument has the component."""
        which = [i for i, part in enumerate(parts) if part is not None]
        if not which:
            return None
        with self._abstract():
            module = self._first_graph(which)
        return self._over_stacks(module, [parts[i] for i in which])

    def second(self, parts: Sequence[Tensor | None], components: Components) -> list[Tensor | None] | None:
        """sum_ij S_c,ij d/dx T(x, x_i)[x_j]; None where T does not depend on x."""
        which = [i for i, part in enumerate(parts) if part is not None]
        if not which:
            return None
        with self._abstract():
            module, layout = self._second_graph(which)
        if not layout.tangents:
            return None
        stacks = [part for part in parts if part is not None]
        left, right = zip(*map(components.ends, stacks), strict=True)
        found = self._over_stacks(module, [*left, *right])
        if components.spans_pairs and not self.symmetric:
            found = [0.5 * (a + b) for a, b in zip(found, self._over_stacks(module, [*right, *left]), strict=True)]
        values = dict(zip(layout.tangents, found, strict=True))
        full = [values.get(i) for i in range(layout.primals)]
        return full if components.spans_pairs else [None if v is None else components.reduce(v) for v in full]

    def _over_stacks(self, module: fx.GraphModule, stacks: Sequence[Tensor | None]) -> list[Tensor]:
        run = fx.Interpreter(module).run
        return list(torch.vmap(lambda *vs: tuple(run(*self.xs, *vs)))(*stacks))

    def _first_graph(self, which: Sequence[int]) -> fx.GraphModule:
        """A normalised graph of (all active primals, the tangents of ``which``)."""
        chosen = [self.active[i] for i in which]

        def flat(*inputs: Tensor) -> list[Tensor]:
            return self.push(inputs[: len(self.xs)], inputs[len(self.xs) :], chosen)

        inputs = [*_fresh(self.xs), *_fresh([self.xs[i] for i in which])]
        module = retrace(flat, inputs, _REAL_ZEROS)  # may hold in-place operators of PyTorch's own formulas
        module = retrace(torch.func.functionalize(module, remove="mutations"), inputs)
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.args[0])  # how autograd saves a value, not a stop of the derivative
        seeds = inputs_of(module)[: len(self.xs)]
        return normalize(module, analyse(module.graph, seeds, results_of(module)).active)

    def _second_graph(self, which: Sequence[int]) -> tuple[fx.GraphModule, Layout]:
        """A graph of (all active primals, the tangents of ``which``, the second directions of ``which``)."""
        module = self._first_graph(which)
        seeds = {inputs_of(module)[i]: None for i in which}
        results = results_of(module)
        scope = Scope(analyse(module.graph, list(seeds), results).active)
        expanded, layout = expand(module, seeds, range(len(results)), Components(1, None), scope)
        count = len(self.xs) + len(which)

        def unstacked(*inputs: Tensor) -> list[Tensor]:
            out = expanded(*inputs[:count], *(u.unsqueeze(0) for u in inputs[count:]))
            return [tangent.squeeze(0) for tangent in out[layout.primals :]]

        fakes = [*_fresh(self.xs), *_fresh([self.xs[i] for i in which]), *_fresh([self.xs[i] for i in which])]
        return simplify(eliminate(retrace(unstacked, fakes))), layout


_REAL_ZEROS: dict[Any, Function] = {
    torch.ops.aten._efficientzerotensor.default: lambda size, **kwargs: torch.ops.aten.zeros.default(size, **kwargs),
    torch.ops.aten._new_zeros_with_same_feature_meta.default: lambda x, like, **kwargs: x.new_zeros(like.shape),
}


def _fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """New tensors of the same kind and layout (formulas depend on it), unknown to the trace under way."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]


def forward_mode(op: Any, which: Sequence[int], tangents: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """T by PyTorch's forward-mode formula of the operator.

    An operator without a formula may pass on no tangent at all (one of ``torch.library`` does), which is not a zero.
    """
    connected = _connected(op, which, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at = dict(zip(which, tangents, strict=True))

    def function(*xs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        moved = dict(zip(which, xs, strict=True))
        args, kwargs = pytree.tree_unflatten([moved.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        outputs = [o for o in pytree.tree_leaves(op(*args, **kwargs)) if _is_differentiable(o)]
        return [o for o, has in zip(outputs, connected, strict=True) if has], outputs

    primals_ = tuple(leaves[i] for i in which)
    _, found, outputs = torch.func.jvp(function, primals_, tuple(at[i] for i in which), strict=True, has_aux=True)  # type: ignore[misc]
    parts = iter(found)
    return [next(parts) if has else torch.zeros_like(o) for o, has in zip(outputs, connected, strict=True)]


def transposed(op: Any, which: Sequence[int], tangents: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """T by transposing PyTorch's reverse-mode formula: T(x, v) = d/dg <v, phi'(x)^T g>.

    An argument that gets no gradient contributes nothing, and an output that gives none is constant.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    with torch.enable_grad(), functions_called(apply_of_library):
        xs = [leaves[i].detach().requires_grad_() for i in which]
        moved = dict(zip(which, xs, strict=True))
        args, kwargs = pytree.tree_unflatten([moved.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        outputs = [o for o in pytree.tree_leaves(op(*args, **kwargs)) if _is_differentiable(o)]
        connected = [o for o in outputs if o.requires_grad]
        gs = [torch.zeros_like(o).requires_grad_() for o in connected]
        pulled = torch.autograd.grad(connected, xs, gs, create_graph=True, allow_unused=True) if connected else []
        pairs = [(p, v) for p, v in zip(pulled, tangents, strict=False) if p is not None]
        found = [
            torch.autograd.grad(p, gs, v, retain_graph=True, allow_unused=True) for p, v in pairs if p.requires_grad
        ]
    if len(found) < len(pairs) or any(part == (None,) * len(gs) for part in found):
        raise UnsupportedOpError("its backward cannot be differentiated in the incoming gradient")
    parts = {id(o): add(*(part[i] for part in found)) for i, o in enumerate(connected)}
    _refuse_nonlinear(gs, [part for part in parts.values() if part is not None])
    return [torch.zeros_like(o) if parts.get(id(o)) is None else parts[id(o)] for o in outputs]


SHAPES_ONLY = frozenset(overloads(SHAPES))  # their results do not depend on an argument's values


def _refuse_nonlinear(gs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """The derivative of a linear backward in the incoming gradient does not depend on that gradient's values."""
    incoming = {node_of(g) for g in gs}
    found, front = set(), [node_of(result) for result in results]
    while front:
        node = front.pop()
        if node is None or node in found:
            continue
        if node in incoming:
            raise UnsupportedOpError("its backward is not linear in the incoming gradient (does it clip or normalise?)")
        found.add(node)
        front += [] if node.target in SHAPES_ONLY else node.all_input_nodes


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def synthesize(op: Operator) -> Rule:
    """A rule for an operator without one, from PyTorch's forward-mode formula or else from its reverse-mode one.

    Raises:
        UnsupportedOpError: when called, if PyTorch has neither, or the operator is not differentiable at all.
    """

    def push(op: Any, which: Sequence[int], tangents: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        if op in CHANGING:
            raise UnsupportedOpError("no rule, and PyTorch has no derivative of an operator that changes its arguments")
        if draws(op):
            raise UnsupportedOpError(
                "no rule, and it draws random numbers, so that a derivative of it evaluated apart would draw others"
            )
        if not _has_autograd(op) or not any(_connected(op, which, args, kwargs)):  # a silent zero otherwise
            raise UnsupportedOpError("no rule, and PyTorch has no derivative of it")
        reasons = []
        for derive in (forward_mode, transposed):
            try:
                return derive(op, which, tangents, *args, **kwargs)
            except Exception as error:  # each frontier of PyTorch's own coverage raises its own kind
                reasons.append(f"{derive.__name__}: {_first_line(error)}")
        raise UnsupportedOpError("no rule, and PyTorch has no derivative to make one from (" + "; ".join(reasons) + ")")

    is_pytorchs = isinstance(op, OpOverload) and op.namespace in ("aten", "prims")
    return from_jvp(push, kind="synthesised", symmetric=is_pytorchs)


def _has_autograd(op: Any) -> bool:
    """Whether anybody has told autograd of the operator; it guesses where nobody has."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
    return not isinstance(op, OpOverload) or any(has_kernel(op.name(), key) for key in keys)


def _connected(op: Any, which: Sequence[int], args: Any, kwargs: Any) -> list[bool]:
    """Which of the floating-point outputs autograd connects to the arguments."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    with torch.enable_grad():
        for i in which:
            leaves[i] = leaves[i].detach().requires_grad_()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return [o.requires_grad for o in pytree.tree_leaves(op(*args, **kwargs)) if _is_differentiable(o)]


def _push_function(op: Any, which: Sequence[int], tangents: Sequence[Tensor], inputs: Any, call: int) -> Any:
    """T of a custom autograd Function: its backward, transposed."""
    try:
        with known_literals():
            return transposed(op, which, tangents, inputs, call)
    except Exception as error:  # whatever the user's backward raises on tensors that are being traced
        name = CALLS[call].function.__name__
        raise UnsupportedOpError(
            f"the backward of the custom autograd Function {name} cannot be transposed ({_first_line(error)}); write "
            "it in differentiable torch functions that are linear in the incoming gradient"
        ) from error


_BY_BACKWARD = from_jvp(_push_function, symmetric=False)  # a surrogate has any backward


def _function(op: Any, components: Components, inputs: Any, call: int) -> Any:
    """The rule of a custom autograd Function: its own backward is its derivative."""
    record = CALLS[call]
    record.check_derivable()
    result = _BY_BACKWARD(op, components, inputs, call)
    if components.second_order is not None and record.nested:
        raise UnsupportedOpError(
            f"the backward of the custom autograd Function {record.function.__name__} calls another, {record.nested}, "
            "and the second derivative would pass over that one's own derivative"
        )
    return result


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


DEFAULT.append(lambda op: _function if op in FUNCTIONS else synthesize(op))

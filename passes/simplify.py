"""Simplify: identities that need no knowledge of where a node came from.

Contract: a functional graph in, an equivalent one with at most as many nodes out. Each rewrite is one function from a
node to the node that can take its place, or None; it may also change the node itself. None of them decides anything
about a symbolic size: what is not known to be equal is different. A value that the graph returns stays memory of its
own where it was. In the bodies of higher-order operators layouts stay as well: those of two branches, or of two
iterations, must agree.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fomoh_fx.passes.dataflow import escapes, graphs_in, is_view, root_of

aten = torch.ops.aten
Rewrite = Callable[[fx.Node], fx.Node | None]


# What is known about values.


def value_of(node: Any) -> Tensor | None:
    """The recorded (fake) tensor of a node."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes, or sequences of sizes, are known to be equal."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def _same(node: fx.Node, source: Any) -> bool:
    """Whether two nodes hold tensors of one shape, dtype and device."""
    a, b = value_of(node), value_of(source)
    if a is None or b is None or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    return _equal([*a.shape], [*b.shape])


def _same_layout(node: fx.Node, source: fx.Node) -> bool:
    """The same in memory as well: strides, and whether a conjugate or a negative is still to be taken."""
    a, b = value_of(node), value_of(source)
    if a is None or b is None or (a.is_conj(), a.is_neg()) != (b.is_conj(), b.is_neg()):
        return False
    return _same(node, source) and _equal([*a.stride()], [*b.stride()])


def _is_contiguous(node: fx.Node) -> bool:
    value, expected = value_of(node), 1
    if value is None:
        return False
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not _equal(size, 1) and not _equal(stride, expected):
            return False
        expected = expected * size
    return True


def number_in(argument: Any) -> complex | None:
    """The number that an argument is: a literal, or a tensor filled with one."""
    if not isinstance(argument, fx.Node):
        return argument if isinstance(argument, (int, float, complex)) else None
    filled = _FILLED.get(argument.target)
    number = filled(argument.args) if filled else None
    return number if isinstance(number, (int, float, complex)) else None


def _zero(args: Any) -> int:
    return 0


def _one(args: Any) -> int:
    return 1


#: Operators that fill a tensor, and the number that they fill it with.
_FILLED: dict[Any, Callable[[Any], Any]] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _zero),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _one),
    **dict.fromkeys((aten.full.default, aten.full_like.default), operator.itemgetter(1)),
    aten.new_full.default: operator.itemgetter(2),
    aten.scalar_tensor.default: operator.itemgetter(0),
}


# Operators that only move data.


def unchanged(node: fx.Node) -> fx.Node | None:
    """Nothing is moved: the result has the argument's own shape, dtype and device."""
    source = node.args[0]
    return source if isinstance(source, fx.Node) and _same(node, source) else None


def copied(node: fx.Node) -> fx.Node | None:
    """A copy of a value that nothing can mutate; one made for its layout stays where the layout differs."""
    source = node.args[0]
    return source if isinstance(source, fx.Node) and _same_layout(node, source) else None


def reshaped(node: fx.Node) -> fx.Node | None:
    """view(squeeze(view(x))): x where the shape has come back to x's, and one view of x where x is contiguous."""
    source = node.args[0]
    while isinstance(source, fx.Node):
        if _same(node, source):  # through a reshape that copies, the layout may not have come back: views need it
            return source if _same_layout(node, source) else None
        if node.target in _VIEWS and source is not node.args[0] and _is_contiguous(source):
            node.update_arg(0, source)
        source = source.args[0] if source.target in _KEEPS_ORDER else None
    return None


def copied_for_a_view(node: fx.Node) -> None:
    """view(contiguous copy of x) is one reshape of x, where no view of x has the shape, so that it copies as well."""
    copy = node.args[0]
    if not isinstance(copy, fx.Node) or copy.target is not aten.clone.default or len(copy.users) > 1:
        return
    source = value_of(copy.args[0])
    if source is None or copy.kwargs.get("memory_format") is not torch.contiguous_format:
        return
    if not _has_view(source, node.meta["val"].shape):
        node.target, node.args = aten.reshape.default, (copy.args[0], node.args[1])


def _has_view(value: Tensor, shape: Sequence[int]) -> bool:
    """Whether the shape is one of the same memory; assumed of sizes that are not known."""
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride(), *shape)):
        return True
    try:
        value.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def permuted(node: fx.Node) -> fx.Node | None:
    """permute(permute(x)) is one permutation, or x itself."""
    dims, source = _permutation(node), node.args[0]
    if dims is None or not isinstance(source, fx.Node):
        return None
    inner = _permutation(source)
    if inner is not None:
        dims, source = [inner[d] for d in dims], source.args[0]
    if dims == list(range(len(dims))):
        return source  # type: ignore[return-value]
    if inner is not None:
        node.target, node.args = aten.permute.default, (source, dims)
    return None


def _permutation(node: fx.Node) -> list[int] | None:
    """Which axis of the argument each axis of the result is, for permute and transpose."""
    value = value_of(node)
    if value is None or node.target not in _PERMUTES:
        return None
    dims = list(range(value.ndim))
    if node.target is aten.permute.default:
        return [d % value.ndim for d in cast(Sequence[int], node.args[1])]
    if node.target is aten.t.default:
        return dims[::-1]
    if dims:
        a, b = (d % value.ndim for d in cast(Sequence[int], node.args[1:3]))
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def moved_alone(node: fx.Node) -> fx.Node | None:
    """A permutation that moves only axes of one element keeps the order of all elements: a reshape."""
    dims, value = _permutation(node), value_of(node)
    if dims is None or value is None:
        return None
    longer = [d for d, size in zip(dims, value.shape, strict=True) if not _equal(size, 1)]
    return _as_reshape(node, value) if longer == sorted(longer) else None


def expanded_alone(node: fx.Node) -> fx.Node | None:
    """An expansion that only adds axes of one element is a reshape."""
    source, value = value_of(node.args[0]), value_of(node)
    if source is None or value is None or not _equal(value.numel(), source.numel()):
        return None
    return _as_reshape(node, value)


def _as_reshape(node: fx.Node, value: Tensor) -> fx.Node | None:
    if not all(isinstance(size, int) for size in value.shape):  # sizes have no nodes of their own here
        return None
    node.target, node.args = aten.reshape.default, (node.args[0], [*value.shape])
    return reshaped(node)


def expanded(node: fx.Node) -> fx.Node | None:
    """expand(expand(x)) is one expansion."""
    source, sizes = node.args[:2]
    if isinstance(source, fx.Node) and source.target is aten.expand.default and -1 not in sizes:  # type: ignore[operator]
        node.update_arg(0, source.args[0])
    return unchanged(node)


def converted(node: fx.Node) -> fx.Node | None:
    """A conversion to a wider dtype and back."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten._to_copy.default:
        return None
    origin = cast(fx.Node, source.args[0])
    first, wide = value_of(origin), value_of(source)
    if first is None or wide is None or torch.promote_types(first.dtype, wide.dtype) != wide.dtype:
        return None
    return origin if first.dtype.is_floating_point and _same_layout(node, origin) else None


def padded_by_nothing(node: fx.Node) -> fx.Node | None:
    return copied(node) if all(isinstance(p, int) and p == 0 for p in node.args[1]) else None  # type: ignore[union-attr]


def whole_part(node: fx.Node) -> fx.Node | None:
    """The only part of a split into one."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target in _SPLITS and _same(node, source.args[0]):
        return source.args[0]  # type: ignore[return-value]
    return None


def joined_alone(node: fx.Node) -> fx.Node | None:
    """cat of one tensor."""
    parts = node.args[0]
    return parts[0] if len(parts) == 1 and _same(node, parts[0]) else None  # type: ignore[arg-type,index,return-value]


# Arithmetic.


def neutral(number: int, commutes: bool = False) -> Rewrite:
    """The rewrite of an operation with its neutral element: x * 1, x + 0, .. is x where that changes nothing else."""

    def rewrite(node: fx.Node) -> fx.Node | None:
        pairs = [node.args[:2], node.args[1::-1]] if commutes and not node.kwargs else [node.args[:2]]
        for x, w in pairs:
            if isinstance(x, fx.Node) and number_in(w) == number and _same(node, x):
                return x
        return None

    return rewrite


def negated_twice(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source.args[0] if isinstance(source, fx.Node) and source.target is node.target else None  # type: ignore


def subtracted(node: fx.Node) -> None:
    """x + (-w) and (-w) + x are x - w."""
    for x, w in (node.args, node.args[::-1]):
        if isinstance(w, fx.Node) and w.target is aten.neg.default and isinstance(x, fx.Node) and not node.kwargs:
            node.target, node.args = aten.sub.Tensor, (x, w.args[0])
            return


def chosen_anyway(node: fx.Node) -> fx.Node | None:
    """where(c, x, x)."""
    _, x, w = node.args
    return x if x is w and isinstance(x, fx.Node) and _same(node, x) else None


def chosen_number(node: fx.Node) -> None:
    """where() between a tensor and a tensor filled with a number takes the number itself."""
    condition, x, w = node.args
    for kept, filled in ((x, w), (w, x)):
        number, value = number_in(filled), value_of(kept)
        if number is None or value is None or number_in(kept) is not None or not _fits(number, filled, value):
            continue
        if value.dtype == node.meta["val"].dtype and _equal(_broadcast(condition, kept), [*node.meta["val"].shape]):
            node.target = aten.where.ScalarOther if kept is x else aten.where.ScalarSelf
            node.args = (condition, x, number) if kept is x else (condition, number, w)
            return


def _fits(number: complex, filled: Any, value: Tensor) -> bool:
    """Whether the number in the value's dtype is the one in the filled tensor's dtype."""
    if isinstance(number, complex) or not value.is_floating_point():
        return False
    return filled.meta["val"].dtype == value.dtype or abs(number) in (0, 1, float("inf"))


def _broadcast(*arguments: Any) -> list[Any]:
    """The shape of a broadcast of two values, -1 where it is not known."""
    shapes = [[*reversed(argument.meta["val"].shape)] for argument in arguments]
    rank = max(map(len, shapes))
    a, b = ([*shape, *[1] * (rank - len(shape))] for shape in shapes)
    return [n if _equal(n, m) or _equal(m, 1) else m if _equal(n, 1) else -1 for n, m in zip(a, b, strict=True)][::-1]


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_KEEPS_ORDER = _VIEWS | {aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
_PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar)

REWRITES: dict[Any, tuple[Rewrite, ...]] = {
    **dict.fromkeys(_KEEPS_ORDER, (reshaped,)),
    **dict.fromkeys(_VIEWS, (reshaped, copied_for_a_view)),
    **dict.fromkeys(_PERMUTES, (permuted,)),
    aten.expand.default: (expanded,),
    aten.slice.Tensor: (unchanged,),
    **dict.fromkeys(_REDUCTIONS, (unchanged,)),
    aten.clone.default: (copied,),
    aten.contiguous.default: (copied,),
    aten.repeat.default: (copied,),
    aten._to_copy.default: (copied, converted),
    aten.constant_pad_nd.default: (padded_by_nothing,),
    aten.cat.default: (joined_alone,),
    operator.getitem: (whole_part,),
    **dict.fromkeys(_FACTORS, (neutral(1, commutes=True),)),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar), (neutral(1),)),
    aten.add.Tensor: (neutral(0, commutes=True), subtracted),
    aten.add.Scalar: (neutral(0),),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), (neutral(0),)),
    aten.neg.default: (negated_twice,),
    aten.where.self: (chosen_anyway, chosen_number),
}
#: These may change how an axis of one element is laid out.
RELAYING: dict[Any, tuple[Rewrite, ...]] = {
    **dict.fromkeys(_PERMUTES, (moved_alone,)),
    aten.expand.default: (expanded_alone,),
}


def simplify(module: fx.GraphModule) -> fx.GraphModule:
    """Apply the rewrites to every node, in order, once: a node's arguments are already in their final form."""
    for part in graphs_in(module):
        _simplify(part, keep_layouts=part is not module)
    return module


def _simplify(module: fx.GraphModule, keep_layouts: bool) -> None:
    for node in list(module.graph.nodes):
        rewrites = REWRITES.get(node.target, ()) + (() if keep_layouts else RELAYING.get(node.target, ()))
        for rewrite in rewrites if node.op == "call_function" else ():
            replacement = rewrite(node)
            if replacement is None or _would_share_memory(node, replacement):
                continue
            if not keep_layouts or _same_layout(node, replacement):
                node.replace_all_uses_with(replacement)
                module.graph.erase_node(node)
                break
    module.recompile()


def _would_share_memory(node: fx.Node, replacement: fx.Node) -> bool:
    """Whether a new value that the graph returns would become memory of an input, or of another returned value."""
    if is_view(node) or not escapes(node):
        return False
    return root_of(replacement).op != "call_function" or escapes(root_of(replacement))

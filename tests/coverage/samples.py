"""The operators of PyTorch's database and their sample inputs, as scalar functions of real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree


@dataclass
class Case:
    """One sample of one operator: a scalar function of its floating-point inputs, and where to evaluate it."""

    name: str
    function: Callable[..., Tensor]
    inputs: list[Tensor]


def operators() -> dict[str, Any]:
    """Every OpInfo of the database, by a unique name."""
    return {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in op_db}


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def cases(name: str, op: Any, dtype: torch.dtype = torch.float64, most: int | None = None) -> Iterator[Case]:
    """The samples of an operator that have a floating-point input and output; none if it has no such dtype."""
    if dtype not in op.supported_dtypes("cpu"):
        return
    torch.manual_seed(0)
    for number, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=False)):
        if most is not None and number >= most:
            return
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        active = [i for i, leaf in enumerate(leaves) if is_floating(leaf) and leaf.layout == torch.strided]
        if not active:
            continue
        call = _call(op, sample, leaves, spec, active)
        inputs = [leaves[i].detach().clone() for i in active]
        torch.manual_seed(number)
        outputs = [o for o in pytree.tree_leaves(call(*inputs)) if is_floating(o)]
        if not outputs:
            continue
        weights = [torch.randn(o.shape, dtype=o.dtype) for o in outputs]
        yield Case(f"{name}[{number}]", _projected(call, weights), inputs)


def _call(op: Any, sample: Any, leaves: list[Any], spec: Any, active: list[int]) -> Callable[..., Any]:
    def call(*values: Tensor) -> Any:
        at = dict(zip(active, values, strict=True))
        args, kwargs = pytree.tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), *args, **kwargs))

    return call


def _projected(call: Callable[..., Any], weights: list[Tensor]) -> Callable[..., Tensor]:
    """A fixed random projection of the outputs: one number, whose derivatives see every element."""

    def function(*values: Tensor) -> Tensor:
        outputs = [o for o in pytree.tree_leaves(call(*values)) if is_floating(o)]
        terms = [(w * o).sum() for w, o in zip(weights, outputs, strict=True)]
        total = sum(t.real if t.is_complex() else t for t in terms)
        assert isinstance(total, Tensor)
        return total

    return function

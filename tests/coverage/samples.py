"""The operators of PyTorch's database and their sample inputs, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal import common_methods_invocations as database
from torch.testing._utils import wrapper_set_seed
from torch.utils import _pytree as pytree

TOLERANCES = {
    **dict.fromkeys((torch.float64, torch.complex128), 1e-8),
    **dict.fromkeys((torch.float32, torch.complex64), 1e-4),
    **dict.fromkeys((torch.bfloat16, torch.float16, torch.complex32), 3e-2),
}


@dataclass
class Case:
    """One sample of one operator.

    ``function`` maps the sample's tensors to the list of the floating-point outputs; ``active`` says which of
    ``inputs`` get a direction, and ``asked`` which of them the database asks derivatives for; ``weights`` are a fixed
    random projection of the outputs to one number, whose derivatives see every element.
    """

    name: str
    function: Callable[..., list[Tensor]]
    inputs: list[Tensor]
    active: list[bool]
    asked: list[bool]
    weights: list[Tensor]

    def projected(self, *values: Tensor) -> Tensor:
        """The projection of the outputs as a function of the active inputs, under one fixed random seed."""
        torch.default_generator.manual_seed(0)
        return self.project(self.function(*self.filled(values)))

    def filled(self, values: Sequence[Tensor]) -> list[Tensor]:
        """All inputs, the active ones replaced by the values."""
        given = iter(values)
        return [next(given) if active else x for x, active in zip(self.inputs, self.active, strict=True)]

    def project(self, outputs: Sequence[Tensor], lead: int = 0) -> Tensor:
        """Re sum <w, y>, over all axes but the first ``lead`` ones."""
        total = torch.zeros(outputs[0].shape[:lead], dtype=torch.float64)
        for w, y in zip(self.weights, outputs, strict=True):
            product = w * y
            product = product.real if product.is_complex() else product
            total = total + product.reshape(*y.shape[:lead], -1).sum(-1)
        return total

    def as_asked(self) -> Case | None:
        """The case with directions only where the database asks for derivatives, if those are some and not all."""
        return replace(self, active=self.asked) if any(self.asked) and self.asked != self.active else None

    @property
    def is_random(self) -> bool:
        """Whether the value changes with the seed."""
        values = []
        for seed in range(4):
            torch.default_generator.manual_seed(seed)
            with torch.no_grad():
                values.append(self.project(self.function(*self.inputs)))
        return not all(torch.equal(v, values[0]) or v.isnan() for v in values)

    @property
    def tolerance(self) -> float:
        """What a comparison with reverse mode allows, by the lowest precision among inputs and outputs."""
        return max(TOLERANCES[x.dtype] for x in (*self.points, *self.function(*self.inputs)))

    @property
    def points(self) -> list[Tensor]:
        """The active inputs."""
        return [x for x, active in zip(self.inputs, self.active, strict=True) if active]


def _unseeded(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


database.wrapper_set_seed = _unseeded  # a seed that the operator's own call sets is not in its graph: cases set it


def operators() -> dict[str, Any]:
    """Every OpInfo of the database, by a unique name."""
    return {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in database.op_db}


def is_floating(value: Any) -> bool:
    """Whether a derivative can pass through the value."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def cases(name: str, op: Any, dtype: torch.dtype = torch.float64, most: int | None = None) -> Iterator[Case]:
    """The samples of an operator that have a floating-point input and output, or ``most`` of them evenly spread.

    None if the operator has no such dtype, or does not run on a CPU.
    """
    if dtype not in op.supported_dtypes("cpu") or name.startswith("jiterator"):
        return
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd))
    step = 1 if most is None else max(len(samples) / most, 1)
    for number in sorted({int(i * step) for i in range(int(len(samples) / step))}):
        case = _case(f"{name}[{number}]", op, samples[number])
        if case is not None:
            yield case


def _case(name: str, op: Any, sample: Any) -> Case | None:
    leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    asked = [leaves[i].requires_grad for i in places]
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    inputs = [leaves[i] for i in places]
    wrapper = _unseeded if op.gradcheck_wrapper is wrapper_set_seed else op.gradcheck_wrapper

    def function(*values: Tensor) -> list[Tensor]:
        """The call as gradient checks make it: with the database's own symmetrisation of arguments and outputs."""
        at = dict(zip(places, values, strict=True))
        args, kwargs = pytree.tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        out = sample.output_process_fn_grad(wrapper(op.get_op(), *args, **kwargs))
        return [o for o in pytree.tree_leaves(out) if is_floating(o) and o.layout == torch.strided]

    def on_copies(*values: Tensor) -> list[Tensor]:
        return function(*(value.clone() for value in values))

    torch.manual_seed(0)
    copies = deepcopy(inputs)  # with all of their storage, of which a sample may be a part
    outputs = function(*copies)
    pairs = zip(copies, inputs, strict=True)
    changes = not all(a.shape == x.shape and torch.allclose(a, x, rtol=0, atol=0, equal_nan=True) for a, x in pairs)
    if not outputs or not any(map(is_floating, inputs)):
        return None
    weights = [torch.randn(o.shape, dtype=torch.complex128 if o.is_complex() else torch.float64) for o in outputs]
    return Case(name, on_copies if changes else function, inputs, [is_floating(x) for x in inputs], asked, weights)

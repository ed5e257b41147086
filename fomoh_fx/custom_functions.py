"""Custom autograd Functions as operators: one operator for each class, ``fomoh_fx_functions::Name(inputs, call)``.

A graph's node of it is one call of the Function: its value is the Function's forward, and autograd connects it to the
Function's backward. ``inputs`` are the tensors among the arguments; ``call`` numbers the rest of them.
Launches of Triton kernels are recorded in the same way: :mod:`fomoh_fx.triton_kernels`.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.autograd.function import Function
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.literals import FUNCTIONS as NAMESPACE
from fomoh_fx.literals import known_literals
from fomoh_fx.sizes import SYMBOLIC
from fomoh_fx.templates import Template, with_known
from fomoh_fx.users_code import StandIns, Stops, Watch, traced_code

library = torch.library.Library(NAMESPACE, "DEF")
namespace = getattr(torch.ops, NAMESPACE)

FUNCTIONS: dict[Any, Any] = {}  # by operator: the Function, or the Python function of a Triton kernel
CALLS: dict[int, Any] = {}
_OPERATORS: dict[Any, OpOverload] = {}


def is_function(value: Any) -> bool:
    """Whether the value is a custom autograd Function, the class."""
    return isinstance(value, type) and issubclass(value, Function) and value is not Function


def operator_of(function: Any) -> OpOverload:
    """The operator that stands for calls of the Function, or of a kernel; it is made when it is first asked for."""
    if function not in _OPERATORS:
        name = re.sub(r"\W", "_", function.__name__, flags=re.ASCII)
        while hasattr(namespace, name):  # another class of that name, or a method of the namespace itself
            name += "_"
        library.define(f"{name}(Tensor[] inputs, int call) -> Tensor[]")
        library.impl(name, _value, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _shape, lib=library)
        library.impl(name, _under_autograd, "Autograd")
        op = getattr(namespace, name).default
        _OPERATORS[function], FUNCTIONS[op] = op, function
    return _OPERATORS[function]


def refuse_sizes(name: str, arguments: Any) -> None:
    """Refuse arguments that depend on a dynamic dimension: a call keeps what is no tensor as it was."""
    if any(isinstance(leaf, SYMBOLIC) for leaf in pytree.tree_leaves(arguments)):
        raise UnsupportedOpError(
            f"an argument of {name} depends on a dynamic dimension: a custom Function or a Triton kernel takes numbers "
            "that are known at capture, so leave that dimension static, or let it read the size from a tensor's shape"
        )


class FunctionCall:
    """One call of a custom Function.

    Attributes:
        function: the class.
        arguments, results: its arguments and its results without their tensors; the results are known once it has run.
        given: the parameters and buffers that the model gave it as arguments, by their places; None for what it
            computed. A module among the other arguments may have them, too.
        device: the default device when it was called.
        draws: whether its forward draws random numbers.
        nested: the name of another Function that its backward calls, known once that has been traced.
    """

    def __init__(
        self, function: type[Function], arguments: Template, given: Sequence[weakref.ref[Tensor] | None] = ()
    ) -> None:
        refuse_sizes(function.__name__, arguments.leaves)
        self.function, self.arguments, self.given = function, arguments, given
        self.device = torch.get_default_device()
        self._stand_ins: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self.results: Template | None = None
        self.draws = False
        self.nested = ""
        self.number = len(CALLS)
        CALLS[self.number] = self

    def results_of(self, tensors: Sequence[Tensor]) -> Any:
        """What the Function returns, by one call of its operator."""
        found = operator_of(self.function)(list(tensors), self.number)
        assert self.results is not None
        return self.results.fill(found)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The values of the tensors among the results."""
        is_traced = detect_fake_mode(list(tensors)) is not None
        code = traced_code(self._standing_in(tensors)) if is_traced else nullcontext()
        with torch.no_grad(), code, self._on_its_device():
            arguments = self.arguments.fill(tensors)
            with Watch(Template.of(arguments)[1]) as watch:
                results = apply_function(self.function, *arguments)
        self.draws |= watch.draws
        if watch.changes:
            raise UnsupportedOpError(
                f"the custom autograd Function {self.function.__name__} changes its arguments in place; let it return "
                "new tensors"
            )
        self.results, found = Template.of(results)
        return [t.clone() for t in found]

    def _on_its_device(self) -> AbstractContextManager[Any]:
        """Its code makes tensors on the default device, of which an operator's call knows nothing."""
        return nullcontext() if self.device.type == "cpu" else DeviceContext(self.device)

    def _standing_in(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """What stands for the model's own tensors, by their identity."""
        own = [None if ref is None else ref() for ref in self.given]
        return {id(x): t for x, t in zip(own, tensors, strict=False) if x is not None and x is not t}

    @cached_property
    def recorded(self) -> type[Function]:
        """The Function whose value is one call of the operator, and whose backward is the user's own.

        What backward uses of the output is the operator's as well, so that it has the Function's own derivative; what
        forward computes and saves besides has the derivative of that computation.
        """
        function = self.function

        def value(args: Sequence[Any]) -> Any:
            return self.results_of(self.arguments.tensors_of(args))

        def forward(ctx: Any, *args: Any) -> Any:
            with traced_code(self._stand_ins), self._on_its_device():
                inside, outside = function.forward(ctx, *args), value(args)
                inputs = {id(t) for t in Template.of(args)[1]}
                pairs = zip(Template.of(inside)[1], Template.of(outside)[1], strict=True)
                _replace_saved(ctx, {id(a): b for a, b in pairs if id(a) not in inputs})
            return outside

        def forward_alone(*args: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return value(args)

        chosen = staticmethod(forward_alone if has_setup_context(function) else forward)
        made = type(function.__name__, (function,), {"forward": chosen})
        return with_stops(made, self._nested_call, self._for_backward)

    @contextmanager
    def _for_backward(self) -> Iterator[None]:
        with StandIns(self._stand_ins), self._on_its_device():
            yield

    infer = run

    def connect(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same, connected to the Function's backward."""
        self.check_derivable()
        self._stand_ins = WeakValueDictionary(self._standing_in(tensors))
        with known_literals():
            return Template.of(apply_function(self.recorded, *self.arguments.fill(tensors)))[1]

    @cached_property
    def operator(self) -> FunctionOperator:
        """The Function as its rule sees it."""
        return FunctionOperator(self)

    def check_derivable(self) -> None:
        """Refuse a Function whose forward, evaluated again for what backward uses, would give other values."""
        if self.draws:
            raise UnsupportedOpError(
                f"the custom autograd Function {self.function.__name__} draws random numbers, so its backward cannot "
                "be evaluated apart from its forward; a Composite of torch functions as its rule keeps them together"
            )

    def _nested_call(self, function: type[Function], *args: Any) -> Any:
        if not of_library(function):
            self.nested = function.__name__
        return apply_function(function, *args)


def with_stops(
    function: type[Function],
    nested: Callable[..., Any],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> type[Function]:
    """The Function with what its backward stops recorded.

    ``nested(function, *args)`` serves Functions called there, ``around()`` is entered for it.
    """
    pull = "backward" if function.vjp is Function.vjp else "vjp"

    def backward(ctx: Any, *gradients: Any) -> Any:
        with Stops(), around(), functions_called(nested):
            return getattr(function, pull)(ctx, *gradients)

    return type(function.__name__, (function,), {pull: staticmethod(backward)})


def of_library(function: type[Function]) -> bool:
    """Whether PyTorch has made the Function for an operator of ``torch.library``."""
    return function.__module__ == torch._library.autograd.__name__


def apply_of_library(function: type[Function], *args: Any) -> Any:
    """``function.apply`` for the Function of an operator, whose backward may call those of other operators only."""

    def nested(inner: type[Function], *inner_args: Any) -> Any:
        if of_library(inner):
            return apply_of_library(inner, *inner_args)
        raise UnsupportedOpError(f"its backward calls a custom autograd Function, {inner.__name__}")

    return apply_function(with_stops(function, nested) if of_library(function) else function, *args)


def _replace_saved(ctx: Any, by: dict[int, Tensor]) -> None:
    """Exchange tensors in what a forward has left in its context."""

    def exchanged(value: Any) -> Any:
        return pytree.tree_map(lambda leaf: by.get(id(leaf), leaf), value)

    for name in ("to_save", "non_differentiable"):
        if getattr(ctx, name) is not None:
            setattr(ctx, name, exchanged(getattr(ctx, name)))
    for name, value in vars(ctx).items():
        setattr(ctx, name, exchanged(value))


def apply_function(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` as PyTorch does it, also while capture records such calls instead."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)(*args)


@contextmanager
def functions_called(call: Callable[..., Any]) -> Iterator[None]:
    """Let ``call(function, *args)`` serve calls below ``Function.apply``, which users bind to names of their own."""
    single_level = torch.autograd.function._SingleLevelFunction
    before = single_level.__dict__.get("apply")
    under_transforms = torch._functorch.autograd_function.custom_function_call
    single_level.apply = classmethod(call)  # type: ignore[attr-defined]
    torch._functorch.autograd_function.custom_function_call = call  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del single_level.apply  # type: ignore[attr-defined]
        else:
            single_level.apply = before  # type: ignore[attr-defined]
        torch._functorch.autograd_function.custom_function_call = under_transforms


def _value(inputs: list[Tensor], call: int) -> list[Tensor]:
    return CALLS[call].run(inputs)


def _shape(inputs: list[Tensor], call: int) -> list[Tensor]:
    return CALLS[call].infer(inputs)


def _under_autograd(inputs: list[Tensor], call: int) -> list[Tensor]:
    record = CALLS[call]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return record.operator.overload(inputs, call)
    return record.connect(inputs)


def has_setup_context(function: type[Function]) -> bool:
    """Whether forward takes no context: the newer style."""
    return function.setup_context is not Function.setup_context


@dataclass(frozen=True)
class Argument:
    """An argument of a Function's forward."""

    name: str
    default: Any = None


class FunctionOperator:
    """A Function as its rule sees it: called on tensors it gives the forward's value.

    In a graph that is one call of the Function, under vmap the operators of its forward.
    """

    def __init__(self, record: FunctionCall) -> None:
        self.record, self.function = record, record.function

    def __call__(self, *args: Any) -> Any:
        template, tensors = Template.of(with_known(args))
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            return forward_of(self.function, args)
        same = template.has_leaves_of(self.record.arguments)
        return (self.record if same else FunctionCall(self.function, template)).results_of(tensors)

    @property
    def overload(self) -> OpOverload:
        """What stands in a graph."""
        return operator_of(self.function)

    def __str__(self) -> str:
        return self.function.__qualname__

    __repr__ = __str__

    @property
    def arguments(self) -> list[Argument]:
        """The arguments of forward, without its context."""
        parameters = list(inspect.signature(self.function.forward).parameters.values())
        mine = parameters if has_setup_context(self.function) else parameters[1:]
        return [Argument(p.name, None if p.default is p.empty else p.default) for p in mine]


def forward_of(function: type[Function], args: Sequence[Any]) -> Any:
    """The value as the operators of the Function's forward, without its backward."""
    return function.forward(*args) if has_setup_context(function) else function.forward(_Context(len(args)), *args)


class _Context:
    """The context of a forward whose backward is never called."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Any) -> None: ...

    save_for_forward = mark_non_differentiable = mark_dirty = set_materialize_grads = save_for_backward


def rule_of_operator(rule: Callable[..., Any]) -> Callable[..., Any]:
    """From a rule of a Function's own arguments and results, the rule of its operator."""

    def adapted(op: Any, components: Any, inputs: Sequence[Any], call: int) -> list[Any]:
        record = CALLS[call]
        return _listed(record, rule(record.operator, components, *record.arguments.fill(inputs)))

    return adapted


def body_of_operator(body: Callable[..., Any]) -> Callable[..., Any]:
    """From a body in a Function's own arguments and results, the body of its operator."""
    return lambda inputs, call: _listed(CALLS[call], body(*CALLS[call].arguments.fill(inputs)))


def _listed(record: Any, results: Any) -> list[Any]:
    """What stands for each tensor among the Function's results."""
    template = record.results
    assert template is not None
    given = zip(template.spec.flatten_up_to(results), template.is_tensor, strict=True)
    return [result for result, is_tensor in given if is_tensor]
